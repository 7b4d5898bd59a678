"""GPTQ for all experts of a layer at once: rounding column by column, each making up for the errors of those before it.

Contract: pure functions on tensors, float32 inside whatever the dtypes given. Nothing about an expert is decided
silently: the result says how much damping each Hessian took, what error is left, what round-to-nearest would have left,
and how many rows are round-to-nearest because that was better for them. So `error_E <= rtn_error_E`, always.

The feedback is computed in its triangular form. With H = R Rᵀ, R upper triangular, and Δ = W − Ŵ,

    tr(Δ H Δᵀ) = ‖Δ R‖² = Σ_j R_jj² ‖t_j − ŵ_j‖²,    t_j = w_j + Σ_{i<j} Δ_i R_ij / R_jj

so the greedy choice for column j is to round its target t_j. That gives the codes of GPTQ (Frantar et al. 2022, arXiv
2210.17323, algorithm 1), by its equivalence to LDLQ (Chee et al. 2023, arXiv 2307.13304, theorem 6), with one Cholesky
factor and without the inverse of H: less arithmetic, and stable where H is ill-conditioned.

By the same identity a group's scale should fit the targets, not the weights. In a static order the targets are known
only after a pass; so another pass starts from scales that were fitted to them. On the demo checkpoint (groups of 64,
means over its matrices) that takes 30 % off the error that plain GPTQ leaves at 2 bits, 15 % at 3, 10 % at 4, on tokens
that weren't used for calibration just the same.

Gate and up projections have the same input, hence the same Hessian: stack them along O and call once.

Shape letters: E experts, O output features, K input features, G groups along K, B and b columns of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_compress.errors import DataError, InputError
from moe_compress.quant.grid import Grid, Quantized, Search, dequantize, find_scales, level_of_ratio, level_range
from moe_compress.quant.polish import polish
from moe_compress.quant.rtn import output_error, round_to_nearest
from moe_compress.quant.side_by_side import side_by_side
from moe_compress.quant.triangular import MAX_DAMPING, expected_targets, feedback, normalised, targets

Order = Literal["static", "none"]
Refit = Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]
# Times K: how many tokens the layer's mean counts for in an expert's Hessian, unless asked for. On the demo checkpoint
# (benchmarks/shrinkage.py), squared error of blocks on held-out text, in percent, mean over layers, by κ:
#   calibration rows per expert, bits      0   K/16    K/4      K    4 K      ∞
#                         64,    3       4.49   3.32   2.87   2.74   2.83   2.90
#                         64,    2      18.47  15.68  14.51  13.03  13.69  14.03
#                        256,    3       1.90   1.45   1.25   1.14   1.18   1.56
#                        256,    2       7.03   5.61   4.94   4.61   4.82   6.31
#                       1024,    3       0.92   0.88   0.86   0.84   0.88   1.50
#                       1024,    2       3.78   3.63   3.51   3.44   3.63   6.02
SHRINKAGE = 1.0
ROUNDING = 1e-5  # relative: errors that differ by less, each a sum of float32 products, are the same
# Weights of the experts that a thread does together: with fewer, steps are so short that Python's part of them counts;
# with more, threads don't finish at the same time.
CHUNK_WEIGHTS = 1 << 22
INNER = 16  # columns between two small matrix products inside a block


@dataclass(frozen=True)
class GptqResult:
    """What became of E experts.

    `quantized`: codes [E, O, K] and scales in the weight's own column order, whatever order was taken to find them.
    `damping_E`: what was added to the Hessian's diagonal, relative to its mean.
    `error_E`, `rtn_error_E`: tr(Δ H Δᵀ), float64, in units of H, of this result and of `round_to_nearest` on the same
    grid with the damped diagonal of H as importance.
    `rtn_rows_E`: how many of the O rows are round-to-nearest, because that left less error.
    """

    quantized: Quantized
    damping_E: Tensor
    error_E: Tensor
    rtn_error_E: Tensor
    rtn_rows_E: Tensor


def gptq(
    weight_EOK: Tensor,
    hessian_EKK: Tensor,
    grid: Grid,
    *,
    block: int = 128,
    damping: float = 0.01,
    order: Order = "static",
    passes: int = 2,
    sweeps: int = 0,
    search: Search = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
    memory_limit: int = 2 << 30,
) -> GptqResult:
    """Quantize `weight_EOK` so that the outputs on the calibration tokens change least.

    `hessian_EKK`: Σ_t x_t x_tᵀ of every expert's own tokens, at any scale (normalised, say, or weighted by the gate).
    `order`: "static" takes the columns by decreasing diag(H), with scales that are fixed before the pass, in the
    original layout, so that groups stay runs of neighbours; "none" takes the columns as they are and finds a group's
    scales when it starts; that beat two static passes only on inputs correlated like a chain (AR(1)), not on real ones.
    `passes`: how often a static order is gone through. 1 is plain GPTQ; the others start from refitted scales, and a
    row keeps the best that it had. "none" makes one pass.
    `sweeps`: of coordinate descent over codes and scales afterwards (polish.py), on the damped Hessian. On the demo
    checkpoint one took 9 % off the squared error of held-out block outputs at 2 bits, four took 11 %.
    `damping`: times the mean diagonal, added to the diagonal, and ten times more until the factorisation succeeds.
    `memory_limit`: bytes of workspace; it sets how many experts (at least one) are done at a time. On a CPU they are
    done a few per thread, and the result is the same for any number of threads.
    Channels that no token excited are rounded to nearest, not zeroed; so is an expert that no token visited.
    Raises InputError for shapes and arguments that don't fit, RunError for values that aren't finite and for a Hessian
    that isn't positive semidefinite, naming the expert.
    """
    if weight_EOK.dim() != 3:
        raise InputError(f"gptq takes weights [experts, out, in], not {list(weight_EOK.shape)}")
    experts, rows, columns = weight_EOK.shape
    if hessian_EKK.shape != (experts, columns, columns):
        raise InputError(f"hessian has shape {list(hessian_EKK.shape)}, not {[experts, columns, columns]}")
    if order not in ("static", "none"):
        raise InputError(f"unknown order {order!r}; known: none, static")
    if block < 1 or passes < 1 or sweeps < 0 or not 0 <= damping <= MAX_DAMPING:
        given = f"block {block}, passes {passes}, sweeps {sweeps}, damping {damping:g}"
        raise InputError(
            f"{given}: block and passes are at least 1, sweeps at least 0, damping is from 0 to {MAX_DAMPING:g}"
        )
    grid.groups(columns)
    expert_bytes = 4 * (4 * columns * columns + 5 * rows * columns)
    at_once = max(1, memory_limit // expert_bytes)
    if weight_EOK.device.type == "cpu":
        at_once = min(at_once, max(1, CHUNK_WEIGHTS // (rows * columns)))
    passes = passes if order == "static" else 1
    settings = _Settings(grid, block, damping, order, passes, sweeps, search, scale_dtype)

    def solve(first: int) -> GptqResult:
        own = slice(first, first + at_once)
        return _gptq_chunk(weight_EOK[own], hessian_EKK[own], first, settings)

    most = memory_limit // (at_once * expert_bytes) if weight_EOK.device.type == "cpu" else 1
    parts = side_by_side(solve, range(0, experts, at_once), most)
    zeros = [part.quantized.zero for part in parts if part.quantized.zero is not None]
    codes_EOK = torch.cat([part.quantized.codes for part in parts])
    scale_EOG = torch.cat([part.quantized.scale for part in parts])
    return GptqResult(
        quantized=Quantized(codes_EOK, scale_EOG, torch.cat(zeros) if zeros else None, grid),
        damping_E=torch.cat([part.damping_E for part in parts]),
        error_E=torch.cat([part.error_E for part in parts]),
        rtn_error_E=torch.cat([part.rtn_error_E for part in parts]),
        rtn_rows_E=torch.cat([part.rtn_rows_E for part in parts]),
    )


def shrink_hessians(
    hessian_EKK: Tensor, tokens_E: Tensor, strength: float | None = None, mean_KK: Tensor | None = None
) -> Tensor:
    """Per-token Hessians [E, K, K], each drawn towards the layer's by how few tokens its expert saw.

    H_e = (n_e · mean_e + κ · mean_layer) / (n_e + κ), where `hessian_EKK` holds the sums n_e · mean_e, `tokens_E` the
    n_e, and mean_layer is Σ sums / Σ n, or `mean_KK` where only some of a layer's experts are given. κ is `strength`,
    in tokens: an expert with κ tokens is half its own. An expert without tokens is exactly the layer's.
    The default is SHRINKAGE · K, K tokens, measured on one small model.
    Raises InputError for shapes or counts that don't fit, DataError when no expert saw a token and no mean is given.
    """
    experts, columns = hessian_EKK.shape[0], hessian_EKK.shape[-1]
    strength = shrinkage_of(strength, columns)
    if tokens_E.shape != (experts,) or hessian_EKK.shape != (experts, columns, columns):
        raise InputError(f"hessians {list(hessian_EKK.shape)} don't fit token counts {list(tokens_E.shape)}")
    if mean_KK is not None and mean_KK.shape != (columns, columns):
        raise InputError(f"the layer's mean Hessian is {list(mean_KK.shape)}, not {[columns, columns]}")
    if strength < 0 or (tokens_E < 0).any():
        raise InputError("neither token counts nor the strength of the shrinking can be negative")
    total = tokens_E.sum(dtype=torch.float64)
    if total == 0 and mean_KK is None:
        raise DataError("no expert of this layer saw a token: there is nothing to calibrate with")
    if mean_KK is None:
        mean_KK = torch.zeros_like(hessian_EKK[0], dtype=torch.float64)
        for hessian_KK in hessian_EKK:
            mean_KK += hessian_KK
        mean_KK /= total
    denominator_E = tokens_E.double() + strength
    share_E = torch.where(denominator_E > 0, strength / denominator_E, 1.0).to(hessian_EKK.dtype)
    own_E = (1 / torch.where(denominator_E > 0, denominator_E, 1.0)).to(hessian_EKK.dtype)
    return (hessian_EKK * own_E[:, None, None]).addcmul_(mean_KK.to(hessian_EKK.dtype), share_E[:, None, None])


def foreseen_share(squares_EK: Tensor, hessian_EKK: Tensor, damping: float = 0.01) -> Tensor:
    """What share of round-to-nearest's error GPTQ is expected to leave, [E] float64 from 0 to 1; it isn't run.

    `squares_EK`: ‖δ_j‖² of every column's rounding error. GPTQ's error is Σ_j R_jj² ‖t_j − ŵ_j‖² (see above); if its
    targets round as well as the weights do, Σ_j R_jj² ‖δ_j‖². Round-to-nearest's, errors of different columns taken as
    independent, is Σ_j H_jj ‖δ_j‖². Both with the damping. On the demo checkpoint the rank correlation with the real
    share over all matrices and widths is 0.93. An expert with an all-zero Hessian has nothing to gain: 1.
    """
    hessian_EKK, _ = normalised(hessian_EKK, 0)
    diagonal_EK = hessian_EKK.diagonal(dim1=1, dim2=2)
    order_EK = diagonal_EK.argsort(dim=1, descending=True, stable=True)
    _, conditional_EK, damping_E = feedback(hessian_EKK, order_EK, damping, 0)
    alone_E = ((diagonal_EK + damping_E[:, None]).double() * squares_EK.double()).sum(1)
    share_E = (conditional_EK.double() * squares_EK.double()).sum(1) / alone_E
    return torch.where((diagonal_EK.sum(1) > 0) & (alone_E > 0), share_E, 1.0)


def conditional(hessian_EKK: Tensor, damping: float = 0.01) -> Tensor:
    """R_jj² of every column, [E, K] float32, in the order that GPTQ takes: what one rounding error there costs.

    Of the damped Hessian, divided by its mean diagonal.
    """
    hessian_EKK, _ = normalised(hessian_EKK, 0)
    order_EK = hessian_EKK.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    return feedback(hessian_EKK, order_EK, damping, 0)[1]


def shrinkage_of(strength: float | None, columns: int) -> float:
    """κ: how many tokens the layer's mean counts for."""
    return SHRINKAGE * columns if strength is None else strength


