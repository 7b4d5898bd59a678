"""Weights → GGUF blocks: the scales that make the weighted squared error small, then the nearest codes.

Contract: `quantize` makes Σ importance · (w − ŵ)² small block by block, with ŵ exactly what llama.cpp will read, scales
rounded as they are stored. Importance is what an imatrix holds: the mean square of the input channel that a weight is
multiplied with, per expert here. No block type has a best answer that is cheap to find, so candidates for the scale of
every (sub-)block are judged at their own least-squares scale, and then all parts of a block (codes, scales, scale of
the scales) are solved for in turn with the others fixed. Every turn is an exact minimum, so none makes the error
larger, except for the rounding of a float16.

`search=False` is the control: the scale that just covers the largest weight, as converters take it where they have no
importances; the bytes are then those of the `gguf` package for every type that it quantizes.

Letters: E experts, O rows of a matrix, K weights of a row, N blocks, S sub-blocks, n weights of a sub-block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.errors import InputError, RunError

from .gguf_blocks import BlockType, Fields, join, join_plain, level_table
from .side_by_side import share_out

# Weights worked on at a time: float32 temporaries of this size stay in a core's cache.
CHUNK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 25}
# Candidates for a scale, relative to the one that just covers the largest weight; wide, because the largest weight may
# be one that hardly matters. Random weights and importances come within a few per cent of the error of fifty.
_SIGNED = (0.45, 0.55, 0.64, 0.72, 0.79, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
_LINES = (0.5, 0.6, 0.68, 0.75, 0.81, 0.86, 0.9, 0.94, 0.97, 1.0, 1.03)
_FINE = (0.7, 0.8, 0.86, 0.9, 0.93, 0.96, 0.98, 1.0, 1.02, 1.05)
_TERNARY = tuple(0.08 * i for i in range(2, 14))
_TURNS = 3
# Least importance of a channel, relative to the mean of its block: what was never active is not free to go anywhere.
_FLOOR = 1e-3
_TINY = 1e-30


def quantize(weight: Tensor, kind: BlockType, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
    """Blocks of matrices.

    Args:
        weight: [..., O, K]; any float dtype.
        importance: of the input channels, [..., K] with the same leading dimensions (of every expert), or [K]; None
            weighs all weights alike.
        search: look for the best scales; otherwise those that cover the largest weights.

    Returns:
        uint8 [..., O, K / weights · size].

    Raises:
        InputError: rows aren't whole blocks, or the importance has another shape, or is negative or not finite.
        RunError: a weight is too large for the type, or not finite.
    """
    length = weight.shape[-1]
    if not kind.fits(length):
        raise InputError(f"rows of {length} weights are not whole blocks of {kind.weights} ({kind.name})")
    rows = weight.reshape(-1, length)
    result = torch.empty(len(rows), kind.row_bytes(length), dtype=torch.uint8, device=weight.device)
    owner_R, table = _importance_of_rows(weight, importance)
    step = max(1, CHUNK_WEIGHTS.get(weight.device.type, 1 << 18) // length)

    def fill(start: int) -> None:
        own = slice(start, start + step)
        part = rows[own].float()
        if not bool(part.isfinite().all()):
            raise RunError("a weight to quantize is not finite")
        if kind.kind == "plain":
            result[own] = join_plain(part, kind).view(len(part), -1)
            _check_range(kind, part)
            return
        blocks = part.view(-1, kind.subblocks, kind.weights // kind.subblocks)
        weights = None
        if table is not None and search:
            weights = table[owner_R[own]].view(blocks.shape)
            mean = weights.mean((1, 2), keepdim=True)
            weights = torch.where(mean > 0, weights / mean, 1.0) + _FLOOR
        result[own] = join(_fields(blocks, weights, kind, search), kind).view(len(part), -1)

    share_out(fill, range(0, len(rows), step), weight.device)
    return result.view(*weight.shape[:-1], -1)


def _importance_of_rows(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(which importance each row has, importances [M, K])."""
    count = weight.numel() // max(1, weight.shape[-1])
    if importance is None:
        return torch.empty(0), None
    if importance.shape not in (weight.shape[-1:], (*weight.shape[:-2], weight.shape[-1])):
        raise InputError(f"importance has shape {list(importance.shape)}, the weights {list(weight.shape)}")
    table = importance.reshape(-1, weight.shape[-1]).to(weight.device, torch.float32)
    if not bool(table.isfinite().all() and (table >= 0).all()):
        raise InputError("importances are finite and not negative")
    return torch.arange(count, device=weight.device) // (count // len(table)), table


