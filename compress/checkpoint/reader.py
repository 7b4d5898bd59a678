"""A Hugging Face checkpoint folder, read lazily and checked before anything trusts it.

Promise: opening reads only headers (kilobytes); `get` maps a tensor's bytes without copying them; whatever is
inconsistent (a missing or truncated shard, an index that names what isn't there, a tensor of an unknown dtype) is a
CheckpointError that names file and tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CHAT_TEMPLATE_DIR

from moe_compress.constants import GGUF, GGUF_FILE
from moe_compress.errors import CheckpointError, InputError

from .gguf_file import read_gguf
from .names import local_folder, remedy

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODELOPT = "hf_quant_config.json"  # how ModelOpt says that the weights beside it are quantized

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is.

    Attributes:
        file: shard's file name.
        dtype, shape: as stored.
        offset: first byte within the file.
        nbytes: bytes in the file.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """Tensors of a checkpoint folder by name. Use as a context manager, or call `close`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(local_folder(folder))
        if not self.folder.exists():
            raise InputError(f"no such folder: {self.folder}{remedy(str(folder))}")
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{self.folder}: no config.json, so not a Hugging Face checkpoint folder")
        self.tensors: dict[str, TensorInfo] = {}
        self.block_types: dict[str, str] = {}  # of a GGUF file: tensor → type
        self._blocks: dict[str, TensorInfo] = {}
        self._open: dict[str, Any] = {}
        self._headers: dict[str, bytes] = {}
        for file, names in self._shards().items():
            found = self._read_header(file)
            if names is not None and (missing := sorted(names - found.keys())):
                raise CheckpointError(f"{self.folder / INDEX} names {missing[0]!r} in {file}, which doesn't hold it")
            unlisted = sorted(found.keys() - names) if names is not None else []
            if unlisted:
                raise CheckpointError(f"{self.folder / file} holds {unlisted[0]!r}, which {INDEX} doesn't list")
            self.tensors.update(found)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files. Tensors already handed out stay valid."""
        self._open.clear()

    @property
    def config(self) -> dict[str, Any]:
        """config.json; its text model's `quantization_config` at the top, where transformers looks for it first."""
        values = read_json(self.folder / "config.json")
        text = values.get("text_config")
        if isinstance(text, dict) and (nested := text.pop("quantization_config", None)) is not None:
            values["quantization_config"] = values.get("quantization_config") or nested
        return values

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json, empty where there is none. Raises CheckpointError if it's no such."""
        values = self.config.get("quantization_config")
        if values is None:
            return {}
        if not isinstance(values, dict) or not isinstance(values.get("quant_method"), str):
            raise CheckpointError(f"{self.folder / 'config.json'}: quantization_config names no quant_method")
        return values

    def codes(self) -> list[str]:
        """Names of tensors that mean nothing without scales: 8-bit numbers, and words that codes are packed in."""
        return [
            name
            for name, info in self.tensors.items()
            if (info.dtype.itemsize == 1 and info.dtype != torch.bool) or name.endswith((".qweight", ".weight_packed"))
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def slice(self, name: str) -> Any:
        """Lazy handle on a tensor: nothing is read until it is indexed."""
        info = self._info(name)
        return self._file(info.file).get_slice(name)

    def get(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped from the file: no copy."""
        info = self._info(name)
        return self._file(info.file).get_tensor(name)  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Identifies config and weights: SHA-256 over config.json, all headers, and samples of each shard's bytes.

        64 blocks of 64 KiB per shard are read, so a model of any size takes seconds; two checkpoints that differ only
        between the samples are taken for the same.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(self._headers):
            digest.update(file.encode() + self._headers[file])
            path = self.folder / file
            size = path.stat().st_size
            with path.open("rb") as handle:
                for sample in range(64):
                    handle.seek(size * sample // 64)
                    digest.update(handle.read(min(65536, size)))
        return digest.hexdigest()

    # --- inside ------------------------------------------------------------------------------------------------

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}")
        return self.tensors[name]

    def _file(self, file: str) -> Any:
        if file not in self._open:
            try:
                path = self.folder / file
                self._open[file] = (
                    _MappedBlocks(path, self._blocks) if file == GGUF_FILE else safe_open(path, framework="pt")
                )
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / file} can't be opened: {error}") from error
        return self._open[file]

    def _shards(self) -> dict[str, set[str] | None]:
        """Shard files → names that the index puts there (None: no index)."""
        index = self.folder / INDEX
        if self.quantization.get("quant_method") == GGUF:
            if not (self.folder / GGUF_FILE).is_file():
                raise CheckpointError(f"{self.folder} lacks {GGUF_FILE}")
            return {GGUF_FILE: None}
        if not index.is_file():
            if (self.folder / SINGLE).is_file():
                return {SINGLE: None}
            other = sorted(p.name for p in self.folder.glob("*.bin")) + sorted(
                p.name for p in self.folder.glob("*.gguf")
            )
            hint = f" ({other[0]} is not safetensors; convert it first)" if other else ""
            raise CheckpointError(f"{self.folder}: neither {SINGLE} nor {INDEX}{hint}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no 'weight_map'")
        shards: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or file != os.path.basename(file):
                raise CheckpointError(f"{index} puts {name!r} into {file!r}, which is no file name")
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{index} names the shard {file}, which isn't in {self.folder}")
            names = shards.setdefault(file, set())
            assert names is not None
            names.add(name)
        return shards

    def _read_header(self, file: str) -> dict[str, TensorInfo]:
        path = self.folder / file
        if file == GGUF_FILE:
            return self._read_blocks(path)
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path} is truncated or not a safetensors file ({size} bytes)")
            raw = handle.read(length)
        tensors = _entries(path, raw, 8 + length)
        end = max((info.offset + info.nbytes for info in tensors.values()), default=8 + length)
        if end != size:
            raise CheckpointError(
                f"{path} is {size} bytes, its header asks for {end}: the file is "
                f"{'truncated' if size < end else 'damaged'}; copy or download it again"
            )
        self._headers[file] = raw
        return tensors

    def _read_blocks(self, path: Path) -> dict[str, TensorInfo]:
        """Tensors of a GGUF file by their names there: numbers as they are, blocks as bytes [..., bytes of a row]."""
        _, entries = read_gguf(path)
        first = min((entry.offset for entry in entries), default=0)
        with path.open("rb") as handle:
            self._headers[path.name] = handle.read(first)
        for entry in entries:
            self.block_types[entry.name] = entry.type
            dtype = DTYPES.get(entry.type, torch.uint8)
            shape = entry.shape if entry.type in DTYPES else (*entry.shape[:-1], entry.row_bytes)
            self._blocks[entry.name] = TensorInfo(path.name, dtype, shape, entry.offset, entry.nbytes)
        return dict(self._blocks)


class _MappedBlocks:
    """A GGUF file as safetensors' reader presents one."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]):
        # Private, so nothing can be written to the file.
        self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        self._tensors = tensors

    def get_tensor(self, name: str) -> torch.Tensor:
        info = self._tensors[name]
        return self._bytes[info.offset : info.offset + info.nbytes].view(info.dtype).view(info.shape)

    def get_slice(self, name: str) -> torch.Tensor:
        return self.get_tensor(name)


class Lazy:
    """What a safetensors slice offers to a loader, for a tensor that `checkpoint.get` makes when it is read."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self._checkpoint.get(self._name)[key]

    def get_shape(self) -> list[int]:
        """Shape of the tensor."""
        return list(self._checkpoint.tensors[self._name].shape)


def _entries(path: Path, raw: bytes, data: int) -> dict[str, TensorInfo]:
    """What a safetensors header says, every claim of it checked; `data`: where in the file tensors begin."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: header names {twice!r} twice; copy or download the file again")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not JSON ({error}); copy or download the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON object; copy or download the file again")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        values = entry if isinstance(entry, dict) else {}
        kind, shape, span = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (isinstance(kind, str) and _counts(shape) and _counts(span) and len(span) == 2):
            raise CheckpointError(f"{path}: tensor {name!r} has no proper dtype, shape and data_offsets")
        if kind not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {kind}, which is not supported; convert the checkpoint to BF16"
            )
        info = TensorInfo(path.name, DTYPES[kind], tuple(shape), data + span[0], span[1] - span[0])
        if info.nbytes != math.prod(shape) * info.dtype.itemsize:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {kind} {shape} in {info.nbytes} bytes; copy or download the file again"
            )
        tensors[name] = info
    at, before = data, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            raise CheckpointError(
                f"{path}: tensor {name!r} doesn't begin where {before} ends: the file is damaged; copy or download it "
                "again"
            )
        at, before = info.offset + info.nbytes, repr(name)
    return tensors


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of numbers that count something."""
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it isn't one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def config_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of weights that a config.json names, its text model's first; None where it names no dtype of floats."""
    text = config.get("text_config") or {}
    named = [v.get(key) for v in (text, config) for key in ("dtype", "torch_dtype") if v.get(key)]
    found = getattr(torch, str(named[0]).removeprefix("torch."), None) if named else None
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def sidecar_files(folder: Path) -> dict[str, Path]:
    """Name in the folder → file, of what isn't weights: config, tokenizer, generation config, chat templates, code."""
    skip = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", MODELOPT)
    beside = sorted(n for n in os.listdir(folder) if not n.endswith(skip) and not n.startswith("."))
    templates = sorted(f"{CHAT_TEMPLATE_DIR}/{f.name}" for f in (folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))
    return {n: folder / n for n in (*beside, *templates) if (folder / n).is_file()}
