"""Is this folder, byte for byte and number for number, what was computed?

The manifest is compared with its own digest; every tensor and every file that says how to use them is read back and
compared with theirs; and the checkpoint is loaded by the loader that its users will use and asked the probe again. A
model that doesn't fit in memory is streamed instead, and the result says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress import probe
from moe_compress.checkpoint.decoded import DecodedCheckpoint
from moe_compress.checkpoint.gguf_file import STORED
from moe_compress.checkpoint.reader import Checkpoint, read_json
from moe_compress.checkpoint.writer import MANIFEST, file_digest, manifest_digest, tensor_digest
from moe_compress.constants import COMPRESSED_TENSORS, GGUF, GPTQ, QUANT_METHOD
from moe_compress.errors import CheckpointError, InputError, VerificationError
from moe_compress.model import MoEModel, hf
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress
from moe_compress.resources import memory_limit
from moe_compress.units import show_bytes

from .loader import load
from .second_reading import second_reading


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Attributes:
        tensors, bytes: read back and equal to their digests.
        loader: what loaded the model for the probe.
        distance: largest relative difference of the probe's logits; `tolerance` is what was allowed.
    """

    tensors: int
    bytes: int
    loader: str
    distance: float
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))


def verify(folder: str | Path, progress: Progress | None = None, device: str = "cpu", memory: str = "auto") -> Verified:
    """Check a checkpoint that this package wrote.

    Args:
        folder: the checkpoint.
        progress: told about every tensor.
        device: where the probe runs.
        memory: most that the whole model may take ("8 GB"); a larger one is streamed.

    Raises:
        InputError: the folder has no manifest of this package.
        VerificationError: it can't be read, or differs from what was computed; says in what.
    """
    folder, progress = Path(folder), progress or Progress()
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} has no {MANIFEST}: only checkpoints written by moe-compress can be verified")
    try:
        return _verified(folder, progress, device, memory_limit(memory))
    except CheckpointError as error:  # whole once, so it was damaged since
        raise VerificationError(str(error)) from error


def _verified(folder: Path, progress: Progress, device: str, limit: int) -> Verified:
    manifest = read_json(folder / MANIFEST)
    if manifest.get("sha256") != manifest_digest(manifest):
        raise VerificationError(f"{folder / MANIFEST} was changed since it was written: nothing can be told from it")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise VerificationError(f"{folder} lacks {name}, which was written")
        if file_digest(folder / name) != digest:
            raise VerificationError(f"{folder / name} was changed since it was written")
    with Checkpoint(folder) as checkpoint:
        listed = manifest["tensors"]
        missing, extra = (
            sorted(listed.keys() - checkpoint.tensors.keys()),
            sorted(checkpoint.tensors.keys() - listed.keys()),
        )
        if missing or extra:
            what = f"lacks {missing[0]!r}" if missing else f"holds {extra[0]!r}, which was never written"
            raise VerificationError(f"{folder} {what} ({len(missing)} missing, {len(extra)} unknown tensors)")
        for name, entry in listed.items():
            if tensor_digest(checkpoint.get(name)) != entry["sha256"]:
                raise VerificationError(
                    f"{folder / entry['file']}: tensor {name!r} is not what was written: write it again"
                )
            progress.step()
        total = checkpoint.nbytes
    loader, dtype, logits = ask(folder, manifest["probe"], device, limit)
    tolerance = probe.TOLERANCE[dtype]
    worst = probe.distance(manifest["probe"], logits)
    if worst > tolerance:
        raise VerificationError(
            f"{folder} loads ({loader}), but its logits differ from those computed by {worst:.2g} of their spread "
            f"(allowed: {tolerance:g})"
        )
    return Verified(len(listed), total, loader, worst, tolerance)


def ask(folder: Path, kept: Mapping[str, Any], device: str, limit: int) -> tuple[str, torch.dtype, torch.Tensor]:
    """(loader, dtype, logits [T, V]) of a probe's tokens, computed in its dtype; by transformers' own loader if the
    model fits."""
    ids = torch.tensor([kept["input_ids"]])
    dtype = getattr(torch, kept.get("dtype") or ("float32" if device == "cpu" else "bfloat16"))
    needed = loaded_bytes(folder, dtype)
    if needed <= limit:
        with torch.no_grad(), hf.quiet():
            module = load(folder, dtype=dtype).to(device)
            logits = module(input_ids=ids.to(device)).logits[0].float().cpu()
            return _loader(folder, module, limit - needed), dtype, logits
    model = MoEModel.open(folder, dtype=dtype, device=device)
    with Sweep(model, [{"input_ids": ids}]) as sweep:
        for step in sweep:
            step.advance()
        logits = next(sweep.outputs())[1][0].float().cpu()
    why = f"streamed: whole it takes {show_bytes(needed)}, {show_bytes(limit)} are allowed"
    return why, dtype, logits


def _loader(folder: Path, module: Any, room: int) -> str:
    """What loaded a model, and what another loader made of the same folder where there is one."""
    with Checkpoint(folder) as checkpoint:
        method = checkpoint.quantization.get("quant_method")
    if method == GPTQ:
        return "read by the format's description; transformers has no loader for experts in it"
    if method == GGUF:
        return "read by the format's description"
    if method != COMPRESSED_TENSORS:
        return "transformers from_pretrained"
    return f"read by the format's description; {second_reading(folder, module, room)}"


def loaded_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Memory that the loaded model takes: quantized weights and their scales as they are, the rest in `dtype`."""
    with Checkpoint(folder) as checkpoint:
        if checkpoint.quantization.get("quant_method") not in (None, QUANT_METHOD):
            seen = MoEModel.open(folder).source
            checkpoint = seen if isinstance(seen, DecodedCheckpoint) else checkpoint  # what `load` makes dense
        packed = bool(checkpoint.quantization)
        total = 0
        for name, info in checkpoint.tensors.items():
            count = info.nbytes // info.dtype.itemsize
            if name in checkpoint.block_types and "_exps." not in name:  # blocks of a GGUF: only experts stay packed
                _, weights, size = STORED[checkpoint.block_types[name]]
                total += info.nbytes // size * weights * dtype.itemsize
                continue
            small = not info.dtype.is_floating_point or info.dtype.itemsize == 1
            keeps = small or (packed and name.endswith((".scale", ".weight_scale", ".scales")))
            total += info.nbytes if keeps else count * dtype.itemsize
        return total
