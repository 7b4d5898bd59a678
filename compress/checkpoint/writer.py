"""Writing a checkpoint folder shard by shard, without holding more than one shard's new tensors.

Promise: the folder appears under its name only when it is complete; every tensor in it, and every file that says how
to use them, is listed in the manifest with its SHA-256; a tensor is refused if its values are not numbers or its name
was written already.

Beside the folder, `NAME.work-partial` is what is being written, and `NAME.work-replaced` what `overwrite` replaces,
until the new one is in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.errors import InputError, RunError

from .atomic import copy_file, flush, write_json, write_tensors
from .reader import INDEX, SINGLE

MANIFEST = "moe_compress.json"
# What a run says of its result: never part of what is made from that result.
REPORTS = ("report.json", "report.md")
_PARTIAL, _REPLACED = ".work-partial", ".work-replaced"


class CheckpointWriter:
    """Streams a checkpoint into `folder`.

    Args:
        folder: where it will be; must not exist or be empty, unless `overwrite`.
        shard_bytes: a shard is closed once it holds this much.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False, shard_bytes: int = 2 << 30):
        check_output(folder, overwrite)
        self.folder = settled(folder)
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self.partial, self._replaced = neighbours(self.folder)
        if self.partial.exists():
            shutil.rmtree(self.partial)  # left by a run that was killed
        self.partial.mkdir(parents=True)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.tensors: dict[str, dict[str, Any]] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors. Those mapped from files stay mapped; others are held until their shard is written."""
        for name, tensor in tensors.items():
            if name in self.tensors or name in self._pending:
                raise RunError(f"tensor {name!r} would be written twice")
            tensor = tensor.detach().to("cpu").contiguous()
            if not all_finite(tensor):
                raise RunError(f"tensor {name!r} holds values that are not finite; it is not written")
            self._pending[name] = tensor
            self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= self.shard_bytes:
            self._close_shard()

    def finish(self, config: dict[str, Any], sidecars: Mapping[str, Path], manifest: dict[str, Any]) -> None:
        """Write what remains, index, config, copies of `sidecars` and manifest, and give the folder its name."""
        self._close_shard()
        total = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            os.replace(self.partial / _draft(number), self.partial / final)
            for name in names:
                weight_map[name] = final
                self.tensors[name]["file"] = final
        if total > 1:
            size = sum(entry["bytes"] for entry in self.tensors.values())
            write_json(
                self.partial / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            )
        for name, file in sidecars.items():
            if name not in ("config.json", MANIFEST, *REPORTS):
                copy_file(file, self.partial / name)
        write_json(self.partial / "config.json", config)
        # A model card is the owner's to change; all other files decide what the tensors mean.
        files = sorted(p for p in self.partial.rglob("*") if p.is_file() and p.suffix not in (".safetensors", ".md"))
        manifest = {
            **manifest,
            "files": {p.relative_to(self.partial).as_posix(): file_digest(p) for p in files},
            "tensors": dict(sorted(self.tensors.items())),
        }
        manifest = json.loads(json.dumps(manifest))  # as it will be read back
        write_json(self.partial / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})
        self._publish()

    def _close_shard(self) -> None:
        if not self._pending:
            return
        number = len(self._shards) + 1
        write_tensors(self.partial / _draft(number), self._pending, {"format": "pt"})
        for name, tensor in self._pending.items():
            self.tensors[name] = {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "bytes": tensor.numel() * tensor.element_size(),
                "sha256": tensor_digest(tensor),
            }
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _publish(self) -> None:
        if self.folder.exists():
            # Old results go only now, when the new ones are complete.
            if any(self.folder.iterdir()) and not self.overwrite:
                raise InputError(f"{self.folder} was filled while this ran; nothing was written over it")
            if self._replaced.exists():  # left by a run that was killed
                shutil.rmtree(self._replaced)
            os.replace(self.folder, self._replaced)
        os.replace(self.partial, self.folder)
        flush(self.folder.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass, no temporary of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # eight bits: torch compares none of them
        return all(bool(piece.float().isfinite().all()) for piece in tensor.reshape(-1).split(1 << 24))
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def settled(folder: Path) -> Path:
    """The same folder under a path that has a name and is no link: what is renamed must be the folder itself.

    Raises InputError for the root, which has none.
    """
    folder = folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder
    if not folder.name:
        raise InputError(f"output {folder} can't be replaced: choose a folder inside it")
    return folder


def neighbours(folder: Path) -> tuple[Path, Path]:
    """What is beside a settled folder while it is written: the new one, and the one that it replaces."""
    return folder.with_name(folder.name + _PARTIAL), folder.with_name(folder.name + _REPLACED)


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise InputError when `folder` may not be written."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file")
    if os.path.ismount(folder):
        raise InputError(f"output {folder} is a mount point, which can't be replaced: choose a folder inside it")
    if folder.is_dir() and folder.resolve() in (here := Path.cwd(), *here.parents):
        raise InputError(
            f"output {folder} holds the working directory, so it can't be replaced: choose a folder inside it"
        )
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"output folder {folder} is not empty; choose another, or say --overwrite (in Python: overwrite=True)"
        )


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in pieces: nothing is copied whole."""
    digest = hashlib.sha256()
    flat = (
        tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    )
    for piece in flat.split(1 << 24):
        digest.update(piece.numpy().data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, its own digest left out."""
    values = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _draft(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
