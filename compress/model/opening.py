"""What is found out before there is a handle on a model: its config, if it can be handled, where its layers are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_compress.checkpoint.reader import MODELOPT, Checkpoint, read_json
from moe_compress.errors import CheckpointError, UnsupportedModelError

from . import families
from .axes import ExpertAxes, expert_counts, layer_index


def read_config(path: str | Path) -> PreTrainedConfig:
    """config.json of a checkpoint folder as transformers' config object. Raises like `MoEModel.open`."""
    return config_of(Checkpoint(path))


def config_of(source: Checkpoint) -> PreTrainedConfig:
    """The same of an opened folder, or of what presents one."""
    values = source.config
    model_type = values.get("model_type")
    if not model_type:
        raise CheckpointError(f"{source.folder / 'config.json'} names no model_type")
    if reason := families.refusal(str(model_type)):
        raise UnsupportedModelError(f"model type {model_type!r} is not supported: {reason}")
    try:
        config = AutoConfig.from_pretrained(source.folder)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"transformers can't read {source.folder / 'config.json'}: {reason}") from error
    refuse(config)
    if (text := config.get_text_config()) is not config:
        text.__dict__.pop("quantization_config", None)  # `source` has it
    return config


def refuse(config: PreTrainedConfig) -> None:
    """Raises UnsupportedModelError, with the reason, for a family that can't be handled."""
    for model_type in (config.model_type, config.get_text_config().model_type):
        if reason := families.refusal(model_type):
            raise UnsupportedModelError(f"model type {model_type!r} is not supported: {reason}")


def refuse_codes(source: Checkpoint) -> None:
    """Raises UnsupportedModelError for quantized weights of which config.json says nothing: they would pass for plain
    numbers."""
    codes = source.codes()
    if not codes:
        return
    first = source.tensors[codes[0]]
    how = f"{codes[0]!r} in {first.file} is {first.dtype}, and config.json has no quantization_config"
    if (source.folder / MODELOPT).is_file():
        stated = read_json(source.folder / MODELOPT).get("quantization")
        how = f"by ModelOpt, {stated.get('quant_algo') if isinstance(stated, dict) else 'unknown'}"
    raise UnsupportedModelError(
        f"{source.folder} is already quantized ({how}): start from the checkpoint in full precision, or from one in a "
        "format of docs/sources.md whose config.json is complete"
    )


def find_stack(module: PreTrainedModel) -> str:
    """Module path of the list of decoder layers that holds the most experts modules, the text decoder's if several.

    Raises UnsupportedModelError where none holds any.
    """
    lists: Counter[str] = Counter()
    for path in expert_counts(module):
        parts = path.split(".")
        for position in range(len(parts) - 1, 0, -1):
            if parts[position].isdigit():
                lists[".".join(parts[:position])] += 1
                break
    if not lists:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no layers with experts: it is a dense model, or not of this kind"
        )
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else None
    inside = {id(m) for m in decoder.modules()} if decoder is not None else set()
    text = [path for path in lists if id(module.get_submodule(path)) in inside]
    return max(text or lists, key=lambda path: lists[path])


def one_per_layer(axes: dict[str, ExpertAxes], stack: str) -> dict[int, str]:
    """Decoder layer → path of its experts module; the first, where a layer has several (text before vision)."""
    found: dict[int, str] = {}
    for path in axes:
        index = layer_index(path, stack)
        if index is not None:
            found.setdefault(index, path)
    return found
