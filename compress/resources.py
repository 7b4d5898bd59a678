"""What the machine has room for: where hidden states wait, what may be loaded whole, which device computes in what."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from moe_compress.errors import InputError, RecipeError
from moe_compress.model import MoEModel
from moe_compress.units import parse_bytes, show_bytes

# Share of the free memory that hidden states may take before they go to disk.
_HIDDEN_SHARE = 0.25
# Share of the free memory that a whole model may take where it needn't be loaded.
_WHOLE_SHARE = 0.7


def holding(model: MoEModel, tokens: int, folder: Path, choice: str = "auto") -> Path | None:
    """Where hidden states of a sweep wait: None for memory, or the folder ("auto": when they would take much of it)."""
    # A suspended call holds the embedded text, the layer's input, and the output that is being made.
    small = 3 * _hidden_bytes(model, tokens) < _HIDDEN_SHARE * psutil.virtual_memory().available
    return None if choice == "memory" or (choice == "auto" and small) else folder


def holding_all(model: MoEModel, tokens: int, folder: Path | None, choice: str = "auto") -> Path | None:
    """The same for a sweep that goes back; without a folder there is memory only.

    Raises InputError, with the sizes, where what it holds won't fit: what every layer reads, and the gradients.
    """
    size = (len(model.layers) + 5) * _hidden_bytes(model, tokens)
    free = psutil.virtual_memory().available
    if folder is None or choice == "memory" or (choice == "auto" and size < _HIDDEN_SHARE * free):
        where, chosen = "memory", None
    else:
        where, chosen, free = str(folder), folder, shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"gradients need the hidden states of {tokens} tokens in {len(model.layers)} layers, {show_bytes(size)}, "
            f"and {where} has {show_bytes(free)} free: calibrate with fewer `sequences`"
        )
    return chosen


def _hidden_bytes(model: MoEModel, tokens: int) -> int:
    hidden = int(model.module.config.get_text_config().hidden_size)
    return int(tokens * hidden * model.dtype.itemsize)


def memory_limit(setting: str) -> int:
    """Bytes that a whole model may take where loading it is an option: a number, or a share of what is free."""
    return int(_WHOLE_SHARE * psutil.virtual_memory().available) if setting == "auto" else parse_bytes(setting)


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": a GPU if there is one; float32 on a CPU (bfloat16 is several times slower), else bfloat16.

    Raises RecipeError for a device that isn't there.
    """
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(1, device=where).item()  # what a device without data can't do
    except (RuntimeError, AssertionError) as error:  # torch raises either, and speaks of how it was built
        raise RecipeError(
            f"device {device!r} can't be used here; use auto, cpu, or cuda where there is a GPU"
        ) from error
    if dtype == "auto":
        return where, torch.float32 if where.type == "cpu" else torch.bfloat16
    return where, getattr(torch, dtype)
