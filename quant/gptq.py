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
from collections.abc import Callable, Sequence
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
    share_E = torch.where(denominator_E > 0, strength / denominator_E, 1.0).to(hessian_EKK)
    own_E = (1 / torch.where(denominator_E > 0, denominator_E, 1.0)).to(hessian_EKK)
    return (hessian_EKK * own_E[:, None, None]).addcmul_(mean_KK.to(hessian_EKK), share_E[:, None, None])


def column_costs(hessian_EKK: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """What a rounding error in each column costs without feedback, H_jj, and with it, R_jj²: [E, K] float32 both.

    In the order that GPTQ takes, of the damped Hessian divided by its mean diagonal.
    """
    hessian_EKK, _ = normalised(hessian_EKK, 0)
    diagonal_EK = hessian_EKK.diagonal(dim1=1, dim2=2)
    order_EK = diagonal_EK.argsort(dim=1, descending=True, stable=True)
    _, conditional_EK, damping_E = feedback(hessian_EKK, order_EK, damping, 0)
    return diagonal_EK + damping_E[:, None], conditional_EK


def foreseen_share(squares_EK: Tensor, alone_EK: Tensor, conditional_EK: Tensor) -> Tensor:
    """What share of round-to-nearest's error GPTQ is expected to leave, [E] float64 from 0 to 1; it isn't run.

    `squares_EK`: ‖δ_j‖² of every column's rounding error; the others are `column_costs`. GPTQ's error is
    Σ_j R_jj² ‖t_j − ŵ_j‖² (see above); if its targets round as well as the weights do, Σ_j R_jj² ‖δ_j‖².
    Round-to-nearest's, errors of different columns taken as independent, is Σ_j H_jj ‖δ_j‖². On the demo checkpoint the
    rank correlation with the real share over all matrices and widths is 0.93. An expert with an all-zero Hessian has
    nothing to gain: 1.
    """
    alone_E, left_E = ((costs_EK.double() * squares_EK.double()).sum(1) for costs_EK in (alone_EK, conditional_EK))
    return torch.where(alone_E > 0, left_E / alone_E, 1.0).clamp_max_(1)


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
    costs = (conditional_EK * seen_EK).gather(1, order_EK), (damping_E[:, None] * seen_EK).gather(1, order_EK)
    # Columns as rows: whatever the loop over them reads and writes is contiguous.
    rows = zip(weight_EOK, order_EK, strict=True)
    ordered_EKO = torch.stack([weight_OK.float().t().contiguous()[order_K] for weight_OK, order_K in rows])
    error_EO, is_rtn_EO = rtn_error_EO, torch.ones_like(rtn_error_EO, dtype=torch.bool)
    scale_EOG, zero_EOG = best.scale, best.zero
    for index in range(settings.passes):
        in_order = refit if settings.order == "none" else None
        found, target_EOK, found_error_EO = _columns(
            ordered_EKO, feedback_EKK, order_EK, scale_EOG, zero_EOG, costs, grid, settings.block, in_order
        )
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


def _columns(
    ordered_EKO: Tensor,
    feedback_EKK: Tensor,
    order_EK: Tensor,
    scale_EOG: Tensor,
    zero_EOG: Tensor | None,
    costs: tuple[Tensor, Tensor],
    grid: Grid,
    block: int,
    refit: Refit | None,
) -> tuple[Quantized, Tensor, Tensor]:
    """One pass over the columns; the targets [E, O, K] that were rounded, both in the original order; the error.

    `ordered_EKO`: the weights in processing order, as are the `costs`: of a column's squared error against its target,
    and what is taken off for its squared error against its weight. Every row's error [E, O], float64, is their sum.
    `refit` finds the scales of a group anew when it starts, which needs columns in their own order.
    """
    experts, columns, _ = ordered_EKO.shape
    size = columns // scale_EOG.shape[-1]
    expert_E = torch.arange(experts, device=ordered_EKO.device)
    delta_EKO = ordered_EKO.clone()  # a column that is done holds Δ instead of w
    codes_EKO = torch.empty(delta_EKO.shape, dtype=torch.uint8, device=delta_EKO.device)
    rounded_EKO = torch.empty_like(delta_EKO)
    error_EO = torch.zeros_like(delta_EKO[:, 0], dtype=torch.float64)
    scale_EGO = scale_EOG.float().transpose(1, 2).contiguous()
    zero_EGO = None if zero_EOG is None else zero_EOG.float().transpose(1, 2).contiguous()
    group_EK = order_EK // size
    edges = sorted({*range(0, columns, block), *(range(0, columns, size) if refit else ()), columns})
    work = _Block(delta_EKO[:, : min(block, columns)])
    for start, stop in itertools.pairwise(edges):
        own = slice(start, stop)
        target_EBO, scale_EBO, level_EBO, delta_EBO = work.begin(stop - start)
        target_EBO.copy_(targets(delta_EKO, feedback_EKK, start, stop))
        if refit and start % size == 0:
            expected_EbO = expected_targets(delta_EKO, feedback_EKK, start, start + size)
            scale_EO1, zero_EO1 = refit(expected_EbO.transpose(1, 2), slice(start, start + size))
            scale_EGO[:, start // size] = scale_EO1[..., 0]
            if zero_EGO is not None and zero_EO1 is not None:
                zero_EGO[:, start // size] = zero_EO1[..., 0]
        scale_EBO.copy_(scale_EGO[expert_E[:, None], group_EK[:, own]])
        low, high = level_range(grid, None if zero_EGO is None else zero_EGO[expert_E[:, None], group_EK[:, own]])
        delta_EBO.copy_(delta_EKO[:, own])
        work.round(feedback_EKK[:, own, own], low, high)
        delta_EKO[:, own] = delta_EBO
        place_EB = order_EK[:, own]
        rounded_EKO[expert_E[:, None], place_EB] = target_EBO
        against_target_EBO = target_EBO.addcmul_(scale_EBO, level_EBO, value=-1).square_()
        codes_EKO[expert_E[:, None], place_EB] = level_EBO.sub_(low).to(torch.uint8)
        for cost_EK, squares_EBO, sign in zip(costs, (against_target_EBO, delta_EBO.square_()), (1, -1), strict=True):
            error_EO.add_(torch.bmm(cost_EK[:, None, own], squares_EBO)[:, 0], alpha=sign)
    quantized = Quantized(
        codes_EKO.transpose(1, 2).contiguous(),
        scale_EGO.to(scale_EOG.dtype).transpose(1, 2).contiguous(),
        None if zero_EGO is None else zero_EGO.to(torch.uint8).transpose(1, 2).contiguous(),
        grid,
    )
    return quantized, rounded_EKO.transpose(1, 2), error_EO.clamp_min_(0)


class _Block:
    """Rounds the columns of one block after another.

    What doesn't depend on the columns before is done for the whole block, and the buffers' views are made once: a
    column's turn is short.
    """

    def __init__(self, like_EBO: Tensor):
        experts, width, _ = like_EBO.shape
        self._width = width
        self._target_EBO, self._scale_EBO, self._divisor_EBO, self._level_EBO, self._delta_EBO = (
            torch.empty_like(like_EBO, memory_format=torch.contiguous_format) for _ in range(5)
        )
        self._feedback_EBB = like_EBO.new_zeros(experts, width, width)
        stops = [min(column - column % INNER + INNER, width) for column in range(width)]
        self._columns = list(
            zip(
                *(x.unbind(1) for x in (self._target_EBO, self._divisor_EBO, self._level_EBO, self._scale_EBO)),
                self._delta_EBO.unbind(1),
                self._delta_EBO.unsqueeze(2).unbind(1),
                [self._target_EBO[:, column + 1 : stop] for column, stop in enumerate(stops)],
                [self._feedback_EBB[:, column + 1 : stop, column, None] for column, stop in enumerate(stops)],
                strict=True,
            )
        )

    def begin(self, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next block, so wide: where targets and scales go, where levels will be, where weights go and become Δ."""
        self._width = width
        buffers = self._target_EBO, self._scale_EBO, self._level_EBO, self._delta_EBO
        target_EBO, scale_EBO, level_EBO, delta_EBO = (buffer[:, :width] for buffer in buffers)
        return target_EBO, scale_EBO, level_EBO, delta_EBO

    def round(self, feedback_EBB: Tensor, low_EBO: Tensor | float, high_EBO: Tensor | float) -> None:
        """Round the block's columns, one after another, each making up for those before."""
        width = self._width
        self._feedback_EBB[:, :width, :width] = feedback_EBB
        self._divisor_EBO.copy_(self._scale_EBO).masked_fill_(self._scale_EBO == 0, torch.inf)
        lows, highs = _each(low_EBO, width), _each(high_EBO, width)
        for inner in range(0, width, INNER):
            stop = min(inner + INNER, width)
            for columns, low, high in zip(self._columns[inner:stop], lows[inner:stop], highs[inner:stop], strict=True):
                target_EO, divisor_EO, level_EO, scale_EO, delta_EO, delta_E1O, rest_EbO, feedback_Eb1 = columns
                torch.div(target_EO, divisor_EO, out=level_EO)
                level_of_ratio(level_EO, low, high, out=level_EO)
                delta_EO.addcmul_(scale_EO, level_EO, value=-1)
                rest_EbO.addcmul_(feedback_Eb1, delta_E1O)
            if stop < width:
                self._target_EBO[:, stop:width].baddbmm_(
                    self._feedback_EBB[:, stop:width, inner:stop], self._delta_EBO[:, inner:stop]
                )


def _each(limit_EBO: Tensor | float, width: int) -> Sequence[Tensor | float]:
    """The limit of every column."""
    return limit_EBO.unbind(1) if isinstance(limit_EBO, Tensor) else [limit_EBO] * width


def _choose(first_EO: Tensor, first: Quantized, second: Quantized) -> Quantized:
    """The rows of `first` where `first_EO`, else those of `second`."""
    pick_EO1 = first_EO[..., None]
    zero = None
    if first.zero is not None and second.zero is not None:
        zero = torch.where(pick_EO1, first.zero, second.zero)
    codes = torch.where(pick_EO1, first.codes, second.codes)
    return Quantized(codes, torch.where(pick_EO1, first.scale, second.scale), zero, first.grid)
