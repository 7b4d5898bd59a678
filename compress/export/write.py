"""A model with changed blocks → a checkpoint folder that its runtime loads.

Promise: every tensor that wasn't changed is copied byte for byte from the source, including those that the model class
doesn't own (multi-token-prediction heads, …); config.json is the source's own with only the keys changed that must be;
tokenizer, generation config and whatever else lies beside the weights come along. Nothing appears under the output's
name before it is complete.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_compress.checkpoint.reader import sidecar_files
from moe_compress.checkpoint.writer import CheckpointWriter
from moe_compress.constants import FORMAT_VERSION, QUANT_METHOD
from moe_compress.errors import RecipeError
from moe_compress.model import MoEModel, hf
from moe_compress.model.axes import with_count
from moe_compress.progress import Progress


def write_folder(
    model: MoEModel,
    output: Path,
    manifest: dict[str, Any],
    progress: Progress,
    *,
    overwrite: bool = False,
) -> str:
    """Write a model that was opened from a folder, its overlay included.

    Args:
        model: with an overlay that holds the changed blocks.
        output: folder to write.
        manifest: what is recorded beside the tensors' digests.
        progress: told about every layer.
        overwrite: whether `output` may hold something.

    Returns:
        "hf" or "native": the format.

    Raises:
        InputError: `output` may not be written. RunError: the disk is full, or a tensor isn't finite.
    """
    source = model.source
    assert model.weights is not None
    changed = {i: model.overlay.get(i) if model.overlay is not None else None for i in model.moe_layers}
    descriptions = {i: c[1] for i, c in changed.items() if c is not None}
    config, form = result_config(model, descriptions)
    writer = CheckpointWriter(output, overwrite=overwrite)
    inside = {name for i in range(len(model.layers)) for name in model.weights.layer_names(i)}
    writer.add({name: source.get(name) for name in source.tensors if name not in inside})
    for index in range(len(model.layers)):
        names = model.weights.layer_names(index)
        block = changed.get(index)
        if block is not None:
            replaced = model.own_names(index)
            names = {disk: runtime for disk, runtime in names.items() if runtime not in replaced}
        writer.add({name: source.get(name) for name in names})
        if block is not None:
            writer.add(_on_disk(model, index, *block))
        progress.layer(index)
    writer.finish(config, sidecar_files(source.folder), manifest)
    return form


def write_memory(
    model: MoEModel, output: Path, manifest: dict[str, Any], progress: Progress, *, overwrite: bool = False
) -> str:
    """Write a model that is in memory, in the layout in which its family is stored; like `write_folder` otherwise.

    Tokenizer and generation config are the caller's to add.
    """
    config, form = result_config(model, {i: model.block(i).state()[1] for i in model.moe_layers})
    writer = CheckpointWriter(output, overwrite=overwrite)
    tied = set(getattr(model.module, "all_tied_weights_keys", None) or {})
    for index in (None, *range(len(model.layers))):
        with model.reading(index) as tensors:
            packed = _packed_names(model, index)
            writer.add({n: t for n, t in tensors.items() if n in packed})
            dense = {n: t for n, t in tensors.items() if n not in packed and n not in tied}
            writer.add(hf.to_disk_default(model.module, dense))
        if index is not None:
            progress.layer(index)
    writer.finish(config, [], manifest)
    return form


def result_config(model: MoEModel, descriptions: Mapping[int, dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """config.json of the result, and its format.

    Equal numbers of dense experts everywhere need nothing but another number: "hf". Anything else is "native".
    """
    config = copy.deepcopy(model.config_values)
    counts = {
        i: int(descriptions[i]["num_experts"]) if i in descriptions else model.original_experts
        for i in model.moe_layers
    }
    uniform = len(set(counts.values())) == 1
    if uniform:
        config = with_count(config, model.count_paths, next(iter(counts.values())))
    dense = all(d["kind"] == "fused" for d in descriptions.values())
    if dense and uniform:
        return config, "hf"
    # The loader starts from the skeleton that config.json describes, and reshapes the blocks that differ from it.
    kinds: list[dict[str, Any]] = []
    blocks = {}
    for index in model.moe_layers:
        axes = model.axes(index).to_json()
        if axes not in kinds:
            kinds.append(axes)
        unchanged = {"kind": "fused", "num_experts": counts[index], "experts": model.block(index).path}
        blocks[str(index)] = {**descriptions.get(index, unchanged), "axes": kinds.index(axes)}
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "stack": model.stack,
        "axes": kinds,
        "blocks": blocks,
    }
    return config, "native"


def check_format(wanted: str, form: str, target: str) -> None:
    """Raise RecipeError when a result can't have the format that the recipe asks for."""
    if wanted not in ("auto", form) and not (wanted == "native" and form == "hf"):
        raise RecipeError(f"the result needs the format {form!r}, the recipe asks for {wanted!r} (target {target})")


def _on_disk(model: MoEModel, index: int, tensors: dict[str, Tensor], description: dict[str, Any]) -> dict[str, Tensor]:
    """A changed block's tensors under the names that the file will have."""
    assert model.weights is not None
    prefix = f"{model.stack}.{index}."
    experts = model.block(index).path + "."
    packed = description["kind"] != "fused"
    # Packed stacks are stored as they run; everything else as the source's own layout has it.
    result = {prefix + n: t for n, t in tensors.items() if packed and n.startswith(experts)}
    dense = {prefix + n: t for n, t in tensors.items() if prefix + n not in result}
    result.update(model.weights.names.to_disk(dense))
    return result


def _packed_names(model: MoEModel, index: int | None) -> set[str]:
    """Full names of a layer's tensors that are stored as they run."""
    if index is None or index not in model.moe_layers:
        return set()
    block = model.block(index)
    if block.kind == "fused":
        return set()
    return {f"{model.stack}.{index}.{n}" for n in block.own_names() if n.startswith(block.path + ".")}
