"""Rows times packed matrices in plain torch: unpacked a few at a time, straight to what the product reads.

Contract: `multiply` gives each slot's rows times its own matrix. On a CPU the matrices are exactly those of
`grid.dequantize` in float32, whatever the rows' dtype, and sums are float32: nothing is rounded on the way to a
narrower dtype, and without matrix instructions for it a product in bfloat16 takes several times as long. Elsewhere
matrices have the rows' dtype. At most `weights_at_once()` weights are unpacked at any time.

How it is fast: what unpacking costs is passes over memory, so codes stay bytes (4 in each int32 operation) until one
pass makes them floats and one scales them. And nothing puts codes in order: those that come out of their words together
stay together, and the rows' columns, of which there are few, are put in the same order instead.

    1, 2, 4 bits: plane p has code p of every byte         k = P·i + p            columns (p, i), P codes per byte
    3, 5, 6, 7:   plane p has the codes 4p … 4p+3 of 32    k = 32·i + 4·p + j     columns (p, i, j)

Letters: R rows, N matrices, O/K output and input features, P planes, Q columns of a plane (P·Q = K), W words of a row,
G groups.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_compress.model.dispatch import Dispatch, grouped_linear
from moe_compress.quant import gguf_blocks
from moe_compress.quant.grid import Quantized, dequantize
from moe_compress.quant.packing import unpack
from moe_compress.quant.trits import TERNARY

if TYPE_CHECKING:
    from moe_compress.quant.packed import PackedProjection
    from moe_compress.quant.stack import Encoding, Stack

# Weights unpacked at a time, by thread: every operation costs microseconds to start, and what it leaves should stay in
# the cache (5 bytes a weight).
WEIGHTS_PER_THREAD = 1 << 21
MOST_WEIGHTS = 1 << 24
# Up to so many rows on a CPU, dense matrices are multiplied one by one where they lie: picking several copies them,
# which takes several times as long as reading them.
FEW_ROWS = 64
# Groups with shorter runs of columns get their scale (or zero point) spread out before it is applied.
SHORT_RUN = {torch.float32: 32, torch.int8: 64}

# Buffers that are not in use: fresh pages cost more than a pass over them. As many as ever ran side by side.
_idle: list[dict[str, Tensor]] = []


def weights_at_once() -> int:
    """How many weights are unpacked at a time (at least a row)."""
    return min(MOST_WEIGHTS, WEIGHTS_PER_THREAD * torch.get_num_threads())


@functools.cache
def fused_kernel(device: str) -> Any:
    """The module with the kernel for a kind of device, or None: for a GPU there is one where Triton is."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("moe_compress.quant.kernels.triton_moe")


