"""Loading a checkpoint as a whole, in any format that this package writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.constants import QUANT_METHOD
from moe_compress.errors import InputError
from moe_compress.model import MoEModel, hf, read_config
from moe_compress.model.opening import refuse_codes

from .registration import register
from .write import result_config


def load(
    folder: str | Path,
    *,
    task: str | None = None,
    keep: float | None = None,
    patterns: str | Path | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a checkpoint in any format that this package writes, by transformers' own loader.

    Args:
        folder: the checkpoint, or its name on the Hub if the local cache has it.
        task: load the experts of a domain only (docs/domains.md): the name of one that `moe-compress domains` has
            measured, or a prompt, for the nearest; a line on standard error says which. Bytes of the other experts
            aren't read, except that a prompt runs through the first layer with experts.
        keep: with `task`, share of the experts that stay; default: what the patterns were made for.
        patterns: with `task`, their file; default: domains.safetensors in the folder.
        options: for `from_pretrained` (`dtype`, `device_map`, …).

    Returns:
        A model of the class that config.json names, in eval mode; packed experts stay packed.

    Raises:
        InputError, CheckpointError, UnsupportedModelError: the folder isn't a checkpoint that can be loaded.
    """
    register()
    if task is not None:
        from moe_compress.domains import load_task  # it stands above this package

        return load_task(folder, task, keep=keep, patterns=patterns, **options)
    if keep is not None or patterns is not None:
        raise InputError("`keep` and `patterns` belong to a `task`: load(folder, task=…)")
    # Truncated or missing shards: one clear line instead of a loader's.
    with Checkpoint(folder) as checkpoint:
        folder = checkpoint.folder
        method = checkpoint.quantization.get("quant_method")
        if method is None:
            refuse_codes(checkpoint)
    if method is not None and method != QUANT_METHOD:
        return _of_others(folder, options)
    config = AutoConfig.from_pretrained(folder)
    return hf.model_class(config).from_pretrained(folder, **options).eval()  # type: ignore[no-any-return]


def _of_others(folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    """A folder in a format of others, loaded as the native or dense checkpoint that it amounts to."""
    view = MoEModel.open(folder)
    assert view.weights is not None
    described = result_config(view, view.descriptions())[0]
    config = read_config(folder)
    config.__dict__.pop("quantization_config", None)
    if "quantization_config" in described:
        config.quantization_config = described["quantization_config"]
    unowned = set(view.weights.unowned)
    state = {name: view.source.get(name) for name in view.source.tensors if name not in unowned}
    return from_tensors(config, state, folder, options)


def from_tensors(
    config: PreTrainedConfig, state: dict[str, Tensor], folder: Path, options: Mapping[str, Any]
) -> PreTrainedModel:
    """A model of these tensors (by their names on disk) in place of a folder's, whose generation config it has."""
    model = hf.model_class(config).from_pretrained(None, config=config, state_dict=state, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]
