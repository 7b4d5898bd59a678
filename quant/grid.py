"""Affine integer grids: what a group of quantized weights can be, and the scale that fits a given group best.

Contract: a weight is approximated by `scale · (code − zero)`, with an unsigned code in [0, 2^bits − 1] per weight and
one scale (if asymmetric also one zero point) per group of `group_size` consecutive weights along the last dimension. A
scale is rounded to the dtype in which it will be stored *before* any code is computed with it, so what is stored is
exactly what was optimised. All functions are pure, compute in float32, and work through a tensor in chunks that stay
in cache, so they need little memory beyond their result.

Shape letters: O output features, K input features, G groups along K, g weights of a group, B all leading dimensions
(experts; none, one or several) as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from moe_compress.errors import InputError, RecipeError, RunError
from moe_compress.quant.side_by_side import share_out
from moe_compress.quant.trits import TERNARY

Search = Literal["none", "mse", "pnorm"]
SEARCHES: tuple[Search, ...] = ("none", "mse", "pnorm")
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PNORM = 2.4  # the exponent of GPTQ's and PMQ's clip search

# The best step of a uniform quantizer of a unit Gaussian, by bits (J. Max, "Quantizing for minimum distortion", 1960).
# The search starts below it: a range relative to the largest weight alone doesn't fit small and whole-row groups alike.
GAUSSIAN_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
# A geometric series of candidates, then four around the best (in steps of the series). Each is judged at its own
# least-squares scale, which is why so few do: Gaussian and Student-t weights, 2 to 4 bits, groups of 32 to 2048 come
# within 0.2 % of the squared error of 64 candidates.
COARSE = 6
FINE = (-0.4, -0.2, 0.2, 0.4)
REFINEMENTS = 2
WIDTHS = (1, TERNARY, 2, 3, 4, 5, 6, 7, 8)
CHUNK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 25}
TINY = torch.finfo(torch.float32).tiny


def checked_group_size(size: int) -> int:
    """The size itself. Raises RecipeError for one that groups can't have."""
    if size != -1 and size < 1:
        raise RecipeError(f"group_size must be positive, or -1 for one group per row, not {size}")
    return size


GroupSize = Annotated[int, AfterValidator(checked_group_size)]


