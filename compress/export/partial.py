"""Loading a checkpoint with some of its experts only: bytes of the others are never read.

Experts that are stored one by one are read by name; where those of a layer are stored together, the rows of those that
stay. Router rows, correction biases and whatever else counts experts are reduced in the same way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from moe_compress.checkpoint.atomic import write_json
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.expert_names import numbered

from .loader import from_tensors
from .write import result_config


def load_experts(view: MoEModel, keep: Mapping[int, list[int]], **options: Any) -> PreTrainedModel:
    """The model of a folder with these experts.

    Args:
        view: opened from the folder. Its blocks have the reduced number of experts afterwards: it can't be used on.
        keep: decoder layer → experts that stay, ascending; every layer with experts.
        options: for `from_pretrained`.

    Raises UnsupportedModelError for packed experts, hash routing, routers that score more experts than there are, and
    folders whose experts can't be told apart.
    """
    assert view.weights is not None
    source, names = view.source, view.weights.names
    state: dict[str, Tensor] = {}
    left_out = set(view.weights.unowned)
    for index, kept in keep.items():
        if (scored := view.block(index).router_experts) != (count := view.block(index).num_experts):
            raise UnsupportedModelError(
                f"{source.folder}: the router of layer {index} scores {scored} experts, which a rule maps to {count}: "
                "experts can't be left out of it"
            )
        stored, renamed = _stored_by_expert(view, index, kept)
        left_out |= stored.keys()
        state |= {renamed[n]: source.get(n) for n in renamed}
        extras, together = view.axes(index).tensors, _stored_together(view, index)
        for name, runtime in view.weights.layer_names(index).items():
            if name in stored or runtime not in extras:
                continue
            if name in names.converted and name not in together:
                raise UnsupportedModelError(
                    f"{source.folder} stores {name!r} in another layout than the model computes with, in which the "
                    "experts can't be told apart: prune the checkpoint for the domain instead (prune.experts, domains)"
                )
            dim, extra = (together[name], 0) if name in names.converted else extras[runtime]
            count = source.tensors[name].shape[dim] - extra
            state[name] = _rows(source, name, dim, [*kept, *range(count, count + extra)])
            left_out.add(name)
    state |= {name: source.get(name) for name in source.tensors if name not in left_out}
    for index, kept in keep.items():
        view.block(index).restructure({"kind": "fused", "num_experts": len(kept)})
    values, _ = result_config(view, view.descriptions())
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", values)
        config = AutoConfig.from_pretrained(folder)
    return from_tensors(config, state, source.folder, options)


def check_partial(view: MoEModel) -> None:
    """Raise UnsupportedModelError where experts can't be left out while loading."""
    for index in view.moe_layers:
        block = view.block(index)
        if block.kind != "fused":
            raise UnsupportedModelError(
                f"the experts of layer {index} are {block.kind}: a task's experts are chosen from a dense checkpoint"
            )
        if block.rules:
            kinds = ", ".join(rule.kind for rule in block.rules)
            raise UnsupportedModelError(
                f"layer {index} has routing rules ({kinds}): choose a task's experts before them"
            )
        if getattr(block.router, "tid2eid", None) is not None:
            raise UnsupportedModelError(
                f"layer {index} routes by a table of token ids: prune the checkpoint for the domain instead "
                "(prune.experts, domains)"
            )


def _stored_by_expert(view: MoEModel, index: int, kept: list[int]) -> tuple[dict[str, int], dict[str, str]]:
    """Disk names of a layer's experts that are stored one by one → expert; and of those that stay → the new name."""
    count = view.block(index).num_experts
    names = view.expert_names(index, count)
    if names is None:
        return {}, {}
    slots = {expert: slot for slot, expert in enumerate(kept)}
    stored = {f"{names.linear(e, p)}.weight": e for e in range(count) for p in names.leaves}
    return stored, {
        f"{names.linear(e, p)}.weight": f"{names.linear(slots[e], p)}.weight" for e in kept for p in names.leaves
    }


def _stored_together(view: MoEModel, index: int) -> dict[str, int]:
    """Disk names of tensors that hold a projection of all of a layer's experts in another layout → the experts' dim.

    Found like the names of single experts: small tensors, every expert's filled with numbers of its own, are sent
    through the checkpoint's conversion.
    """
    block = view.block(index)
    small = numbered(FusedExperts(block.experts_module), block.num_experts)
    prefix = f"{view.prefix(index)}{block.path}."
    try:
        there = view.to_disk({prefix + name: tensor for name, tensor in small.items()})
    except (RuntimeError, ValueError, KeyError, IndexError):
        return {}  # the conversion works on the whole tensor: blocks, tiles
    expert_E = torch.arange(block.num_experts)
    found = {}
    for name, tensor in there.items():
        for dim in range(tensor.dim()):
            of_E = tensor.movedim(dim, 0).flatten(1).div(3, rounding_mode="floor")
            if len(of_E) == len(expert_E) and bool((of_E == expert_E.unsqueeze(1)).all()):
                found[name] = dim
    return found


def _rows(source: Checkpoint, name: str, dim: int, indices: list[int]) -> Tensor:
    """Parts of a tensor along one dimension, run by run: what lies between isn't read."""
    lazy, runs = source.slice(name), []
    start = indices[0]
    for here, following in zip(indices, [*indices[1:], -1], strict=True):
        if following != here + 1:
            runs.append(lazy[(slice(None),) * dim + (slice(start, here + 1),)])
            start = following
    return torch.cat(runs, dim=dim)