@dataclass(frozen=True)
class _Settings:
    """The arguments of `gptq` that are the same for all experts."""

    grid: Grid
    block: int
    damping: float
    order: Order
    passes: int
    sweeps: int
    search: Search
    scale_dtype: torch.dtype


def _gptq_chunk(weight_EOK: Tensor, hessian_EKK: Tensor, first_expert: int, settings: _Settings) -> GptqResult:
    """`gptq` of a few experts, the first of which is number `first_expert`."""
    grid, search, scale_dtype = settings.grid, settings.search, settings.scale_dtype
    hessian_EKK, unit_E = normalised(hessian_EKK, first_expert)
    diagonal_EK = hessian_EKK.diagonal(dim1=1, dim2=2)
    if settings.order == "static":
        order_EK = diagonal_EK.argsort(dim=1, descending=True, stable=True)
    else:
        order_EK = torch.arange(diagonal_EK.shape[1], device=weight_EOK.device).expand(diagonal_EK.shape)
    feedback_EKK, conditional_EK, damping_E = feedback(hessian_EKK, order_EK, settings.damping, first_expert)
    damped_EK = diagonal_EK + damping_E[:, None]
    best = round_to_nearest(weight_EOK, grid, importance=damped_EK, search=search, scale_dtype=scale_dtype)
    rtn_error_EO = output_error(dequantize(best).sub_(weight_EOK), hessian_EKK)
    # R_jj² is the weight of column j's rounding error in this order, H_jj what it would be without feedback. To fit the
    # targets, their geometric mean was best or close to it in all experiments: H_jj alone left up to 20 % more error.
    importance_EK = (damped_EK * conditional_EK).sqrt()

    def refit(part: Tensor, columns: slice) -> tuple[Tensor, Tensor | None]:
        group = replace(grid, group_size=-1)
        return find_scales(part, group, importance=importance_EK[:, columns], search=search, scale_dtype=scale_dtype)

    # By the identity above a pass leaves tr(Δ (H + λ) Δᵀ) = Σ R_jj² ‖t_j − ŵ_j‖²; without the damping λ, less λ ‖Δ‖².
    seen_EK = diagonal_EK > 0
    weighing_EK, damping_EK = conditional_EK * seen_EK, damping_E[:, None] * seen_EK
    error_EO, is_rtn_EO = rtn_error_EO, torch.ones_like(rtn_error_EO, dtype=torch.bool)
    scale_EOG, zero_EOG = best.scale, best.zero
    for index in range(settings.passes):
        in_order = refit if settings.order == "none" else None
        found, target_EOK = _columns(
            weight_EOK, feedback_EKK, order_EK, scale_EOG, zero_EOG, grid, settings.block, in_order
        )
        rounded_EOK = dequantize(found)
        found_error_EO = _weighed_squares(target_EOK, rounded_EOK, weighing_EK)
        found_error_EO = found_error_EO.sub_(_weighed_squares(weight_EOK, rounded_EOK, damping_EK)).clamp_min_(0)
        del rounded_EOK
        better_EO = found_error_EO < error_EO * (1 - ROUNDING)
        is_rtn_EO &= ~(found_error_EO <= rtn_error_EO * (1 + ROUNDING))
        best, error_EO = _choose(better_EO, found, best), torch.where(better_EO, found_error_EO, error_EO)
        if index + 1 < settings.passes:
            scale_EOG, zero_EOG = find_scales(
                target_EOK, grid, importance=importance_EK, search=search, scale_dtype=scale_dtype
            )
    if settings.sweeps:
        del feedback_EKK
        hessian_EKK.diagonal(dim1=1, dim2=2).add_(damping_E[:, None])
        found, change_EO, squares_EO = polish(weight_EOK, hessian_EKK, best, settings.sweeps)
        found_error_EO = (error_EO + change_EO - damping_E[:, None] * squares_EO).clamp_min_(0)
        better_EO = found_error_EO < error_EO * (1 - ROUNDING)
        is_rtn_EO &= ~better_EO
        best, error_EO = _choose(better_EO, found, best), torch.where(better_EO, found_error_EO, error_EO)
    return GptqResult(best, damping_E, error_EO.sum(1) * unit_E, rtn_error_EO.sum(1) * unit_E, is_rtn_EO.sum(1))


