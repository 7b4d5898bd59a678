"""Reading `compressed-tensors` checkpoints whose experts are packed, by the format's own description.

The integers in the file are the ones that packed experts hold in memory, so nothing is computed: the experts' tensors
are presented stacked, and the model's blocks are described as packed. What the file holds is what runs, bit for bit.
transformers' own loader instead unpacks everything, and takes one scheme for all layers (docs/targets.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.stacked import StackedCheckpoint
from moe_compress.errors import CheckpointError, UnsupportedModelError
from moe_compress.model import MoEModel, hf
from moe_compress.model.expert_names import ExpertNames, find_expert_names

from .compressed_tensors import PACKING, ServerView

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def present(model: MoEModel, source: Checkpoint) -> tuple[Checkpoint, dict[int, dict[str, Any]]]:
    """A checkpoint as the native format would hold it.

    Args:
        model: its skeleton, with fused experts.
        source: the folder.

    Returns:
        The folder with its packed experts stacked, and decoder layer → description for `MoEBlock.restructure`.

    Raises:
        UnsupportedModelError: something else than experts is quantized, or in another way.
        CheckpointError: tensors and config don't belong together.
    """
    config = source.config["quantization_config"]
    if config.get("format") != PACKING:
        raise UnsupportedModelError(
            f"{source.folder} is already quantized (compressed-tensors, {config.get('format')}); start from the "
            "checkpoint in full precision"
        )
    packed = {n.removesuffix(".weight_packed") for n in source.tensors if n.endswith(".weight_packed")}
    parts = {f"{module}.{part}" for module in packed for part in _PARTS}
    view = ServerView(config)
    names = hf.NameMap(model.module, [n for n in source.tensors if n not in parts] + [f"{m}.weight" for m in packed])
    stacks: dict[str, list[str]] = {}
    descriptions = {}
    left = set(packed)
    for index in model.moe_layers:
        block = model.block(index)
        prefix = f"{model.stack}.{index}."
        found = find_expert_names(block, prefix, block.num_experts, names.to_disk)
        if found is None or found.linear(0, "down") not in packed:
            continue
        layout, own = _layer(source, view, found, block.num_experts, f"{prefix}{block.path}")
        stacks |= own
        left -= {found.linear(e, p) for e in range(block.num_experts) for p in found.leaves}
        descriptions[index] = {
            "kind": "packed",
            "num_experts": block.num_experts,
            "experts": block.path,
            "layout": layout,
        }
    if left:
        raise UnsupportedModelError(
            f"{source.folder} is already quantized ({min(left)!r} and more that isn't an expert); start from the "
            "checkpoint in full precision"
        )
    return StackedCheckpoint(source.folder, stacks, sorted(parts & source.tensors.keys())), descriptions


def uniform(config: Mapping[str, Any]) -> bool:
    """Whether all groups of a `quantization_config` have the same scheme: what transformers' own loader reads right."""
    groups = list(config["config_groups"].values())
    return all(group["weights"] == groups[0]["weights"] for group in groups)


def _layer(
    source: Checkpoint, view: ServerView, names: ExpertNames, count: int, experts: str
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A layer's layout, and name of the stack → names of its parts in the file."""
    module = names.linear(0, "down")
    scheme = view.scheme(module)
    if scheme is None:
        raise CheckpointError(f"{source.folder}: {module!r} is packed, and no group of its config has it")
    group_size = scheme.get("group_size") or -1
    if scheme.get("type") != "int" or not scheme.get("symmetric", True) or group_size < 1:
        raise UnsupportedModelError(
            f"{source.folder}: the experts of {names.experts!r} are not symmetric integers in groups; start from the "
            "checkpoint in full precision"
        )
    bits = int(scheme["num_bits"])
    encoding = f"b{bits}g{group_size}"
    stacks: dict[str, list[str]] = {}
    projections = {}
    dtype = ""
    for projection in names.leaves:
        modules = [names.linear(e, projection) for e in range(count)]
        for module in modules:
            _check(source, module)
            if view.scheme(module) != scheme:
                raise CheckpointError(f"{source.folder}: {module!r} has another scheme than the experts beside it")
        rows, columns = _shape(source, modules[0])
        for module in modules[1:]:
            if _shape(source, module) != (rows, columns):
                raise CheckpointError(f"{source.folder}: {module!r} has another shape than {modules[0]!r}")
        codes, scale = (source.tensors[f"{modules[0]}.{part}"] for part in _PARTS[:2])
        if codes.shape != (rows, columns * bits // 32) or scale.shape != (rows, columns // group_size):
            raise CheckpointError(
                f"{source.folder}: {modules[0]!r} is [{rows}, {columns}] at {bits} bits in groups of {group_size}, but "
                f"holds codes {list(codes.shape)} and scales {list(scale.shape)}"
            )
        dtype = str(scale.dtype).removeprefix("torch.")
        stack = f"{experts}.{projection}_proj.{encoding}"
        stacks[f"{stack}.codes"] = [f"{m}.weight_packed" for m in modules]
        stacks[f"{stack}.scale"] = [f"{m}.weight_scale" for m in modules]
        projections[projection] = {"out_features": rows, "in_features": columns, "experts": [encoding] * count}
    values = {"bits": bits, "dtype": dtype, "group_size": group_size, "symmetric": True}
    return {"encodings": {encoding: values}, "projections": projections, "biases": {}}, stacks


def _check(source: Checkpoint, module: str) -> None:
    for part in _PARTS[:3]:
        if f"{module}.{part}" not in source.tensors:
            raise CheckpointError(f"{source.folder} lacks {module}.{part}")
    for part in _PARTS[3:]:
        if f"{module}.{part}" in source.tensors:
            raise CheckpointError(f"{source.folder} holds {module}.{part}, which its config doesn't describe")
    if source.tensors[f"{module}.weight_packed"].dtype != torch.int32:
        raise CheckpointError(f"{source.folder}: {module}.weight_packed is not int32")


def _shape(source: Checkpoint, module: str) -> tuple[int, int]:
    rows, columns = source.get(f"{module}.weight_shape").tolist()
    return int(rows), int(columns)
