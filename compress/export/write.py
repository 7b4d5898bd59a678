"""A model with changed blocks → a checkpoint folder that its runtime loads.

Promise: every tensor that wasn't changed is copied byte for byte from the source, including those that the model class
doesn't own (multi-token-prediction heads, …); config.json is the source's own with only the keys changed that must be;
tokenizer, generation config and whatever else lies beside the weights come along. Nothing appears under the output's
name before it is complete.

What quantized experts become is the target's to say: `native` stores them as they run, the served formats one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_compress.checkpoint.reader import sidecar_files
from moe_compress.checkpoint.writer import CheckpointWriter
from moe_compress.constants import FORMAT_VERSION, GGUF, QUANT_METHOD
from moe_compress.errors import RunError
from moe_compress.model import MoEModel, hf
from moe_compress.model.axes import with_count
from moe_compress.progress import Progress

from .served import SERVED, Served
from .targets import Target


def write_folder(
    model: MoEModel,
    output: Path,
    manifest: dict[str, Any],
    progress: Progress,
    *,
    overwrite: bool = False,
    quantized: str = "native",
    target: Target | None = None,
) -> str:
    """Write a model that was opened from a folder, its overlay included.

    Args:
        model: with an overlay that holds the changed blocks.
        output: folder to write.
        manifest: what is recorded beside the tensors' digests.
        progress: told about every layer.
        overwrite: whether `output` may hold something.
        quantized: format of quantized experts, "native", "compressed-tensors" or "gptq".
        target: runtime that has to load it, for rules of its own.

    Returns:
        The format: `quantized`, or "hf" where nothing is packed.

    Raises:
        InputError: `output` may not be written.
        RunError: the disk is full, a tensor isn't finite, or the format can't hold the experts.
    """
    source = model.source
    assert model.weights is not None
    changed = {i: model.overlay.get(i) if model.overlay is not None else None for i in model.moe_layers}
    descriptions = {i: c[1] for i, c in changed.items() if c is not None}
    config, form = result_config(model, descriptions, quantized)
    served = Served(model, config, form, {i: descriptions.get(i) or model.description(i) for i in changed}, target)
    if form in SERVED:
        config["quantization_config"] = served.foreseen()
    writer = CheckpointWriter(output, overwrite=overwrite)

    def copy(names: Collection[str]) -> None:
        writer.add({name: source.get(name) for name in names})
        served.leave(names)

    inside = {name for i in range(len(model.layers)) for name in model.weights.layer_names(i)}
    copy([name for name in source.tensors if name not in inside])
    for index in range(len(model.layers)):
        names = model.weights.layer_names(index)
        block = changed.get(index)
        if block is not None:
            replaced = model.own_names(index)
            names = {disk: runtime for disk, runtime in names.items() if runtime not in replaced}
        copy(names)
        if block is not None:
            packed, dense = on_disk(model, index, *block)
            writer.add(served.tensors(index, packed, block[1]) if packed and form in SERVED else packed)
            writer.add(dense)
            served.add(dense)
        progress.layer(index)
    served.finish()
    writer.finish(config, sidecar_files(source.folder), manifest)
    return form


def write_memory(
    model: MoEModel,
    output: Path,
    manifest: dict[str, Any],
    progress: Progress,
    *,
    overwrite: bool = False,
    quantized: str = "native",
    target: Target | None = None,
) -> str:
    """Write a model that is in memory, in the layout in which its family is stored; like `write_folder` otherwise.

    Tokenizer and generation config are the caller's to add.
    """
    descriptions = {i: model.block(i).state()[1] for i in model.moe_layers}
    config, form = result_config(model, descriptions, quantized)
    served = Served(model, config, form, descriptions, target)
    writer = CheckpointWriter(output, overwrite=overwrite)
    tied = set(getattr(model.module, "all_tied_weights_keys", None) or {})
    for index in (None, *range(len(model.layers))):
        with model.reading(index) as tensors:
            names = _packed_names(model, index)
            packed = {n: t for n, t in tensors.items() if n in names}
            if packed and index is not None and form in SERVED:
                packed = served.tensors(index, packed, descriptions[index])
            writer.add(packed)
            dense = {n: t for n, t in tensors.items() if n not in names and n not in tied}
            dense = model.to_disk(dense) if form in SERVED else hf.to_disk_default(model.module, dense)
            writer.add(dense)
            served.add(dense)
        if index is not None:
            progress.layer(index)
    if form in SERVED:
        config["quantization_config"] = served.config()
    writer.finish(config, [], manifest)
    return form


def result_config(
    model: MoEModel, descriptions: Mapping[int, dict[str, Any]], quantized: str = "native"
) -> tuple[dict[str, Any], str]:
    """config.json of the result, and its format.

    Equal numbers of dense experts everywhere need nothing but another number: "hf". Anything else is `quantized`; what
    a served format says of the layers is known when they are written.
    """
    config = copy.deepcopy(model.config_values)
    if (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:  # described anew
        del config["quantization_config"]
        config.pop("experts_implementation", None)
    descriptions = {i: descriptions.get(i) or model.description(i) for i in model.moe_layers}
    counts = {int(d["num_experts"]) for d in descriptions.values()}
    uniform = len(counts) == 1
    if uniform:
        config = with_count(config, model.count_paths, next(iter(counts)))
    dense = all(d["kind"] == "fused" for d in descriptions.values())
    if dense and uniform:
        return config, "hf"
    if quantized in SERVED:
        return config, quantized  # different numbers of experts break a rule of it
    if quantized == GGUF:
        if not uniform:
            raise RunError(f"layers with different numbers of experts can't be written as {quantized}")
        return config, quantized
    # The loader starts from the skeleton that config.json describes, and reshapes the blocks that differ from it.
    kinds: list[dict[str, Any]] = []
    blocks = {}
    for index in model.moe_layers:
        axes = model.axes(index).to_json()
        if axes not in kinds:
            kinds.append(axes)
        blocks[str(index)] = {**descriptions[index], "axes": kinds.index(axes)}
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "stack": model.stack,
        "axes": kinds,
        "blocks": blocks,
    }
    config["experts_implementation"] = hf.IMPLEMENTATION  # without the package: an error, not experts at random
    return config, "native"


def on_disk(
    model: MoEModel, index: int, tensors: dict[str, Tensor], description: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A changed block's tensors by full name: packed experts as they run, everything else as the file will have it."""
    assert model.weights is not None
    prefix = f"{model.stack}.{index}."
    experts = model.block(index).path + "."
    packed = description["kind"] != "fused"
    stacks = {prefix + n: t for n, t in tensors.items() if packed and n.startswith(experts)}
    dense = {prefix + n: t for n, t in tensors.items() if prefix + n not in stacks}
    return stacks, model.weights.names.to_disk(dense)


def _packed_names(model: MoEModel, index: int | None) -> set[str]:
    """Full names of a layer's tensors that are stored as they run."""
    if index is None or index not in model.moe_layers:
        return set()
    block = model.block(index)
    if block.kind == "fused":
        return set()
    return {f"{model.stack}.{index}.{n}" for n in block.own_names() if n.startswith(block.path + ".")}