def _weighed_squares(value_EOK: Tensor, other_EOK: Tensor, weight_EK: Tensor) -> Tensor:
    """Σ_j weight_j (value_j − other_j)² of every row, [E, O] float64; one expert at a time, for the cache's sake."""
    rows = [
        (value_OK.float() - other_OK).square_() @ weight_K
        for value_OK, other_OK, weight_K in zip(value_EOK, other_EOK, weight_EK, strict=True)
    ]
    return torch.stack(rows).double()


def _columns(
    weight_EOK: Tensor,
    feedback_EKK: Tensor,
    order_EK: Tensor,
    scale_EOG: Tensor,
    zero_EOG: Tensor | None,
    grid: Grid,
    block: int,
    refit: Refit | None,
) -> tuple[Quantized, Tensor]:
    """One pass over the columns, and the targets [E, O, K] that were rounded, both in the original order.

    `refit` finds the scales of a group anew when it starts, which needs columns in their own order.
    """
    experts, _, columns = weight_EOK.shape
    size = columns // scale_EOG.shape[-1]
    expert_E = torch.arange(experts, device=weight_EOK.device)
    # Columns as rows: whatever the loop reads and writes is contiguous. A column that is done holds Δ instead of w.
    delta_EKO = weight_EOK.transpose(1, 2)[expert_E[:, None], order_EK].float()
    codes_EKO = torch.empty(delta_EKO.shape, dtype=torch.uint8, device=delta_EKO.device)
    rounded_EKO = torch.empty_like(delta_EKO)
    scale_EGO = scale_EOG.float().transpose(1, 2).contiguous()
    zero_EGO = None if zero_EOG is None else zero_EOG.float().transpose(1, 2).contiguous()
    group_EK = order_EK // size
    edges = sorted({*range(0, columns, block), *(range(0, columns, size) if refit else ()), columns})
    for start, stop in itertools.pairwise(edges):
        target_EBO = targets(delta_EKO, feedback_EKK, start, stop)
        if refit and start % size == 0:
            expected_EbO = expected_targets(delta_EKO, feedback_EKK, start, start + size)
            scale_EO1, zero_EO1 = refit(expected_EbO.transpose(1, 2), slice(start, start + size))
            scale_EGO[:, start // size] = scale_EO1[..., 0]
            if zero_EGO is not None and zero_EO1 is not None:
                zero_EGO[:, start // size] = zero_EO1[..., 0]
        # What doesn't depend on the columns before is done for the whole block: a column's turn is short.
        group_EB = group_EK[:, start:stop]
        scale_EBO = scale_EGO[expert_E[:, None], group_EB]
        divisor_EBO = torch.where(scale_EBO == 0, torch.inf, scale_EBO)
        low, high = level_range(grid, None if zero_EGO is None else zero_EGO[expert_E[:, None], group_EB])
        level_EBO = torch.empty_like(target_EBO)
        for inner in range(start, stop, INNER):
            inner_stop = min(inner + INNER, stop)
            for column in range(inner, inner_stop):
                b = column - start
                limits = (x[:, b] if isinstance(x, Tensor) else x for x in (low, high))
                level_EO = level_EBO[:, b]
                torch.div(target_EBO[:, b], divisor_EBO[:, b], out=level_EO)
                found_EO = level_of_ratio(level_EO, *limits)
                if found_EO is not level_EO:
                    level_EO.copy_(found_EO)
                delta_EO = delta_EKO[:, column].addcmul_(scale_EBO[:, b], level_EO, value=-1)
                rest_EbO = target_EBO[:, b + 1 : inner_stop - start]
                rest_EbO.addcmul_(feedback_EKK[:, column + 1 : inner_stop, column, None], delta_EO[:, None])
            if inner_stop < stop:
                feedback_EBb = feedback_EKK[:, inner_stop:stop, inner:inner_stop]
                target_EBO[:, inner_stop - start :].baddbmm_(feedback_EBb, delta_EKO[:, inner:inner_stop])
        place_EB = order_EK[:, start:stop]
        rounded_EKO[expert_E[:, None], place_EB] = target_EBO
        codes_EKO[expert_E[:, None], place_EB] = level_EBO.sub_(low).to(torch.uint8)
    quantized = Quantized(
        codes_EKO.transpose(1, 2).contiguous(),
        scale_EGO.to(scale_EOG.dtype).transpose(1, 2).contiguous(),
        None if zero_EGO is None else zero_EGO.to(torch.uint8).transpose(1, 2).contiguous(),
        grid,
    )
    return quantized, rounded_EKO.transpose(1, 2)


def _choose(first_EO: Tensor, first: Quantized, second: Quantized) -> Quantized:
    """The rows of `first` where `first_EO`, else those of `second`."""
    pick_EO1 = first_EO[..., None]
    zero = None
    if first.zero is not None and second.zero is not None:
        zero = torch.where(pick_EO1, first.zero, second.zero)
    codes = torch.where(pick_EO1, first.codes, second.codes)
    return Quantized(codes, torch.where(pick_EO1, first.scale, second.scale), zero, first.grid)
