"""SparseGPT for all experts of a layer at once: zeros chosen column by column, those behind making up for them.

Contract: pure, float32 inside. The result has exactly the pattern's zeros in every row, and `error_E <= masked_error_E`
always: a row for which plain masking by |W|·√H_jj (Wanda's mask) leaves less error is that.

The triangular form (quant/triangular.py): a zero in column j costs R_jj² t_j², t_j what the weight is by then, and
leaves Δ_j = w_j to the columns behind; a weight that stays takes the value t_j, which costs nothing. R_jj² is the
reciprocal of the squared diagonal of the Cholesky factor of H⁻¹ that Frantar & Alistarh 2023 (arXiv 2301.00774,
algorithm 1) divide by. Where zeros go is decided for some columns at a time, when the first of them comes: for a run
(N:M), or for `block` columns, of which every row gets its share.

Shape letters: E experts, O output features, K input features, B and b columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.errors import InputError
from moe_compress.quant.rtn import output_error
from moe_compress.quant.triangular import feedback, normalised, targets

from .masks import Pattern, lowest

INNER = 16  # columns between two small matrix products inside a block


@dataclass(frozen=True)
class SparseResult:
    """What became of E experts.

    Attributes:
        weight_EOK: float32, zeros included.
        damping_E: what was added to the Hessian's diagonal, relative to its mean.
        error_E, masked_error_E: tr(Δ H Δᵀ), float64, in units of H, of this result and of Wanda's mask.
        masked_rows_E: how many of the O rows are Wanda's.
    """

    weight_EOK: Tensor
    damping_E: Tensor
    error_E: Tensor
    masked_error_E: Tensor
    masked_rows_E: Tensor


def sparsegpt(
    weight_EOK: Tensor,
    hessian_EKK: Tensor,
    pattern: Pattern,
    *,
    block: int = 128,
    damping: float = 0.01,
    memory_limit: int = 2 << 30,
) -> SparseResult:
    """Zeros in `weight_EOK` by `pattern`, so that the outputs on the calibration tokens change least.

    Args:
        weight_EOK: weights; those that read the same may be stacked along O.
        hessian_EKK: Σ_t x_t x_tᵀ of every expert's own tokens, at any scale. All zeros: the largest weights stay.
        pattern: how many zeros, and where.
        block: columns whose zeros are chosen together where the pattern has no runs.
        damping: times the mean diagonal, added to the diagonal, and ten times more until the factorisation succeeds.
        memory_limit: bytes of workspace; it sets how many experts (at least one) are done at a time.

    Raises InputError for shapes that don't fit the pattern, RunError for a Hessian that isn't positive semidefinite.
    """
    experts, rows, columns = weight_EOK.shape
    if hessian_EKK.shape != (experts, columns, columns):
        raise InputError(f"hessian has shape {list(hessian_EKK.shape)}, not {[experts, columns, columns]}")
    if columns % (pattern.run or 1):
        raise InputError(f"rows of {columns} weights don't divide into runs of {pattern.run}")
    block = max(1, block // (pattern.run or 1)) * (pattern.run or 1)
    at_once = max(1, memory_limit // (4 * (4 * columns * columns + 6 * rows * columns)))
    parts = []
    for first in range(0, experts, at_once):
        part = slice(first, first + at_once)
        parts.append(_some(weight_EOK[part].float(), hessian_EKK[part], first, pattern, block, damping))
    return SparseResult(*(torch.cat(values) for values in zip(*(vars(p).values() for p in parts), strict=True)))


def _some(
    weight_EOK: Tensor, hessian_EKK: Tensor, first_expert: int, pattern: Pattern, block: int, damping: float
) -> SparseResult:
    """`sparsegpt` of a few experts, the first of which is number `first_expert`."""
    hessian_EKK, unit_E = normalised(hessian_EKK, first_expert)
    diagonal_EK = hessian_EKK.diagonal(dim1=1, dim2=2)
    order_EK = torch.arange(weight_EOK.shape[2], device=weight_EOK.device).expand(diagonal_EK.shape)
    feedback_EKK, conditional_EK, damping_E = feedback(hessian_EKK, order_EK, damping, first_expert)
    importance_EK = diagonal_EK + damping_E[:, None]
    masked_EOK = weight_EOK.masked_fill(pattern.mask(weight_EOK.square() * importance_EK[:, None]), 0)
    masked_error_EO = output_error(masked_EOK - weight_EOK, hessian_EKK)
    found_EOK = _columns(weight_EOK, feedback_EKK, conditional_EK, pattern, block)
    error_EO = output_error(found_EOK - weight_EOK, hessian_EKK)
    masked_EO = ~(error_EO <= masked_error_EO)
    return SparseResult(
        torch.where(masked_EO[..., None], masked_EOK, found_EOK),
        damping_E,
        torch.where(masked_EO, masked_error_EO, error_EO).sum(1) * unit_E,
        masked_error_EO.sum(1) * unit_E,
        masked_EO.sum(1),
    )


def _columns(weight_EOK: Tensor, feedback_EKK: Tensor, conditional_EK: Tensor, pattern: Pattern, block: int) -> Tensor:
    """One pass over the columns."""
    columns = weight_EOK.shape[2]
    # Columns as rows: whatever the loop reads and writes is contiguous. A column that is done holds Δ instead of w.
    delta_EKO = weight_EOK.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    zeros_EKO = torch.empty_like(delta_EKO, dtype=torch.bool)
    span = pattern.run or block
    inner_size = INNER if pattern.run is None else max(1, INNER // span) * span
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        target_EBO = targets(delta_EKO, feedback_EKK, start, stop)
        for inner in range(start, stop, inner_size):
            inner_stop = min(inner + inner_size, stop)
            for column in range(inner, inner_stop):
                if (column - start) % span == 0:
                    chosen = slice(column, min(column + span, stop))
                    zeros_EKO[:, chosen] = _zeros(
                        delta_EKO[:, chosen],
                        target_EBO[:, chosen.start - start : chosen.stop - start],
                        feedback_EKK[:, chosen, chosen],
                        conditional_EK[:, chosen],
                        pattern.zeros(columns) * chosen.stop // columns - pattern.zeros(columns) * column // columns
                        if pattern.run is None
                        else pattern.zeros(span),
                    )
                stays_EO = ~zeros_EKO[:, column]
                delta_EO = delta_EKO[:, column].sub_(target_EBO[:, column - start] * stays_EO)
                rest_EbO = target_EBO[:, column + 1 - start : inner_stop - start]
                rest_EbO.addcmul_(feedback_EKK[:, column + 1 : inner_stop, column, None], delta_EO[:, None])
            if inner_stop < stop:
                feedback_EBb = feedback_EKK[:, inner_stop:stop, inner:inner_stop]
                target_EBO[:, inner_stop - start :].baddbmm_(feedback_EBb, delta_EKO[:, inner:inner_stop])
    found_EKO = weight_EOK.transpose(1, 2) - delta_EKO
    return found_EKO.masked_fill_(zeros_EKO, 0).transpose(1, 2).contiguous()


def _zeros(weight_EbO: Tensor, target_EbO: Tensor, within_Ebb: Tensor, conditional_Eb: Tensor, count: int) -> Tensor:
    """The `count` of some columns whose zeros cost a row least, [E, b, O], before any of them is done.

    What the weights of these columns are by then, if the columns cost nothing themselves: see `expected_targets`.
    """
    change_EbO = target_EbO - weight_EbO
    left_EbO: Tensor = torch.linalg.solve_triangular(within_Ebb, change_EbO, upper=False, unitriangular=True)
    cost_EbO = (left_EbO + weight_EbO).square() * conditional_Eb[..., None]
    return lowest(cost_EbO.transpose(1, 2), count).transpose(1, 2)
