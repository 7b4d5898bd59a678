"""Zeros in the matrices of one layer's experts, a chunk of experts at a time.

Contract: `sparsify` changes one block's weights in place and says of every expert how many of its weights are zero
afterwards. Gate and up share the moments of what both read. Down projections are judged by what they will read: the
activations of the gate and up that are there by then.

Letters: E experts, C experts of a chunk, H hidden, I neurons, K input features of a projection, R rows by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.errors import InputError
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock
from moe_compress.quant.compensation import compensated
from moe_compress.quant.gptq import shrink_hessians, shrinkage_of
from moe_compress.quant.layer_rows import LayerRows, Rows, Weighing

from .masks import Pattern, WeightCriterion
from .sparsegpt import sparsegpt

# Dense weights (float32), their order and a solver's workspace, made at a time.
CHUNK_BYTES = 512 << 20


class SparseOptions(Protocol):
    """What the solver asks of a pass's options (see weights.py)."""

    @property
    def hessian(self) -> Weighing:
        """What a row counts for."""

    @property
    def damping(self) -> float:
        """Added to a Hessian's diagonal."""

    @property
    def shrinkage(self) -> float | None:
        """Tokens that the layer's mean counts for."""

    @property
    def compensate(self) -> bool:
        """Whether down projections make up for gate and up."""


def sparsify(
    block: MoEBlock,
    projections: Sequence[str],
    pattern: Pattern,
    criterion: WeightCriterion,
    options: SparseOptions,
    inputs: BlockInputs | None,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Put zeros into the named projections of a block's experts.

    Returns for every expert the share of `zeros` that its matrices have now, by projection, and what the solver says.
    Raises InputError where the criterion reads what the experts read and that isn't there.
    """
    experts = FusedExperts(block.experts_module)
    report: list[dict[str, Any]] = [{} for _ in range(experts.num_experts)]
    if criterion.reads is None:
        _blind(experts, projections, pattern, criterion, generator)
    elif inputs is None:
        raise InputError(f"{criterion.name} needs what the experts read")
    else:
        weighing = options.hessian if criterion.solves else criterion.reads
        layer = LayerRows(experts, inputs, weighing)
        means = layer.means()
        for rows in layer.parts(CHUNK_BYTES):
            own = experts.weights().part(rows.experts)
            if criterion.solves:
                found = _solved(experts, own, projections, rows, means, pattern, options)
            else:
                found = _masked(experts, own, projections, rows, means, pattern, criterion, generator)
            for place, expert in enumerate(rows.experts):
                report[expert] = {name: value(place) for name, value in found.items()}
    for name, weight_EOK in experts.weights().matrices():
        size = weight_EOK[0].numel()
        for expert, count in enumerate((weight_EOK == 0).flatten(1).sum(1).tolist()):
            report[expert].setdefault("zeros", {})[name] = count / size
    return report


def _blind(
    experts: FusedExperts,
    projections: Sequence[str],
    pattern: Pattern,
    criterion: WeightCriterion,
    generator: torch.Generator,
) -> None:
    weights = experts.weights()
    sizes = [24 * weights.parameters // experts.num_experts] * experts.num_experts
    for chunk in chunks(sizes, CHUNK_BYTES):
        for name, value in weights.part(chunk).matrices():
            if name in projections:
                value.masked_fill_(pattern.mask(criterion.score(value, None, generator)), 0)


def _masked(
    experts: FusedExperts,
    own: ExpertWeights,
    projections: Sequence[str],
    rows: Rows,
    means: tuple[Tensor, Tensor],
    pattern: Pattern,
    criterion: WeightCriterion,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Zeros where a score is lowest. An expert that no row reached has the layer's mean squares."""
    for names, read_RK, mean_KK in (
        (_inward(own), lambda: rows.input_RH, means[0]),
        (["down"], lambda: experts.activations_with(own, rows.input_RH, rows.dispatch), means[1]),
    ):
        if not set(names) & set(projections):
            continue
        squares_CK = rows.squares(read_RK())
        unseen_C = (rows.evidence_C == 0).to(squares_CK.device)
        squares_CK = torch.where(unseen_C[:, None], mean_KK.diagonal().to(squares_CK), squares_CK)
        for name in names:
            if name in projections:
                value = getattr(own, name)
                value.masked_fill_(pattern.mask(criterion.score(value, squares_CK, generator)), 0)
    return {"tokens": lambda place: int(rows.seen_C[place])}


def _solved(
    experts: FusedExperts,
    own: ExpertWeights,
    projections: Sequence[str],
    rows: Rows,
    means: tuple[Tensor, Tensor],
    pattern: Pattern,
    options: SparseOptions,
) -> dict[str, Any]:
    """SparseGPT: gate and up as one matrix with more rows, then down, which makes up for what they lost if asked."""
    report: dict[str, Any] = {"tokens": lambda place: int(rows.seen_C[place])}
    inward = [name for name in _inward(own) if name in projections]
    compensate = options.compensate and bool(inward) and "down" in projections
    exact_RI = experts.activations_with(own, rows.input_RH, rows.dispatch) if compensate else None
    if inward:
        hessian_CHH = shrink_hessians(rows.moment(rows.input_RH), rows.evidence_C, options.shrinkage, mean_KK=means[0])
        _put(own, inward, hessian_CHH, pattern, options, report)
        del hessian_CHH
    if "down" in projections:
        read_RI = experts.activations_with(own, rows.input_RH, rows.dispatch)
        hessian_CII = shrink_hessians(rows.moment(read_RI), rows.evidence_C, options.shrinkage, mean_KK=means[1])
        if exact_RI is not None:
            # Over the same number of tokens as the shrunk Hessian.
            cross_CII = rows.moment(exact_RI - read_RI, read_RI)
            counted_C = rows.evidence_C + shrinkage_of(options.shrinkage, cross_CII.shape[-1])
            cross_CII /= counted_C.clamp_min(1e-9).to(cross_CII)[:, None, None]
            own.down.copy_(compensated(own.down, hessian_CII, cross_CII, options.damping))
        _put(own, ["down"], hessian_CII, pattern, options, report)
    return report


def _put(
    own: ExpertWeights,
    names: Sequence[str],
    hessian_CKK: Tensor,
    pattern: Pattern,
    options: SparseOptions,
    report: dict[str, Any],
) -> None:
    stacked = torch.cat([getattr(own, name) for name in names], dim=1)
    solved = sparsegpt(stacked, hessian_CKK, pattern, damping=options.damping)
    for name, value in zip(names, solved.weight_EOK.chunk(len(names), dim=1), strict=True):
        getattr(own, name).copy_(value)
    what = "_".join(names)
    for key, values in (
        ("error", solved.error_E),
        ("masked_error", solved.masked_error_E),
        ("damping", solved.damping_E),
        ("masked_rows", solved.masked_rows_E),
    ):
        report[f"{what}_{key}"] = values.tolist().__getitem__


def _inward(own: ExpertWeights) -> list[str]:
    return [name for name, _ in own.matrices() if name != "down"]
