"""Reading `compressed-tensors` checkpoints whose experts, and linear layers beside them, are quantized.

The numbers in the file are the ones that quantized experts hold in memory, so nothing is computed: the experts' tensors
are presented stacked, packed linear layers as stacks of one, and both are described as packed or scaled. What the file
holds is what runs, bit for bit. transformers' own loader instead unpacks everything, and takes one scheme for all
layers (docs/targets.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.stacked import StackedCheckpoint
from moe_compress.errors import CheckpointError, UnsupportedModelError
from moe_compress.model import MoEModel, hf
from moe_compress.model.expert_names import ExpertNames, find_expert_names
from moe_compress.quant.sources import OF_ACTIVATIONS
from moe_compress.quant.stack import Encoding, name_of

from .matching import ServerView
from .schemes import FLOATS, INTEGERS, MIXED, PACKED, Scheme

_PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_SCALED_PARTS = ("weight", "weight_scale")
_UNREAD = ("weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale", "input_global_scale")
_ALREADY = "start from the checkpoint in full precision"


@dataclass
class Presented:
    """A layer of a foreign format as the native one would hold it.

    Attributes:
        kind, layout: of its experts.
        stacks: name of a stack, relative to the experts → names of its parts in the file.
        turned: stacks that are transposed in the file.
    """

    kind: str
    layout: dict[str, Any]
    stacks: dict[str, list[str]]
    turned: list[str] = field(default_factory=list)


# The folder presented anew; decoder layer → description for `MoEBlock.restructure`; module path → description for
# `beside.restructure`.
Seen = tuple[Checkpoint, dict[int, dict[str, Any]], dict[str, dict[str, Any]]]


def present(model: MoEModel, source: Checkpoint) -> Seen:
    """A checkpoint as the native format would hold it.

    Args:
        model: its skeleton, with fused experts.
        source: the folder.

    Returns:
        See `Seen`.

    Raises:
        UnsupportedModelError: something else than experts and linear layers is quantized, or in another way.
        CheckpointError: tensors and config don't belong together.
    """
    config = source.quantization
    if config.get("format") not in (PACKED, INTEGERS, FLOATS, MIXED):
        raise UnsupportedModelError(
            f"{source.folder} is already quantized (compressed-tensors, {config.get('format')}); {_ALREADY}"
        )
    modules = {n.rpartition(".")[0] for n in source.tensors if n.endswith((".weight_packed", ".weight_scale"))}
    parts = {f"{module}.{part}" for module in modules for part in (*_PACKED_PARTS, *_SCALED_PARTS, *_UNREAD)}
    parts |= {n for n in source.tensors if n.rpartition(".")[2] in OF_ACTIVATIONS}
    view = ServerView(config)

    def read(names: ExpertNames, count: int) -> Presented:
        return _layer(source, view, names, count)

    def linear(module: str, runtime: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
        return _linear(source, view, module, runtime)

    return present_experts(model, source, modules, parts, read, linear)


def present_experts(
    model: MoEModel,
    source: Checkpoint,
    modules: set[str],
    parts: set[str],
    read: Callable[[ExpertNames, int], Presented],
    linear: Callable[[str, str], tuple[dict[str, Any], dict[str, list[str]]]] | None = None,
) -> Seen:
    """What `present` returns, for any format that stores experts one by one.

    Args:
        model: skeleton, with fused experts.
        source: the folder.
        modules: paths of all modules that are quantized in it.
        parts: names that their tensors may have.
        read: names of a layer's experts and their number → the layer.
        linear: path of another linear layer in the folder, and in the model → its encoding, and name of a stack → names
            of its parts; None where the format's other modules are not read.
    """
    names = hf.NameMap(model.module, [n for n in source.tensors if n not in parts] + [f"{m}.weight" for m in modules])
    stacks: dict[str, list[str]] = {}
    turned: list[str] = []
    descriptions = {}
    left = set(modules)
    for index in model.moe_layers:
        block = model.block(index)
        prefix = f"{model.stack}.{index}."
        found = find_expert_names(block, prefix, block.num_experts, names.to_disk)
        if found is None or found.linear(0, "down") not in modules:
            continue
        layer = read(found, block.num_experts)
        inside = f"{prefix}{block.path}."
        stacks |= {inside + name: members for name, members in layer.stacks.items()}
        turned += [inside + name for name in layer.turned]
        left -= {found.linear(e, p) for e in range(block.num_experts) for p in found.leaves}
        descriptions[index] = {
            "kind": layer.kind,
            "num_experts": block.num_experts,
            "experts": block.path,
            "layout": layer.layout,
        }
    matrices = {}
    for module in sorted(left):
        runtime = names.runtime[f"{module}.weight"].removesuffix(".weight")
        if linear is None or not _is_linear(model, runtime):
            raise UnsupportedModelError(
                f"{source.folder} is already quantized ({module!r} and more that isn't an expert); {_ALREADY}"
            )
        matrices[runtime], own = linear(module, runtime)
        stacks |= own
    seen = StackedCheckpoint(source.folder, stacks, sorted(parts & source.tensors.keys()), turned)
    return seen, descriptions, matrices


def uniform(config: Mapping[str, Any]) -> bool:
    """Whether transformers' own loader reads a `quantization_config` right.

    It takes the scheme of the first group that names experts for all of them, and where it converts other matrices,
    that of the first group that names none.
    """
    schemes: dict[bool, list[Any]] = {True: [], False: []}
    for group in config["config_groups"].values():
        for target in group["targets"]:
            schemes["experts" in target].append(group["weights"])
    return all(weights == own[0] for own in schemes.values() for weights in own)


def _layer(source: Checkpoint, view: ServerView, names: ExpertNames, count: int) -> Presented:
    first = names.linear(0, "down")
    group = view.group(first)
    if group is None:
        raise CheckpointError(f"{source.folder}: {first!r} is quantized, and no group of its config has it")
    scheme = Scheme.of_group(group)
    if scheme is None:
        raise UnsupportedModelError(
            f"{source.folder}: the experts of {names.experts!r} are in no scheme that is known here (symmetric "
            f"integers in groups, FP8, W8A8, W4A8); {_ALREADY}"
        )
    packed = scheme.name == "wna16"
    stacks: dict[str, list[str]] = {}
    projections: dict[str, Any] = {}
    dtypes = set()
    encoding = Encoding(scheme.bits, scheme.group_size).name
    for projection in names.leaves:
        modules = [names.linear(e, projection) for e in range(count)]
        for module in modules:
            if view.group(module) != group:
                raise UnsupportedModelError(
                    f"{source.folder}: {module!r} isn't quantized like {first!r} in the same layer; {_ALREADY}"
                )
            check_parts(source, module, _PACKED_PARTS if packed else _SCALED_PARTS, _UNREAD)
        rows, columns = same_shape(source, modules, lambda m: _shape(source, m, packed))
        codes, scale = (source.tensors[f"{modules[0]}.{p}"] for p in (_PACKED_PARTS if packed else _SCALED_PARTS)[:2])
        width = columns * scheme.bits // 32 if packed else columns
        tiled = scheme.misfit(rows, columns) is None
        if not tiled or codes.shape != (rows, width) or scale.shape != scheme.scale_shape(rows, columns):
            raise CheckpointError(
                f"{source.folder}: {modules[0]!r} is [{rows}, {columns}] in the scheme {scheme.to_json()}, but holds "
                f"codes {list(codes.shape)} and scales {list(scale.shape)}"
            )
        if codes.dtype != (torch.int32 if packed else scheme.code):
            raise CheckpointError(f"{source.folder}: the codes of {modules[0]!r} are {codes.dtype}")
        dtypes.add(name_of(scale.dtype))
        stack = f"{projection}_proj.{encoding}" if packed else f"{projection}_proj"
        stacks[f"{stack}.codes"] = [f"{m}.{'weight_packed' if packed else 'weight'}" for m in modules]
        stacks[f"{stack}.scale"] = [f"{m}.weight_scale" for m in modules]
        projections[projection] = {"out_features": rows, "in_features": columns}
    if len(dtypes) > 1:
        raise CheckpointError(f"{source.folder}: scales of {names.experts!r} have different dtypes: {sorted(dtypes)}")
    if not packed:
        layout = {"scheme": scheme.to_json(), "scale_dtype": dtypes.pop(), "num_experts": count}
        return Presented("scaled", {**layout, "projections": projections, "biases": {}}, stacks)
    return Presented("packed", packed_layout(scheme, dtypes.pop(), projections, count), stacks)


def _is_linear(model: MoEModel, path: str) -> bool:
    try:
        return type(model.module.get_submodule(path)) is nn.Linear
    except AttributeError:
        return False


def _linear(
    source: Checkpoint, view: ServerView, module: str, runtime: str
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A packed linear layer's encoding, and name of the stack of one → names of its parts in the file."""
    group = view.group(module)
    scheme = None if group is None else Scheme.of_group(group)
    if scheme is None or scheme.name != "wna16":
        raise UnsupportedModelError(
            f"{source.folder} is already quantized ({module!r} isn't packed integers in groups); {_ALREADY}"
        )
    check_parts(source, module, _PACKED_PARTS, _UNREAD)
    rows, columns = _shape(source, module, True)
    codes, scale = (source.tensors[f"{module}.{part}"] for part in _PACKED_PARTS[:2])
    fits = scheme.misfit(rows, columns) is None and codes.shape == (rows, columns * scheme.bits // 32)
    if not fits or scale.shape != scheme.scale_shape(rows, columns) or codes.dtype != torch.int32:
        raise CheckpointError(
            f"{source.folder}: {module!r} is [{rows}, {columns}] in the scheme {scheme.to_json()}, but holds codes "
            f"{list(codes.shape)} and scales {list(scale.shape)}"
        )
    encoding = Encoding(scheme.bits, scheme.group_size, dtype=name_of(scale.dtype))
    stack = f"{runtime}.{encoding.name}"
    return encoding.to_json(), {
        f"{stack}.codes": [f"{module}.weight_packed"],
        f"{stack}.scale": [f"{module}.weight_scale"],
    }


def packed_layout(scheme: Scheme, dtype: str, projections: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The layout of packed experts that all have one encoding; `projections` → out_features and in_features."""
    encoding = Encoding(scheme.bits, scheme.group_size, dtype=dtype)
    entries = {name: {**entry, "experts": [encoding.name] * count} for name, entry in projections.items()}
    return {"encodings": {encoding.name: encoding.to_json()}, "projections": entries, "biases": {}}


def same_shape(source: Checkpoint, modules: Sequence[str], shape: Callable[[str], tuple[int, int]]) -> tuple[int, int]:
    """The shape that all modules have. Raises CheckpointError where one differs."""
    first = shape(modules[0])
    for module in modules[1:]:
        if shape(module) != first:
            raise CheckpointError(f"{source.folder}: {module!r} has another shape than {modules[0]!r}")
    return first


def check_parts(source: Checkpoint, module: str, needed: Sequence[str], unknown: Sequence[str]) -> None:
    """Raise CheckpointError when a module's tensors are not all there, UnsupportedModelError for `unknown` ones."""
    for part in needed:
        if f"{module}.{part}" not in source.tensors:
            raise CheckpointError(f"{source.folder} lacks {module}.{part}")
    for part in unknown:
        if f"{module}.{part}" in source.tensors:
            raise UnsupportedModelError(f"{source.folder} holds {module}.{part}, which its config doesn't describe")


def _shape(source: Checkpoint, module: str, packed: bool) -> tuple[int, int]:
    if packed:
        rows, columns = source.get(f"{module}.weight_shape").tolist()
    else:
        rows, columns = source.tensors[f"{module}.weight"].shape
    return int(rows), int(columns)