def _check_range(kind: BlockType, part: Tensor) -> None:
    if kind.name == "F16" and not bool(part.half().isfinite().all()):
        raise RunError("a weight is too large for F16")


def _half(scale: Tensor, kind: BlockType) -> Tensor:
    """As it is stored. Raises RunError where that is infinite."""
    stored = scale.half()
    if not bool(stored.isfinite().all()):
        raise RunError(f"a weight is too large for {kind.name}, whose scales are float16")
    return stored


def _fields(x: Tensor, w: Tensor | None, kind: BlockType, search: bool) -> Fields:
    if kind.kind == "single":
        return _single(x, w, kind, search)
    if kind.kind == "offset":
        return _offset(x, w, kind, search)
    if kind.kind == "scaled":
        return _scaled(x, w, kind, search)
    return _affine(x, w, kind, search)


# --- levels without an offset ---------------------------------------------------------------------------------------


class _Levels:
    """The levels of a type: nearest one, and its code."""

    def __init__(self, kind: BlockType, device: torch.device):
        self.kind = kind
        self.low = -kind.high if kind.name == "Q8_0" else kind.low  # −128 is no number that kernels expect
        self.table = level_table(kind, device) if kind.levels else None
        if self.table is not None:
            # Halfway between levels are multiples of a half: what lies between two of those has one nearest level.
            middle = (self.table[1:] + self.table[:-1]) / 2
            self.nearest_code = torch.bucketize(torch.arange(-256, 256, device=device) / 2, middle, right=True)
            self.nearest_level = self.table[self.nearest_code]

    def nearest(self, value: Tensor) -> Tensor:
        """Level nearest to each value, as a number."""
        if self.table is None:
            return value.round_().clamp_(self.low, self.kind.high)
        return self.nearest_level[self._halves(value)]

    def codes(self, level: Tensor) -> Tensor:
        """Codes of levels."""
        if self.table is None:
            return (level - self.kind.low).to(torch.uint8)
        return self.nearest_code[self._halves(level)].to(torch.uint8)

    def _halves(self, value: Tensor) -> Tensor:
        return (value * 2 + 256).clamp_(0, 511).int()

    def candidates(self) -> tuple[float, ...]:
        """Candidates for a scale, relative to the one at which the largest weight has the largest level."""
        if self.kind.high == 1:
            return _TERNARY
        return _SIGNED if self.kind.levels or self.kind.high <= 15 else _FINE


def _weighted(x: Tensor, w: Tensor | None) -> Tensor:
    return x if w is None else x * w


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 where it is 0."""
    return torch.where(scale.abs() > _TINY, 1 / scale, 0.0)


def _best_scale(x: Tensor, xw: Tensor, w: Tensor | None, levels: _Levels) -> Tensor:
    """The scale of every group [..., n] → [...] whose nearest levels leave the least error."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    whole = largest / levels.low  # the level with the larger magnitude is at the side of the largest weight
    best_gain, best = torch.zeros_like(whole), torch.zeros_like(whole)
    for factor in levels.candidates():
        level = levels.nearest(x * _inverse(whole * factor).unsqueeze(-1))
        top, bottom = _dot(xw, level), _dot(_weighted(level, w), level)
        gain = top * top * _inverse(bottom)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, top * _inverse(bottom), best)
    for _ in range(_TURNS - 1):
        level = levels.nearest(x * _inverse(best).unsqueeze(-1))
        best = _dot(xw, level) * _inverse(_dot(_weighted(level, w), level))
    return best


def _single(x: Tensor, w: Tensor | None, kind: BlockType, search: bool) -> Fields:
    levels = _Levels(kind, x.device)
    x, w = x.squeeze(1), None if w is None else w.squeeze(1)
    if not search:
        return _covering(x, kind, levels)
    xw = _weighted(x, w)
    stored = _half(_best_scale(x, xw, w, levels), kind)
    level = levels.nearest(x * _inverse(stored.float()).unsqueeze(-1))
    return Fields(levels.codes(level), stored)


