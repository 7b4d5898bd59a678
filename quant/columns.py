"""Packed rows as float32 columns, by copies and masks alone: no code is moved to where it belongs, rows are instead.

A product doesn't care in which order its columns are, nor whether a code is one column or two, as long as the rows that
it multiplies are spread over columns alike. So a row of words is read as unsigned lanes of 8, 16 or 32 bits; each lane
is copied as often as codes have bits in it, and each copy is masked to the bits of one of them. That leaves every code
times a power of two, which the rows' columns are divided by. A code that straddles two lanes is two columns, of its
lower and of its upper bits.

    lane, 2 bits   d d c c b b a a        copies   . . . . . . a a   a         rows   xa
                                                   . . . . b b . .   4 · b            xb / 4
                                                   . . c c . . . .   16 · c           xc / 16
                                                   d d . . . . . .   64 · d           xd / 64

Lanes are copied 16 bytes at a time where groups are multiples of that (2 bits in groups of 64, say), so that a group's
columns stay together, and its scale multiplies one run. Zero points that aren't subtracted from codes have a column of
their own in each group, which the sum of the group's part of a row multiplies.

Letters: R rows, N matrices, O/K output and input features, W words of a row, U units that are copied together, P
copies, C columns, G groups.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_compress.quant.packing import packed_words, unpack
from moe_compress.quant.trits import TERNARY

if TYPE_CHECKING:
    from moe_compress.quant.stack import Encoding

# Bits of a lane by bits of a code: the fewest columns for a code (1; 9/8 with 3 and 6 bits, 5/4 with 5, 21/16 with 7),
# the narrowest lanes then, which are converted fastest.
LANE = {1: 8, 2: 8, 3: 16, 4: 8, 5: 16, 6: 32, 7: 32, 8: 8}
TYPES = {8: (torch.uint8, torch.int8), 16: (torch.uint16, torch.int16), 32: (torch.uint32, torch.int32)}
# Rows of float32 begin at multiples of so many (64 bytes): vectors then don't straddle lines of the cache.
ALIGNED = 16
# From so many bits on half of its range is subtracted from a column while it is an integer, which takes a pass. Below,
# rows have a column more for what that is.
CENTERED = 5
# Types for copying units of so many bytes; a complex number is the only one of 16.
UNIT = {16: torch.complex128, 8: torch.int64, 4: torch.int32}


@dataclass(frozen=True)
class Columns:
    """What the columns of a row are: C of codes, then up to twice G for what isn't subtracted from those.

    Attributes:
        bits, in_features: of the rows.
        unit: bytes that are copied together.
        copies: of each unit, P; 0 where codes are looked up instead, and in their own order.
        lane: the type of lanes; signed where something is subtracted.
        mask: the bits that each column keeps, by lane: int32, as wide as a row's lanes.
        center_C: what is subtracted from each column, half the range of its bits, by lane; or None.
        own: C.
        code_C: the code that each column has bits of; 0 where it has none.
        factor_C: what the row's value is multiplied by; 0 where the column is empty.
        run: columns of a group that stand side by side, in the groups' order; 0 where they don't.
        group_C: group of each column.
        groups: G.
        excess_K: how much more that is of a code than the zero point of a symmetric grid; None where it is nothing.
        center: the zero point of a symmetric grid, where others are stored.
    """

    bits: float
    in_features: int
    unit: int
    copies: int
    lane: torch.dtype
    mask: Tensor
    center_C: Tensor | None
    own: int
    code_C: Tensor
    factor_C: Tensor
    run: int
    group_C: Tensor
    groups: int
    excess_K: Tensor | None
    center: float | None

    @classmethod
    @functools.cache
    def of(cls, encoding: Encoding, in_features: int) -> Columns:
        """The columns of rows of `in_features` codes in an encoding with packed integers."""
        if encoding.bits == TERNARY:
            return cls._of_ternary(encoding, in_features)
        bits, groups = int(encoding.bits), encoding.grid.groups(in_features)
        width, row_bytes = LANE[bits], 4 * packed_words(in_features, bits)
        # Bits left over at the end of a row belong to no group, unless there is only one.
        aligned = [size for size in UNIT if row_bytes % size == 0 and row_bytes % (groups * size) == 0]
        together = bool(aligned) and (groups == 1 or in_features * bits == 8 * row_bytes)
        unit = max(aligned if together else [size for size in UNIT if row_bytes % size == 0])
        # Codes by the lane that they start in, then those again that go on in the next one.
        code_K = torch.arange(in_features, device="cpu")
        shift_K = code_K * bits % width
        held_K = (width - shift_K).clamp_max(bits)
        on = (held_K < bits).nonzero().flatten()
        code = torch.cat([code_K, on])
        lane = torch.cat([code_K * bits // width, on * bits // width + 1])
        shift = torch.cat([shift_K, torch.zeros_like(on)])
        below = torch.cat([torch.zeros_like(code_K), held_K[on]])  # bits of the code that are in the lane before
        held = torch.cat([held_K, bits - held_K[on]])
        copy = code - lane * width // bits
        copies, lanes = int(copy.max()) + 1, 8 * unit // width
        column = (lane // lanes * copies + copy) * lanes + lane % lanes
        count = 8 * row_bytes // width * copies

        def table(values: Tensor, dtype: torch.dtype) -> Tensor:
            return values.new_zeros(count).index_copy_(0, column, values).to(dtype)

        center_K = torch.zeros(in_features, device="cpu")
        if bits >= CENTERED:
            center_K.index_add_(0, code, torch.exp2((held - 1 + below).float()))
        excess_K = center_K - encoding.grid.center
        unsigned, signed = TYPES[width]
        return cls(
            bits=bits,
            in_features=in_features,
            unit=unit,
            copies=copies,
            lane=signed if bits >= CENTERED else unsigned,
            mask=table((1 << held) - 1 << shift, signed).view(torch.int32),
            center_C=table(1 << held - 1 + shift, signed) if bits >= CENTERED else None,
            own=count,
            code_C=table(code, torch.int64),
            factor_C=table(torch.exp2((below - shift).float()), torch.float32),
            run=count // groups if together else 0,
            group_C=table(code * groups // in_features, torch.int64),
            groups=groups,
            excess_K=excess_K if bool(excess_K.any()) else None,
            center=None if encoding.symmetric else encoding.grid.center,
        )

    @classmethod
    def _of_ternary(cls, encoding: Encoding, in_features: int) -> Columns:
        """A column for each code, in order: the five in a byte have no bits of their own, so they are looked up."""
        code_K, groups = torch.arange(in_features, device="cpu"), encoding.grid.groups(in_features)
        run, none = in_features // groups, code_K.new_empty(0)
        return cls(
            bits=TERNARY,
            in_features=in_features,
            unit=0,
            copies=0,
            lane=torch.int8,
            mask=none,
            center_C=torch.ones(1, dtype=torch.int8, device="cpu"),
            own=in_features,
            code_C=code_K,
            factor_C=torch.ones(in_features, device="cpu"),
            run=run,
            group_C=code_K // run,
            groups=groups,
            excess_K=None,
            center=None,
        )

    def spread(self, input_RK: Tensor) -> Tensor:
        """Rows [R, K] over the matrices' columns."""
        if self.copies == 0:
            return input_RK
        parts = [input_RK.index_select(1, self.code_C).mul_(self.factor_C)]
        if self.excess_K is not None:
            parts.append(self._by_group(input_RK * self.excess_K).sum(-1))
        if self.center is not None:
            parts.append(self._by_group(input_RK).sum(-1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def gathered(self, columns_RC: Tensor) -> Tensor:
        """`spread` transposed: what there is for the matrices' columns, summed up as [R, K]."""
        if self.copies == 0:
            return columns_RC
        own_RC, *more_RG = columns_RC.split([self.own] + [self.groups] * self._more, dim=1)
        result: Tensor = own_RC.new_zeros(len(own_RC), self.in_features)
        result.index_add_(1, self.code_C, own_RC * self.factor_C)
        if self.center is not None:
            self._by_group(result).add_(more_RG[-1].unsqueeze(-1))
        if self.excess_K is not None:
            self._by_group(result).addcmul_(more_RG[0].unsqueeze(-1), self._by_group(self.excess_K[None]))
        return result

    @property
    def count(self) -> int:
        """How many columns there are."""
        return self.own + self.groups * self._more

    @property
    def _more(self) -> int:
        """How many columns a group has beside those of its codes."""
        return (self.excess_K is not None) + (self.center is not None)

    def _by_group(self, value_RK: Tensor) -> Tensor:
        """[R, K] → [R, G, codes of a group]."""
        return value_RK.unflatten(1, (self.groups, -1))  # type: ignore[no-any-return]

    def values(self, words_NOW: Tensor, scale_NOG: Tensor, zero_NOG: Tensor | None, scratch: Scratch) -> Tensor:
        """The matrices that rows in these columns are multiplied with: float32 [N, O, `count`].

        Args:
            words_NOW: packed codes.
            scale_NOG: float32.
            zero_NOG: codes of zero points, where they are stored.
            scratch: memory to use; the result is valid until the next call with it.
        """
        if self.copies == 0:
            lanes_NOC = unpack(words_NOW, self.bits, self.in_features).view(self.lane)
        else:
            units_NOU = _as_units(words_NOW, UNIT[self.unit])
            copies_NOUP = scratch.take("lanes", units_NOU.dtype, (*units_NOU.shape, self.copies))
            lanes = copies_NOUP.copy_(units_NOU.unsqueeze(-1)).flatten(-2)
            if self.copies > 1:
                lanes.view(torch.int32).bitwise_and_(self.mask)
            lanes_NOC = lanes.view(self.lane)
        if self.center_C is not None:
            lanes_NOC.sub_(self.center_C)
        count = self.count
        pitch = -(-count // ALIGNED) * ALIGNED
        matrices = scratch.take("values", torch.float32, (*lanes_NOC.shape[:2], pitch))[..., :count]
        values_NOC = matrices if count == self.own else matrices[..., : self.own]
        values_NOC.copy_(lanes_NOC)
        if self.run:
            values_NOC.unflatten(-1, (self.groups, self.run)).mul_(scale_NOG.unsqueeze(-1))
        else:
            values_NOC.mul_(scale_NOG.index_select(-1, self.group_C))
        if self.excess_K is not None:
            matrices[..., self.own : self.own + self.groups] = scale_NOG
        if zero_NOG is not None and self.center is not None:
            matrices[..., -self.groups :] = scale_NOG * (self.center - zero_NOG.float())
        return matrices


class Scratch:
    """Memory that is used again and again: fresh pages cost more than a pass over them."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._last: dict[str, tuple[torch.dtype, tuple[int, ...], Tensor]] = {}

    def take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor, with anything in it, in the memory of this name; what was taken before isn't valid any more."""
        last = self._last.get(name)
        if last is not None and last[0] == dtype and last[1] == shape:
            return last[2]
        size = math.prod(shape) * dtype.itemsize
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
        tensor = self._memory[name][:size].view(dtype).view(shape)
        self._last[name] = dtype, shape, tensor
        return tensor


def _as_units(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Words seen as wider integers.

    Copied first where they aren't at multiples of that size, in memory or in the tensor that they are part of (a mapped
    file's are anywhere): processors fault, and torch refuses.
    """
    size = dtype.itemsize
    there = words.data_ptr() % size == 0 and words.storage_offset() * words.itemsize % size == 0
    return (words if there else words.clone()).view(dtype)
