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
from moe_compress.constants import GGUF, QUANT_METHOD
from moe_compress.errors import RunError
from moe_compress.model import MoEModel, hf
from moe_compress.model.axes import with_count
from moe_compress.model.beside import OUTER, is_bias
from moe_compress.model.disk import replaced
from moe_compress.model.fewer import with_top_k
from moe_compress.model.routes import rule_prefix
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
    places = (OUTER, *range(len(model.layers)))
    changed = {i: c for i in places if model.overlay is not None and (c := model.overlay.get(i)) is not None}
    descriptions = {i: c[1] for i, c in changed.items()}
    config, form = result_config(model, descriptions, quantized, target)
    whole = {i: model.description(i) for i in model.moe_layers} | descriptions
    served = Served(model, config, form, whole, target)
    if form in SERVED:
        config["quantization_config"] = served.foreseen()
    writer = CheckpointWriter(output, overwrite=overwrite)

    def copy(names: Collection[str]) -> None:
        writer.add({name: source.get(name) for name in names})
        served.leave(names)

    inside = {name for i in range(len(model.layers)) for name in model.weights.layer_names(i)}
    outside = {name: model.weights.names.runtime[name] for name in source.tensors if name not in inside}
    for index in places:
        names = outside if index == OUTER else model.weights.layer_names(index)
        change = changed.get(index)
        if change is not None:
            own = model.own_names(index)
            names = {disk: runtime for disk, runtime in names.items() if not replaced(runtime, change[1], own)}
        copy(names)
        if change is not None:
            packed, dense = on_disk(model, index, *change)
            writer.add(served.tensors(index, packed, change[1]) if packed and form in SERVED else packed)
            writer.add(dense)
            served.add(dense)
        if index != OUTER:
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
    descriptions = model.descriptions()
    config, form = result_config(model, descriptions, quantized, target)
    served = Served(model, config, form, descriptions, target)
    writer = CheckpointWriter(output, overwrite=overwrite)
    tied = set(getattr(model.module, "all_tied_weights_keys", None) or {})
    for index in (OUTER, *range(len(model.layers))):
        with model.reading(index) as tensors:
            names = _packed_names(model, index, descriptions.get(index, {}))
            packed = {n: t for n, t in tensors.items() if n in names}
            if packed and form in SERVED:
                packed = served.tensors(index, packed, descriptions[index])
            writer.add(packed)
            dense = {n: t for n, t in tensors.items() if n not in names and n not in tied}
            dense = model.to_disk(dense) if form in SERVED else hf.to_disk_default(model.module, dense)
            writer.add(dense)
            served.add(dense)
        if index != OUTER:
            progress.layer(index)
    if form in SERVED:
        config["quantization_config"] = served.config()
    writer.finish(config, {}, manifest)
    return form


def result_config(
    model: MoEModel,
    descriptions: Mapping[int, dict[str, Any]],
    quantized: str = "native",
    target: Target | None = None,
) -> tuple[dict[str, Any], str]:
    """config.json of the result, and its format.

    `descriptions`: decoder layer, or OUTER → description of what changed there (see Overlay).

    Equal numbers of dense experts everywhere need nothing but another number: "hf". Where routers score more experts
    than there are, config.json keeps the number that they score. Anything else is `quantized`; what a served format
    says of the layers is known when they are written. A `target` that runs no rules gets the same top-k in every layer
    as a number in the config; RunError for any other rule.
    """
    config = copy.deepcopy(model.config_values)
    if (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:  # described anew
        del config["quantization_config"]
        config.pop("experts_implementation", None)
    matrices = dict(model.packed_matrices)
    for index, description in descriptions.items():
        prefix = model.prefix(index)
        matrices |= {prefix + path: values for path, values in (description.get("matrices") or {}).items()}
    descriptions = {i: _block(descriptions.get(i, {})) or model.description(i) for i in model.moe_layers}
    counts = {int(d["num_experts"]) for d in descriptions.values()}
    uniform = len(counts) == 1
    if uniform and not any("router_experts" in d for d in descriptions.values()):
        config = with_count(config, model.count_paths, next(iter(counts)))
    widths = {i: _width(d, model.config_widths[i]) for i, d in descriptions.items()}
    said = model.narrowed(widths)
    if isinstance(said, list) and said:
        config = with_count(config, said, next(w for w in widths.values() if w is not None))
        descriptions = {i: {k: v for k, v in d.items() if k != "neurons"} for i, d in descriptions.items()}
    dense = all(d["kind"] == "fused" for d in descriptions.values())
    ruled = [i for i, d in descriptions.items() if d.get("routing")]
    if ruled and target is not None and target.quantized_format != "native":
        config, ruled = with_top_k(model, config, _same_top_k(descriptions)), []
    if dense and uniform and not matrices and not ruled and isinstance(said, list):
        return config, "hf"
    if ruled and quantized != "native":
        raise RunError(f"layers {ruled} have rules that skip experts, which can't be written as {quantized}")
    if quantized != "native" and isinstance(said, str):
        raise RunError(f"config.json can't say how wide the experts are, which {quantized} needs: {said}")
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
        "format_version": format_version(blocks, matrices, isinstance(said, str)),
        "stack": model.stack,
        "axes": kinds,
        "blocks": blocks,
        **({"matrices": dict(sorted(matrices.items()))} if matrices else {}),
    }
    config["experts_implementation"] = hf.IMPLEMENTATION  # without the package: an error, not experts at random
    return config, "native"