@dataclass(frozen=True)
class Grid:
    """The values that a group of weights can have: `scale · (code − zero)`.

    `bits`: 1 to 8, or 1.58 for the ternary grid, whose values are 0 and ±scale (codes 0 to 2).
    `group_size`: weights along K that share a scale; −1 makes the whole row one group.
    `symmetric`: the zero point is fixed at 2^(bits−1) and nothing is stored for it. Below 2 bits a grid is always
    symmetric: the zero is 0.5 at 1 bit, so its two values are ±scale/2, and 1 at 1.58.
    `signed_scale`: a symmetric group may have a negative scale, which moves the level that has no mirror image,
    −2^(bits−1), to the positive side. None means where it pays: at 2 to 4 bits it takes 10 to 17 % off the squared
    error of groups of 64. A runtime that multiplies by the scale needs to know nothing of it; False is for one that
    insists on positive scales.

    Raises RecipeError for values out of range.
    """

    bits: float
    group_size: int
    symmetric: bool = True
    signed_scale: bool | None = None

    @classmethod
    def of_width(cls, bits: float, group_size: int, symmetric: bool) -> Grid:
        """The grid of a width where several are in use: 1 bit and ternary are symmetric whatever the others are."""
        return cls(bits, group_size, symmetric or bits < 2)

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise RecipeError(f"bits must be 1 to 8 or {TERNARY} (ternary), not {self.bits}")
        checked_group_size(self.group_size)
        if self.bits < 2 and not self.symmetric:
            values = "1 bit has only a symmetric grid (±scale/2)" if self.bits == 1 else "a ternary grid is symmetric"
            raise RecipeError(f"{values}: set symmetric to true, or take 2 bits")

    @property
    def max_code(self) -> int:
        """The largest code."""
        return 2 if self.bits == TERNARY else (1 << int(self.bits)) - 1

    @property
    def center(self) -> float:
        """The zero point of a symmetric grid: 2^(bits−1); 0.5 at 1 bit, 1 at 1.58."""
        return self.max_code / 2 if self.bits < 2 else float(1 << (int(self.bits) - 1))

    @property
    def has_signed_scale(self) -> bool:
        """Whether scales may be negative: `signed_scale`, with None and inapplicable values resolved."""
        if not self.symmetric or self.bits < 2:
            return False
        return self.bits <= 4 if self.signed_scale is None else self.signed_scale

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` weights has. Raises RecipeError when they don't divide it."""
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            raise RecipeError(f"group_size {self.group_size} doesn't divide the row length {in_features}")
        return in_features // self.group_size


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: `codes` uint8 [..., O, K], `scale` [..., O, G], `zero` uint8 [..., O, G], or None."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid


def find_scales(
    weight: Tensor,
    grid: Grid,
    *,
    importance: Tensor | None = None,
    search: Search = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor | None]:
    """The scale and the zero point of every group of `weight` [..., O, K].

    `search`: "none" takes them from the group's extreme values (below 2 bits: from its mean magnitude). "mse" and
    "pnorm" minimise Σ importance · |w − ŵ|^p over the group, p = 2 or 2.4, and are never worse than "none" by that.
    `importance`: [..., K] or [K], not negative, such as the diagonal of a Hessian; only its ratios matter, and only to
    a search.
    Returns the scale [..., O, G] in `scale_dtype` and the zero point uint8 [..., O, G], None if symmetric. The scale of
    an all-zero group is 0.
    Raises InputError for shapes and arguments that don't fit, RunError for weights that are not finite or whose scale
    is out of the range of `scale_dtype`.

    Sources: the 1-bit scale from XNOR-Net (Rastegari et al. 2016, arXiv 1603.05279, eq. 6); the ternary one without a
    search from Ternary Weight Networks (Li et al. 2016, arXiv 1605.04711, eq. 5 and 6); p = 2.4 from GPTQ's code;
    scale and codes in turn, each the best for the other, is Lloyd's algorithm restricted to uniform grids.
    """
    if search not in SEARCHES:
        raise InputError(f"unknown search {search!r}; known: {', '.join(SEARCHES)}")
    if scale_dtype not in SCALE_DTYPES:
        raise InputError(f"scale_dtype must be bfloat16, float16 or float32, not {scale_dtype}")
    weight_BOGg, importance_B1Gg = grouped(weight, grid), _grouped_importance(weight, importance, grid)
    scale_BOG1 = torch.empty((*weight_BOGg.shape[:-1], 1), dtype=scale_dtype, device=weight.device)
    zero_BOG1 = None if grid.symmetric else torch.empty_like(scale_BOG1, dtype=torch.uint8)

    def fit(chunk: tuple[slice, slice]) -> None:
        part_importance = None if importance_B1Gg is None else importance_B1Gg[chunk[0]]
        part = weight_BOGg[chunk].float().contiguous()  # a strided chunk would make every step below slow
        scale, zero = _fit(part, part_importance, grid, search, scale_dtype)
        scale_BOG1[chunk] = scale.to(scale_dtype)
        if zero_BOG1 is not None:
            zero_BOG1[chunk] = zero.to(torch.uint8)

    share_out(fit, row_chunks(weight_BOGg), weight.device)
    if not scale_BOG1.isfinite().all():
        if not weight.isfinite().all():
            raise RunError("the weights contain NaN or infinity")
        raise RunError(f"the weights are too large: a group's scale doesn't fit {scale_dtype}")
    shape = (*weight.shape[:-1], weight_BOGg.shape[2])
    return scale_BOG1.view(shape), None if zero_BOG1 is None else zero_BOG1.view(shape)


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The nearest codes, uint8, of finite `weight` [..., O, K] on the grid with `scale` and `zero` [..., O, G].

    A group whose scale is 0 gets the code of its zero point (1 bit: 1), which dequantizes to 0.
    Raises InputError for shapes that don't fit.
    """
    weight_BOGg = grouped(weight, grid)
    scale_BOG1, zero_BOG1 = _per_group(scale, zero, weight, weight_BOGg)
    codes_BOGg = torch.empty(weight_BOGg.shape, dtype=torch.uint8, device=weight.device)

    def round_part(chunk: tuple[slice, slice]) -> None:
        low, high = level_range(grid, None if zero_BOG1 is None else zero_BOG1[chunk].float())
        level = nearest_level(weight_BOGg[chunk].float(), scale_BOG1[chunk].float(), low, high)
        codes_BOGg[chunk] = level.sub_(low)

    share_out(round_part, row_chunks(weight_BOGg), weight.device)
    return codes_BOGg.view(weight.shape)


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale · (code − zero)` [..., O, K] in `dtype`: the exact product (of a 16-bit scale), rounded once."""
    codes_BOGg = grouped(quantized.codes, quantized.grid)
    scale_BOG1, zero_BOG1 = _per_group(quantized.scale, quantized.zero, quantized.codes, codes_BOGg)
    weight_BOGg = torch.empty(codes_BOGg.shape, dtype=dtype, device=codes_BOGg.device)

    def multiply(chunk: tuple[slice, slice]) -> None:
        zero = quantized.grid.center if zero_BOG1 is None else zero_BOG1[chunk].float()
        level = codes_BOGg[chunk].float().sub_(zero)
        weight_BOGg[chunk] = level.mul_(scale_BOG1[chunk].float())  # rounds to `dtype`

    share_out(multiply, row_chunks(codes_BOGg), codes_BOGg.device)
    return weight_BOGg.view(quantized.codes.shape)


def level_range(grid: Grid, zero: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """The lowest and the highest level (code − zero); `zero` (float32) matters only if the grid is asymmetric."""
    if zero is None or grid.symmetric:
        return -grid.center, grid.max_code - grid.center
    return -zero, grid.max_code - zero


def nearest_level(weight: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """The level (float32) of low, low + 1, …, high that is nearest to `weight / scale`; the arguments broadcast.

    Levels are integers, or ±0.5 where `low` is −0.5 (1 bit). A scale of 0 gives the level nearest to 0.
    """
    return level_of_ratio(weight / torch.where(scale == 0, math.inf, scale), low, high)


def level_of_ratio(ratio: Tensor, low: Tensor | float, high: Tensor | float, out: Tensor | None = None) -> Tensor:
    """`nearest_level` of weights that are divided by their scales already: in `out`, else maybe in place of `ratio`."""
    if isinstance(low, float) and low == -0.5:
        level = torch.where(ratio < 0, -0.5, 0.5)
        return level if out is None else out.copy_(level)
    level = torch.round(ratio, out=ratio if out is None else out)
    return level.clamp_(low, high)  # type: ignore[call-overload, no-any-return, arg-type]


def _fit(
    weight: Tensor, importance: Tensor | None, grid: Grid, search: Search, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of the groups `weight` [..., g], in float32, the scale as it will be stored."""
    scale, zero = _plain_scale(weight, grid, scale_dtype)
    if search == "none":
        return scale, zero
    power = 2.0 if search == "mse" else PNORM
    importance = weight.new_ones(1) if importance is None else importance
    level = nearest_level(weight, scale, *level_range(grid, zero))
    error = _error(weight, scale, level, importance, power)

    def keep_better(new_scale: Tensor, new_zero: Tensor) -> None:
        nonlocal scale, zero, level, error
        new_scale = new_scale.to(scale_dtype).float()
        new_level = nearest_level(weight, new_scale, *level_range(grid, new_zero))
        new_error = _error(weight, new_scale, new_level, importance, power)
        better = new_error < error
        scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
        level, error = torch.where(better, new_level, level), torch.where(better, new_error, error)

    if grid.bits == TERNARY:
        keep_better(_ternary_scale(weight, importance), zero)
    elif grid.bits > 1:
        keep_better(*_sweep(weight, importance, grid, power))
    for _ in range(REFINEMENTS):
        keep_better(_least_squares_scale(weight, scale, level, importance, power), zero)
    return scale, zero


