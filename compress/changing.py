"""Putting what a pass made of matrices beside the experts into the model, layer by layer and outside the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_compress.model import Layer, MoEModel, beside
from moe_compress.model.beside import OUTER, Matrix
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass


def change_linears(
    model: MoEModel, step: Pass, layer: Layer, decision: dict[str, Any], moments: Mapping[str, Tensor] | None
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
    return {path: _entry(step, path, change, tensors) for path, change in changed.items()}


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


def after(shape: ModelShape, reports: Mapping[int, dict[str, Any]]) -> ModelShape:
    """Sizes with what `reports` (decoder layer or OUTER → report) say was packed beside the experts."""
    packed: dict[int, list[Matrix]] = {}
    for index, report in reports.items():
        done = report.get("beside") or {}
        if done:
            packed[index] = [
                replace(m, bytes=done[m.path]["bytes"], bits=done[m.path]["bits"]) if m.path in done else m
                for m in shape.matrices[index]
            ]
    return shape.with_matrices(packed)


def _entry(step: Pass, path: str, change: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    size = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.startswith(f"{path}."))
    return {"bits": change.bits, "bytes": size + step.target.matrix_bytes, **change.report}