def _covering(x: Tensor, kind: BlockType, levels: _Levels) -> Fields:
    """The scale at which the largest weight has the largest level; rounding as in the `gguf` package."""
    if kind.high in (1, 127):  # symmetric: TQ1_0, TQ2_0, Q8_0
        scale = x.abs().amax(-1) / kind.high
        value = x * _inverse(scale).unsqueeze(-1)
        floor = value.abs().floor()
        level = value.sign() * (floor + (2 * (value.abs() - floor)).floor())
        return Fields(levels.codes(level), _half(scale, kind))
    scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1) / kind.low
    value = x * _inverse(scale).unsqueeze(-1)
    if kind.levels:
        return Fields(levels.codes(levels.nearest(value)), _half(scale, kind))
    code = (value + (0.5 - kind.low)).trunc().clamp(0, kind.high - kind.low)
    return Fields(code.to(torch.uint8), _half(scale, kind))


def _scaled(x: Tensor, w: Tensor | None, kind: BlockType, search: bool) -> Fields:
    """Sub-blocks with integer scales, which share a float16."""
    levels = _Levels(kind, x.device)
    xw = _weighted(x, w)
    if search:
        scale_NS = _best_scale(x, xw, w, levels)
    else:
        scale_NS = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1) / levels.low
    largest = scale_NS.gather(-1, scale_NS.abs().argmax(-1, keepdim=True))
    d = _half(largest / kind.scale_low, kind).float()  # [N, 1]
    integer = (scale_NS * _inverse(d)).round().clamp(kind.scale_low, kind.scale_high)
    for _ in range(_TURNS if search else 0):
        level = levels.nearest(x * _inverse(d * integer).unsqueeze(-1))
        # Of fixed levels, the error is a parabola in a sub-block's scale: the nearest integer is the best one.
        top, bottom = _dot(xw, level), _dot(_weighted(level, w), level)
        integer = (top * _inverse(bottom * d)).round().clamp(kind.scale_low, kind.scale_high)
        solved = (top * integer).sum(-1, keepdim=True) * _inverse((bottom * integer**2).sum(-1, keepdim=True))
        d = solved.half().float()
    level = levels.nearest(x * _inverse(d * integer).unsqueeze(-1))
    # Where a scale is 0 every level stands for 0; 0 itself, if there is one, is the tidy choice.
    return Fields(levels.codes(level).flatten(1), _half(d.squeeze(-1), kind), None, integer.to(torch.int16))


# --- codes with an offset --------------------------------------------------------------------------------------------


def _codes(x: Tensor, scale: Tensor, base: Tensor, high: int) -> Tensor:
    """Nearest code at scale and base [...], as a number."""
    return ((x - base.unsqueeze(-1)) * _inverse(scale).unsqueeze(-1)).round_().clamp_(0, high)


def _best_line(x: Tensor, xw: Tensor, w: Tensor | None, high: int, below: bool) -> tuple[Tensor, Tensor]:
    """(scale, base) of every group [..., n] whose nearest codes leave the least error; base ≤ 0 where `below`."""
    base0, top = x.amin(-1), x.amax(-1)
    if below:
        base0 = base0.clamp(max=0)
    total_x = xw.sum(-1)
    total_w = torch.full_like(total_x, x.shape[-1]) if w is None else w.sum(-1)
    best_gain = torch.full_like(total_x, -1.0)
    scale, base = torch.zeros_like(total_x), base0
    for factor in _LINES if high <= 15 else _FINE:
        code = _codes(x, (top - base0) / high * factor, base0, high)
        for look in range(2):  # the second at the codes that are nearest on the first one's line
            s, b, gain = _line(code, xw, w, total_x, total_w, below)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            scale, base = torch.where(better, s, scale), torch.where(better, b, base)
            if not look:
                code = _codes(x, s, b, high)
    return scale, base