def _plain_scale(weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale and the zero point without a search."""
    if grid.bits == 1:
        scale = 2 * weight.abs().mean(-1, keepdim=True)
    elif grid.bits == TERNARY:
        magnitude = weight.abs()
        large = magnitude > 0.7 * magnitude.mean(-1, keepdim=True)
        scale = (magnitude * large).sum(-1, keepdim=True) / large.sum(-1, keepdim=True).clamp_min(1)
    else:
        smallest, largest, step = _extremes(weight, grid)
        if not grid.symmetric:
            scale = step.to(scale_dtype).float()
            zero = (-smallest / torch.where(scale == 0, math.inf, scale)).round_().clamp_(0, grid.max_code)
            return scale, zero
        # Without a sign, half a step of clipping: at 2 and 3 bits far better than none, max|w| / (2^(bits−1) − 1). With
        # one, the long side of the grid ends at the largest weight: better still.
        longest = torch.where(-smallest > largest, smallest, largest)
        scale = -longest / grid.center if grid.has_signed_scale else step
    return scale.to(scale_dtype).float(), torch.full_like(scale, grid.center)


def _extremes(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Of every group the smallest weight (at most 0), the largest (at least 0), and a step that covers them."""
    smallest, largest = weight.amin(-1, keepdim=True).clamp_max_(0), weight.amax(-1, keepdim=True).clamp_min_(0)
    if grid.symmetric:
        return smallest, largest, torch.maximum(-smallest, largest) / (grid.center - 0.5)
    return smallest, largest, (largest - smallest) / grid.max_code


def _sweep(weight: Tensor, importance: Tensor, grid: Grid, power: float) -> tuple[Tensor, Tensor]:
    """The best of a series of scales, each replaced by the least-squares scale of its codes before it is judged."""
    smallest, _, step = _extremes(weight, grid)
    if grid.symmetric:
        zeros = [torch.full_like(step, grid.center)]
    else:
        # Which zero points are worth a try doesn't depend on the shrinking: trying them all gains less than 0.1 %.
        zero = (-smallest / torch.where(step == 0, math.inf, step)).clamp_(0, grid.max_code)
        zeros = [zero.floor(), zero.ceil()]
    # Candidates are 1 / scale, 0 for an all-zero group. They start beyond the extremes: at 4 bits that takes 1 to 2 %
    # off the error of groups of 16 (nothing off that of large ones).
    top = 1.3 * step
    bottom = torch.minimum(
        0.7 * GAUSSIAN_STEP[int(grid.bits)] * weight.square().mean(-1, keepdim=True).sqrt_(), 0.9 * step
    )
    growth = (top / torch.where(bottom == 0, math.inf, bottom)) ** (1 / (COARSE - 1))
    weighted = weight * importance
    level, spare = torch.empty_like(weight), torch.empty_like(weight)  # a new buffer per step would cost page faults
    best_gain, best_scale, best_zero = torch.full_like(step, -math.inf), torch.zeros_like(step), zeros[0]

    def judge(inverse: Tensor, zero: Tensor) -> None:
        nonlocal best_gain, best_scale, best_zero
        low, high = level_range(grid, zero)
        torch.mul(weight, inverse, out=level).round_().clamp_(low, high)  # type: ignore[call-overload, arg-type]
        product = torch.mul(level, weighted, out=spare).sum(-1, keepdim=True)
        norm = torch.mul(level, level, out=spare).mul_(importance).sum(-1, keepdim=True)
        scale = product / norm.clamp_min_(TINY)
        # Of squares, what the error is less than Σ importance · w².
        gain = product * scale if power == 2.0 else -_error(weight, scale, level, importance, power)
        better = gain > best_gain
        best_gain, best_scale = torch.where(better, gain, best_gain), torch.where(better, scale, best_scale)
        best_zero = zero if grid.symmetric else torch.where(better, zero, best_zero)

    for zero in zeros:
        for sign in (1.0, -1.0) if grid.has_signed_scale else (1.0,):
            inverse = sign / torch.where(top == 0, math.inf, top)
            for _ in range(COARSE):
                judge(inverse, zero)
                inverse = inverse * growth
    middle, zero = 1 / torch.where(best_scale == 0, math.inf, best_scale), best_zero
    for offset in FINE:
        judge(middle * growth**offset, zero)
    return best_scale, best_zero


def _ternary_scale(weight: Tensor, importance: Tensor) -> Tensor:
    """The ternary scale with the least Σ importance · (w − ŵ)²: exact.

    Whatever the scale, the weights that become ±scale are those above some magnitude, at the scale that is their
    weighted mean magnitude. So it is the best of the g runs of the largest, all judged by two running sums.
    """
    magnitude, order = weight.abs().sort(dim=-1, descending=True)
    importance = importance.expand(weight.shape).gather(-1, order)
    norm = importance.cumsum(-1).clamp_min_(TINY)
    product = magnitude.mul_(importance).cumsum(-1)
    best = (product.square() / norm).argmax(-1, keepdim=True)  # what the error is less than Σ importance · w²
    return product.gather(-1, best) / norm.gather(-1, best)


def _least_squares_scale(weight: Tensor, scale: Tensor, level: Tensor, importance: Tensor, power: float) -> Tensor:
    """The best scale for fixed codes: for power 2 exactly, else by one step of reweighted least squares."""
    if power != 2.0:
        importance = importance * (weight - scale * level).abs_().pow_(power - 2)
    scaled = level * importance
    return (scaled * weight).sum(-1, keepdim=True) / scaled.mul_(level).sum(-1, keepdim=True).clamp_min_(TINY)


def _error(weight: Tensor, scale: Tensor, level: Tensor, importance: Tensor, power: float) -> Tensor:
    """Σ importance · |w − scale · level|^power of every group, [..., 1]."""
    difference = torch.addcmul(weight, scale, level, value=-1)
    difference = difference.square_() if power == 2.0 else difference.abs_().pow_(power)
    return difference.mul_(importance).sum(-1, keepdim=True)


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """[..., O, K] as [B, O, G, g]."""
    if weight.dim() < 2 or not weight.shape[-1]:
        raise InputError(f"a weight to quantize is [..., out, in], not {list(weight.shape)}")
    groups = grid.groups(weight.shape[-1])
    return weight.reshape(math.prod(weight.shape[:-2]), weight.shape[-2], groups, weight.shape[-1] // groups)


def _grouped_importance(weight: Tensor, importance: Tensor | None, grid: Grid) -> Tensor | None:
    """[..., K] as [B, 1, G, g], float32, with a largest value of 1 so that no sum over- or underflows."""
    if importance is None:
        return None
    expected = (*weight.shape[:-2], weight.shape[-1])
    if importance.shape not in (expected, expected[-1:]):
        raise InputError(f"importance is {list(importance.shape)}, not {list(expected)} or {list(expected[-1:])}")
    if not (importance.isfinite() & (importance >= 0)).all():
        raise InputError("importance must be finite and not negative")
    importance = (importance / importance.amax(-1, keepdim=True).clamp_min(TINY)).float().expand(expected)
    groups = grid.groups(weight.shape[-1])
    return importance.reshape(math.prod(weight.shape[:-2]), 1, groups, weight.shape[-1] // groups)


def _per_group(scale: Tensor, zero: Tensor | None, weight: Tensor, weight_BOGg: Tensor) -> tuple[Tensor, Tensor | None]:
    """`scale` and `zero` as [B, O, G, 1], checked against the weight."""
    expected = (*weight.shape[:-1], weight_BOGg.shape[2])
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tensor.shape != expected:
            raise InputError(f"{name} is {list(tensor.shape)}, not {list(expected)}")
    shape = (*weight_BOGg.shape[:-1], 1)
    return scale.reshape(shape), None if zero is None else zero.reshape(shape)


def row_chunks(weight_BOGg: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of B and O of about CHUNK_WEIGHTS weights each."""
    batches, rows, groups, size = weight_BOGg.shape
    limit = CHUNK_WEIGHTS.get(weight_BOGg.device.type, CHUNK_WEIGHTS["cuda"])
    rows_at_once = max(1, min(rows, limit // (groups * size)))
    batches_at_once = max(1, limit // (rows_at_once * groups * size)) if rows_at_once >= rows else 1
    for batch in range(0, batches, batches_at_once):
        for row in range(0, rows, rows_at_once):
            yield slice(batch, batch + batches_at_once), slice(row, row + rows_at_once)
