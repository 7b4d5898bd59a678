"""What others make of a `compressed-tensors` checkpoint: transformers' own loader, beside this package's reader.

transformers unpacks the experts with the `compressed-tensors` library while it loads. That is code of others from the
first byte to the last, so if it arrives at the weights that the reader here holds, the file is what the format says.
It isn't asked where its answer is known to mean nothing: it takes one group's scheme for the experts of all layers, and
before 0.18 the library unpacked some widths wrongly.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from moe_compress.errors import VerificationError
from moe_compress.model import FusedExperts, hf
from moe_compress.model.beside import is_packed

from .compressed_reader import uniform
from .compressed_tensors import VERSION
from .schemes import Scheme

# Schemes whose experts transformers' loader makes dense. Of int-quantized ones it makes nothing, of blocks an error.
_CONVERTED = ("wna16", "fp8")


def second_reading(folder: Path, model: PreTrainedModel, room: int) -> str:
    """Load a folder by transformers' own loader and compare all that is packed with `model`, bit for bit.

    Args:
        folder: the checkpoint.
        model: the same checkpoint, read by this package, experts packed.
        room: bytes that the model may take with its experts unpacked.

    Returns:
        What came of it, for the report: that all are equal, or why nothing could be compared.

    Raises VerificationError when the weights differ.
    """
    packed = {n: m for n, m in model.named_modules() if getattr(m, "kind", "") in ("packed", "scaled")}
    weights = sum(
        p.out_features * p.in_features * m.num_experts for m in packed.values() for p in m.projections.values()
    )
    linears: dict[str, Any] = {n: m for n, m in model.named_modules() if is_packed(m)}
    weights += sum(m.shape[0] * m.shape[1] for m in linears.values())
    inside = tuple(f"{m}." for m in (*packed, *linears))
    others = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(inside))
    config = AutoConfig.from_pretrained(folder)
    if reason := _unable(config.quantization_config):
        return f"transformers' own loader was not asked: {reason}"
    dtype = next(t.dtype for m in packed.values() for n, t in m.state_dict().items() if n.endswith(".scale"))
    if (weights + others) * dtype.itemsize > room:
        return "transformers' own loader was not asked: it unpacks all experts, which memory has no room for"
    try:
        with hf.quiet(), contextlib.redirect_stderr(io.StringIO()):  # the library draws bars of its own
            theirs: Any = type(model).from_pretrained(folder, dtype=dtype)
            if linears:  # unpacked by the first forward only
                with torch.no_grad():
                    theirs(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    except Exception as error:  # whatever it trips over is its own; the file is judged by the reader alone
        return f"transformers' own loader can't load this family ({type(error).__name__})"
    for path, module in packed.items():
        unpacked = FusedExperts(theirs.get_submodule(path)).weights()
        for name, projection in module.projections.items():
            for expert in range(module.num_experts):
                ours = projection.matrices([expert], dtype)[0].cpu()  # theirs is on the CPU
                if not torch.equal(ours, getattr(unpacked, name)[expert]):
                    raise VerificationError(
                        f"{folder}: transformers' own loader reads the {name} projection of expert {expert} in {path} "
                        "as other weights than were written"
                    )
    for path, module in linears.items():
        if not torch.equal(module.rows(slice(None), dtype).cpu(), theirs.get_submodule(path).weight):
            raise VerificationError(
                f"{folder}: transformers' own loader reads {path} as other weights than were written"
            )
    what = "experts and linear layers" if linears else "experts"
    return f"transformers' own loader (compressed-tensors) arrives at the same {what}, bit for bit"


def _unable(config: Any) -> str:
    """Why its answer would mean nothing, or nothing."""
    try:
        version = importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:
        return "compressed-tensors is not installed"
    if _number(version) < _number(VERSION):
        return f"compressed-tensors {version} is older than {VERSION}"
    values = config if isinstance(config, dict) else config.to_dict()
    for group in values["config_groups"].values():
        scheme = Scheme.of_group(group)
        if scheme is None or scheme.name not in _CONVERTED:
            return f"it has no conversion for {'such' if scheme is None else scheme.name} experts"
    if not uniform(values):
        return "it takes one scheme for the experts of all layers and one for all else, and these differ"
    return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