def _line(
    code: Tensor, xw: Tensor, w: Tensor | None, total_x: Tensor, total_w: Tensor, below: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of x ≈ s · code + b: (s, b, how much of Σ w x² it explains)."""
    weighted = _weighted(code, w)
    wc, wcc, xc = weighted.sum(-1), _dot(weighted, code), _dot(xw, code)
    inverse = _inverse(total_w * wcc - wc * wc)
    s = (total_w * xc - total_x * wc) * inverse
    b = (wcc * total_x - wc * xc) * inverse
    alone = (s < 0) | ((b > 0) if below else torch.zeros_like(s, dtype=torch.bool))
    through = (xc * _inverse(wcc)).clamp(min=0)
    s, b = torch.where(alone, through, s), torch.where(alone, 0.0, b)
    return s, b, 2 * (s * xc + b * total_x) - s * s * wcc - 2 * s * b * wc - b * b * total_w


def _offset(x: Tensor, w: Tensor | None, kind: BlockType, search: bool) -> Fields:
    x, w = x.squeeze(1), None if w is None else w.squeeze(1)
    if not search:
        low = x.amin(-1)
        scale = (x.amax(-1) - low) / kind.high
        value = (x - low.unsqueeze(-1)) * _inverse(scale).unsqueeze(-1) + 0.5
        return Fields(value.trunc().clamp(0, kind.high).to(torch.uint8), _half(scale, kind), _half(low, kind))
    scale, base = _best_line(x, _weighted(x, w), w, kind.high, below=False)
    d, m = _half(scale, kind), _half(base, kind)
    return Fields(_codes(x, d.float(), m.float(), kind.high).to(torch.uint8), d, m)


def _affine(x: Tensor, w: Tensor | None, kind: BlockType, search: bool) -> Fields:
    """Sub-blocks with integer scales and minima, which share a float16 each."""
    high, most = kind.high, kind.scale_high
    xw = _weighted(x, w)
    if search:
        scale_NS, base_NS = _best_line(x, xw, w, high, below=True)
    else:
        base_NS = x.amin(-1).clamp(max=0)
        scale_NS = (x.amax(-1) - base_NS) / high
    d = _half(scale_NS.amax(-1, keepdim=True) / most, kind).float()
    m = _half(base_NS.amin(-1, keepdim=True) / -most, kind).float()
    scale = (scale_NS * _inverse(d)).round().clamp(0, most)
    minimum = (-base_NS * _inverse(m)).round().clamp(0, most)
    if search:
        total_x = xw.sum(-1)
        total_w = torch.full_like(total_x, x.shape[-1]) if w is None else w.sum(-1)
        for _ in range(_TURNS):
            code = _codes(x, d * scale, -m * minimum, high)
            weighted = _weighted(code, w)
            wc, wcc, xc = weighted.sum(-1), _dot(weighted, code), _dot(xw, code)
            # Each integer is best for the other and the codes: parabolas again.
            scale = ((xc + m * minimum * wc) * _inverse(wcc * d)).round().clamp(0, most)
            minimum = ((d * scale * wc - total_x) * _inverse(total_w * m)).round().clamp(0, most)
            d, m = _shared(d, m, scale, minimum, wc, wcc, xc, total_x, total_w)
    code = _codes(x, d * scale, -m * minimum, high)
    shorts = scale.to(torch.int16), minimum.to(torch.int16)
    return Fields(code.to(torch.uint8).flatten(1), _half(d.squeeze(-1), kind), _half(m.squeeze(-1), kind), *shorts)


def _shared(
    d: Tensor, m: Tensor, scale: Tensor, minimum: Tensor, wc: Tensor, wcc: Tensor, xc: Tensor, x: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares of the two float16 of a block [N, 1], for fixed integers and codes."""
    aa, bb = (scale**2 * wcc).sum(-1, keepdim=True), (minimum**2 * w).sum(-1, keepdim=True)
    ab = (scale * minimum * wc).sum(-1, keepdim=True)
    ax, bx = (scale * xc).sum(-1, keepdim=True), (minimum * x).sum(-1, keepdim=True)
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    inverse = _inverse(determinant)
    new_d = torch.where(solvable, (ax * bb - ab * bx) * inverse, (ax + m * ab) * _inverse(aa))
    new_m = torch.where(solvable, (ab * ax - aa * bx) * inverse, m)
    fine = (new_d > 0) & (new_m >= 0)
    return torch.where(fine, new_d, d).half().float(), torch.where(fine, new_m, m).half().float()