def _same_top_k(descriptions: Mapping[int, dict[str, Any]]) -> int:
    """The top-k that every layer's rules leave, which may be several. Raises RunError for any other rules."""
    counts = set()
    for description in descriptions.values():
        rules = description.get("routing", [])
        counts.add(min((rule["keep"] if rule["kind"] == "top_k" else 0 for rule in rules), default=0))
    if len(counts) != 1 or 0 in counts:
        raise RunError("rules that skip experts can be written for other runtimes only where all layers have one top-k")
    return int(counts.pop())


def _width(description: Mapping[str, Any], in_config: int) -> int | None:
    """Neurons of each expert of a block; None where they differ."""
    if description["kind"] == "fused":
        return int(description.get("neurons", in_config))
    projections = description["layout"]["projections"]
    return int(projections["down"]["in_features"]) if isinstance(projections, dict) else None


def format_version(blocks: Mapping[str, dict[str, Any]], matrices: Mapping[str, Any], other_width: bool) -> int:
    """The first version of the native format that knows all of this: what older readers know stays theirs to read."""
    newest = other_width or any(_in_version_3(block) for block in blocks.values())
    return 3 if newest else 2 if matrices else 1


def _in_version_3(block: Mapping[str, Any]) -> bool:
    """Whether a block has what readers of older versions don't know."""
    layout = block.get("layout", {})
    projections = layout.get("projections", {})
    low_rank = isinstance(projections, dict) and any("low_rank" in p for p in projections.values())
    return low_rank or "input_rotation" in layout or "routing" in block or block["kind"] == "factored"


def _block(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer's description says of its block to who reads the file; nothing where it has none."""
    return {k: v for k, v in description.items() if k not in ("matrices", "beside")}


def on_disk(
    model: MoEModel, index: int, tensors: dict[str, Tensor], description: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A changed layer's tensors by full name: what is packed as it runs, everything else as the file will have it."""
    assert model.weights is not None
    prefix = model.prefix(index)
    experts = ""
    if "experts" in description:
        path = description["experts"]
        experts = rule_prefix(path) if description["kind"] == "fused" else f"{path}."
    matrices = description.get("matrices") or {}
    stacks = {
        prefix + n: t for n, t in tensors.items() if (experts and n.startswith(experts)) or _of_matrix(n, matrices)
    }
    dense = {prefix + n: t for n, t in tensors.items() if prefix + n not in stacks}
    return stacks, model.weights.names.to_disk(dense) if dense else {}


def _of_matrix(name: str, matrices: Mapping[str, Any]) -> bool:
    """Whether a tensor (relative to its layer) is part of a packed matrix beside the experts."""
    return name.startswith(tuple(f"{path}." for path in matrices)) and not is_bias(name)


def _packed_names(model: MoEModel, index: int, description: Mapping[str, Any]) -> set[str]:
    """Full names of a layer's tensors that are stored as they run, OUTER for those outside the layers."""
    prefix = model.prefix(index)
    root = model.module if index == OUTER else model.layers[index]
    matrices = description.get("matrices") or {}
    names = {prefix + n for n in root.state_dict() if _of_matrix(n, matrices)} if matrices else set()
    if index in model.moe_layers:
        block = model.block(index)
        stored = block.rule_prefix if block.kind == "fused" else block.path + "."
        names |= {prefix + n for n in block.own_names() if n.startswith(stored)}
    return names
