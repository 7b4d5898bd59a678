"""Putting what a pass made of matrices beside the experts into the model, layer by layer and outside the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.linear_inputs import LinearMoments
from moe_compress.model import Layer, MoEModel, beside
from moe_compress.model.beside import OUTER
from moe_compress.passes import Pass


def change_linears(
    model: MoEModel, step: Pass, layer: Layer, decision: dict[str, Any], moments: LinearMoments | None
) -> dict[str, Any]:
    """Pack linear layers of a live decoder layer. Returns module path → what was done and why.

    Args:
        model: the model.
        step: the pass that decided.
        layer: within `MoEModel.editing`.
        decision: module path → decision.
        moments: see `Pass.apply_beside`.
    """
    modules: dict[str, Any] = {path: layer.module.get_submodule(path) for path in decision}
    changed = step.apply_beside({p: m.weight.detach() for p, m in modules.items()}, decision, moments)
    for path, change in changed.items():
        dtype = model.weights.dtype if model.weights is not None else modules[path].weight.dtype
        beside.replace(layer.module, path, change.module(modules[path], dtype))
    tensors, _ = beside.packed_state(layer.module, frozenset(changed))
    report = {path: _entry(step, path, change, tensors) for path, change in changed.items()}
    for path in moments.unweighed & report.keys() if moments is not None else ():
        report[path]["unweighed"] = True
    return report


def change_outer(
    model: MoEModel, step: Pass, decision: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Pack embeddings or head. Returns tensors and description (see Overlay), and what was done and why."""
    heads = {m.path: m.head for m in model.matrices[OUTER]}
    with model.outer_weights(decision) as weights:
        changed = step.apply_beside(weights, decision, None)
    for path, change in changed.items():
        before: Any = model.module.get_submodule(path)
        dtype = model.weights.dtype if model.weights is not None else before.weight.dtype
        model.put_outer(path, change.module(before, dtype), heads[path])
    tensors, matrices = beside.packed_state(model.module, frozenset(changed))
    report = {path: _entry(step, path, change, tensors) for path, change in changed.items()}
    return tensors, {"matrices": matrices}, report


def _entry(step: Pass, path: str, change: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    size = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.startswith(f"{path}."))
    return {"bits": change.bits, "bytes": size + step.target.matrix_bytes, **change.report}
