"""Loading a checkpoint that this package wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.model import hf

from .registration import register


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint in any format that this package writes, by transformers' own loader.

    Args:
        folder: the checkpoint.
        options: for `from_pretrained` (`dtype`, `device_map`, …).

    Returns:
        A model of the class that config.json names, in eval mode; packed experts stay packed.

    Raises:
        InputError, CheckpointError, UnsupportedModelError: the folder isn't a checkpoint that can be loaded.
    """
    register()
    Checkpoint(folder).close()  # truncated or missing shards: one clear line instead of a loader's
    config = AutoConfig.from_pretrained(folder)
    return hf.model_class(config).from_pretrained(folder, **options).eval()  # type: ignore[no-any-return]