@dataclass(frozen=True)
class Order:
    """How unpacked columns are ordered: k = (i·planes + p)·run + j is where (p, i, j) is."""

    planes: int
    run: int

    @classmethod
    def of(cls, encoding: Encoding, in_features: int) -> Order:
        """The order in which codes of an encoding come out of their words.

        Their own where rows don't fill their words, where groups end within a plane, and of ternary codes: these cost
        more to unpack.
        """
        bits, group = encoding.bits, encoding.group_size
        order = cls(8 // int(bits), 1) if bits in (1, 2, 4, 8) else cls(8, 4)
        together = order.planes * order.run
        whole = in_features * int(bits) % 32 == 0 and in_features % together == 0
        fits = bits != TERNARY and whole and (group == -1 or group % together == 0)
        return order if fits else cls(1, 1)

    def columns(self, input_RK: Tensor) -> Tensor:
        """Rows with their columns in this order."""
        if self.planes == 1:
            return input_RK
        rows, features = input_RK.shape
        return input_RK.reshape(rows, -1, self.planes, self.run).transpose(1, 2).reshape(rows, features)

    def columns_back(self, ordered_RK: Tensor) -> Tensor:
        """Rows with their columns in their own order again."""
        if self.planes == 1:
            return ordered_RK
        rows, features = ordered_RK.shape
        return ordered_RK.reshape(rows, self.planes, -1, self.run).transpose(1, 2).reshape(rows, features)


def multiply(stack: Stack, input_RK: Tensor, slots: list[int], counts: list[int], backward: bool = False) -> Tensor:
    """The rows of some slots, one slot's after the other's, each times its own matrix → [R, O].

    Args:
        stack: matrices in one encoding.
        input_RK: rows on the stack's device.
        slots: ascending.
        counts: rows of each.
        backward: take rows [R, O], times the matrices transposed → [R, K].
    """
    encoding, in_features = stack.encoding, stack.in_features
    if encoding.name == "dense" and not backward and _few(stack, input_RK):
        return _where_they_lie(stack.weight, input_RK, slots, counts)
    stored = next(stack.parameters())
    out_features = stored.shape[1]
    on_cpu = stored.device.type == "cpu"
    dtype = torch.float32 if on_cpu and input_RK.dtype in (torch.bfloat16, torch.float16) else input_RK.dtype
    order = Order.of(encoding, in_features) if encoding.bits and on_cpu else None
    rows_RK = input_RK.to(dtype)
    if order is not None and not backward:
        rows_RK = order.columns(rows_RK)
    output = input_RK.new_empty(len(input_RK), out_features)
    if backward:
        output = rows_RK.new_zeros(len(input_RK), in_features)
    limit = max(1, weights_at_once() // in_features)  # rows of matrices
    matrices, rows_O = max(1, limit // out_features), min(limit, out_features)
    scratch = _idle.pop() if _idle else {}
    start = 0
    for first in range(0, len(slots), matrices):
        some, own = slots[first : first + matrices], counts[first : first + matrices]
        chunk = slice(start, start + sum(own))
        start = chunk.stop
        index = _index(some, stored.device)
        for row in range(0, out_features, rows_O):
            part = slice(row, row + rows_O)
            if order is None:
                weight_NOK = dense(stack, index, part, dtype)
            else:
                weight_NOK = _ordered(stack, order, index, part, scratch).to(dtype)
            if backward:
                output[chunk] += product(rows_RK[chunk, part], weight_NOK.transpose(-2, -1), own)
            else:
                output[chunk, part] = product(rows_RK[chunk], weight_NOK, own)
    _idle.append(scratch)
    if backward and order is not None:
        output = order.columns_back(output)
    return output.to(input_RK.dtype)


def _few(stack: Stack, input_RK: Tensor) -> bool:
    """Whether there are few rows, and no matrix is so large that `multiply` takes them one by one anyway."""
    small = stack.out_features * stack.in_features <= weights_at_once()
    return small and 0 < input_RK.shape[0] <= FEW_ROWS and input_RK.device.type == "cpu"


def _where_they_lie(weight_SOK: Tensor, input_RK: Tensor, slots: list[int], counts: list[int]) -> Tensor:
    """Each slot's rows times its matrix in float32 or better, of which nothing is copied that has the rows' dtype."""
    work_RK = input_RK if input_RK.dtype.itemsize >= 4 else input_RK.float()
    rows = zip(slots, work_RK.split_with_sizes(counts), strict=True)
    return torch.cat([own @ weight_SOK[slot].to(own.dtype).T for slot, own in rows]).to(input_RK.dtype)


def dense(stack: Stack, index: Tensor | slice, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of the matrices in some slots, columns in their own order: [N, O, K]."""
    if stack.encoding.blocks:
        return gguf_blocks.dequantize(stack.blocks[index, rows], gguf_blocks.TYPES[stack.encoding.blocks]).to(dtype)
    if stack.encoding.bits == 0:
        return stack.weight[index, rows].to(dtype)
    grid = stack.encoding.grid
    scale = stack.scale[index, rows]
    codes = unpack(stack.codes[index, rows], grid.bits, stack.in_features)
    zero = None if grid.symmetric else unpack(stack.zero[index, rows], grid.bits, scale.shape[-1])
    return dequantize(Quantized(codes, scale, zero, grid), dtype)


def _ordered(stack: Stack, order: Order, index: Tensor | slice, rows: slice, scratch: dict[str, Tensor]) -> Tensor:
    """The same in float32 with columns in `order`; valid until the next call with this scratch."""
    grid, features = stack.encoding.grid, stack.in_features
    words_NOW = stack.codes[index, rows]
    scale_NOG = stack.scale[index, rows].float()
    zero_NOG = None if grid.symmetric else unpack(stack.zero[index, rows], grid.bits, scale_NOG.shape[-1])
    shape_NOPQ = (*words_NOW.shape[:2], order.planes, features // order.planes)
    if order.planes == 1:
        codes_NOPQ = unpack(words_NOW, grid.bits, features).view(torch.int8).view(shape_NOPQ)
    else:
        codes_NOPQ = _buffer(scratch, "codes", torch.int8, *shape_NOPQ)
        if order.run == 1:
            _from_bytes(words_NOW, int(grid.bits), codes_NOPQ)
        else:
            _from_words(words_NOW, int(grid.bits), codes_NOPQ, _buffer(scratch, "values", torch.int8, *shape_NOPQ))
    # Less the zero point, while a code is still a byte.
    if grid.bits == 1:
        codes_NOPQ.mul_(2).sub_(1)
        scale_NOG = scale_NOG * 0.5
    elif grid.bits == 8:
        codes_NOPQ.bitwise_xor_(-128)  # code - 128
    elif zero_NOG is None:
        codes_NOPQ.sub_(int(grid.center))
    else:
        _by_group(codes_NOPQ, zero_NOG.view(torch.int8), torch.Tensor.sub_)
    values_NOPQ = _buffer(scratch, "values", torch.float32, *shape_NOPQ).copy_(codes_NOPQ)
    if grid.bits == 8 and zero_NOG is not None:
        _by_group(values_NOPQ, zero_NOG.float() - 128, torch.Tensor.sub_)
    _by_group(values_NOPQ, scale_NOG, torch.Tensor.mul_)
    return values_NOPQ.view(*shape_NOPQ[:2], features)


def by_chunks(projection: PackedProjection, input_RK: Tensor, dispatch: Dispatch, backward: bool = False) -> Tensor:
    """Each expert's rows times its own of a projection's matrices → [R, O]; of the experts with rows, some at a time.

    `backward`: rows [R, O] times the matrices transposed → [R, K].
    """
    counts = dispatch.counts_E.tolist()
    visited = [expert for expert, count in enumerate(counts) if count]
    sides = (projection.out_features, projection.in_features)
    output = input_RK.new_empty(len(input_RK), sides[backward])
    size, start = max(1, weights_at_once() // (sides[0] * sides[1])), 0
    for first in range(0, len(visited), size):
        experts = visited[first : first + size]
        own = [counts[e] for e in experts]
        rows = slice(start, start + sum(own))
        weight_NOK = projection.matrices(experts, input_RK.dtype)
        output[rows] = product(input_RK[rows], weight_NOK.transpose(-2, -1) if backward else weight_NOK, own)
        start = rows.stop
    return output


def product(input_RK: Tensor, weight_NOK: Tensor, counts: list[int]) -> Tensor:
    """Each matrix's rows times it → [R, O]."""
    if len(counts) == 1:
        return input_RK @ weight_NOK[0].T
    ends = torch.tensor(counts).cumsum(0).to(torch.int32).to(input_RK.device)
    return grouped_linear(input_RK, weight_NOK, ends)


def _from_bytes(words_NOW: Tensor, bits: int, codes_NOPQ: Tensor) -> None:
    """Planes of codes that lie within their bytes: code p of every byte."""
    quads_NOPW = codes_NOPQ.view(torch.int32)
    for plane in range(quads_NOPW.shape[2]):
        torch.bitwise_right_shift(words_NOW, bits * plane, out=quads_NOPW[:, :, plane])
    quads_NOPW.bitwise_and_(((1 << bits) - 1) * 0x01010101)


def _from_words(words_NOW: Tensor, bits: int, codes_NOPQ: Tensor, spare_NOPQ: Tensor) -> None:
    """Planes of four codes each, of 32 in `bits` words: code 4p + j of each 32 as byte j of plane p."""
    quads_NOPW, spare = codes_NOPQ.view(torch.int32), spare_NOPQ.view(torch.int32)
    width = 4 * bits
    lanes = words_NOW.unflatten(-1, (-1, bits)).movedim(-1, 0).contiguous()
    for plane in range(8):
        first, shift = divmod(width * plane, 32)
        target = quads_NOPW[:, :, plane]
        torch.bitwise_right_shift(lanes[first], shift, out=target)
        if shift + width > 32:  # the rest is in the next word; what the shift left above may be copies of the sign
            target.bitwise_and_((1 << 32 - shift) - 1).bitwise_or_(lanes[first + 1] << 32 - shift)
    # Four codes side by side to one per byte: the upper two move up, then the upper one of each two.
    half = quads_NOPW.bitwise_and_((1 << width) - 1)
    torch.bitwise_and(half, ((1 << 2 * bits) - 1) << 2 * bits, out=spare)
    half.add_(spare, alpha=(1 << 16 - 2 * bits) - 1)
    torch.bitwise_and(half, ((1 << bits) - 1) * (1 + (1 << 16)) << bits, out=spare)
    half.add_(spare, alpha=(1 << 8 - bits) - 1)


def _by_group(values_NOPQ: Tensor, group_NOG: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """An operation in place with a value per group: the groups of a plane are equal runs of it."""
    groups = group_NOG.shape[-1]
    run = values_NOPQ.shape[-1] // groups
    if groups == 1 or run >= SHORT_RUN[values_NOPQ.dtype]:
        operation(values_NOPQ.unflatten(-1, (groups, run)), group_NOG[:, :, None, :, None])
    else:
        spread = group_NOG.unsqueeze(-1).expand(-1, -1, -1, run).flatten(-2)
        operation(values_NOPQ, spread.unsqueeze(2))


def _index(slots: list[int], device: torch.device) -> Tensor | slice:
    """A slice where the slots are a run: nothing is copied then."""
    if slots[-1] - slots[0] == len(slots) - 1:
        return slice(slots[0], slots[-1] + 1)
    return torch.tensor(slots, device=device)


def _buffer(scratch: dict[str, Tensor], name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor in memory that is used again and again; replaced where a larger one is asked for."""
    size = math.prod(shape) * dtype.itemsize
    if name not in scratch or scratch[name].numel() < size:
        scratch[name] = torch.empty(size, dtype=torch.uint8)
    return scratch[name][:size].view(dtype).view(shape)
