"""Rows times packed matrices in plain torch: unpacked a few at a time, straight to what the product reads.

Contract: `multiply` gives each slot's rows times its own matrix. On a CPU matrices and sums are float32, whatever the
rows' dtype: nothing is rounded on the way to a narrower one, and without matrix instructions for it a product in
bfloat16 takes several times as long. Elsewhere matrices have the rows' dtype. At most `weights_at_once()` weights are
unpacked at any time.

How it is fast on a CPU: unpacking costs passes over memory, so there are few, over as few bytes as possible, and no
code is moved to its place (columns.py).

Letters: R rows, N matrices, O/K output and input features, C columns, G groups.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_compress.model.dispatch import Dispatch, grouped_linear
from moe_compress.quant import gguf_blocks
from moe_compress.quant.columns import Columns, Scratch
from moe_compress.quant.grid import Quantized, dequantize
from moe_compress.quant.packing import unpack

if TYPE_CHECKING:
    from moe_compress.quant.packed import PackedProjection
    from moe_compress.quant.stack import Stack

# Weights unpacked at a time, by thread: every operation costs microseconds to start, and what it leaves should stay in
# the last cache (5 bytes a weight with 2 or 4 bits).
WEIGHTS_PER_THREAD = 1 << 21
MOST_WEIGHTS = 1 << 24
# Up to so many rows on a CPU, dense matrices are multiplied one by one where they lie: picking several copies them,
# which takes several times as long as reading them.
FEW_ROWS = 64
# What is not in use; as many as ever ran side by side.
_idle: list[Scratch] = []


def weights_at_once() -> int:
    """How many weights are unpacked at a time (at least a row)."""
    return min(MOST_WEIGHTS, WEIGHTS_PER_THREAD * torch.get_num_threads())


@functools.cache
def fused_kernel(device: str) -> Any:
    """The module with the kernel for a kind of device, or None: for a GPU there is one where Triton is."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("moe_compress.quant.kernels.triton_moe")


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
    if encoding.bits == 0 and not encoding.blocks and not backward and _few(stack, input_RK):
        return _where_they_lie(stack.weight, input_RK, slots, counts)
    stored = next(stack.parameters())
    out_features = stored.shape[1]
    on_cpu = stored.device.type == "cpu"
    dtype = torch.float32 if on_cpu and input_RK.dtype in (torch.bfloat16, torch.float16) else input_RK.dtype
    columns = Columns.of(encoding, in_features) if encoding.bits and on_cpu else None
    rows_RK = input_RK.to(dtype)
    if columns is not None and not backward:
        rows_RK = columns.spread(rows_RK)
    output = input_RK.new_empty(len(input_RK), out_features)
    if backward:
        output = rows_RK.new_zeros(len(input_RK), in_features if columns is None else columns.count)
    limit = max(1, weights_at_once() // in_features)  # rows of matrices
    matrices, rows_O = max(1, limit // out_features), min(limit, out_features)
    scratch = _idle.pop() if _idle else Scratch()
    start = 0
    for first in range(0, len(slots), matrices):
        some, own = slots[first : first + matrices], counts[first : first + matrices]
        chunk = slice(start, start + sum(own))
        start = chunk.stop
        index = run_or_index(some, stored.device)
        for row in range(0, out_features, rows_O):
            part = slice(row, row + rows_O)
            if columns is None:
                weight_NOK = dense(stack, index, part, dtype)
            else:
                weight_NOK = _in_columns(stack, columns, index, part, scratch).to(dtype)
            if backward:
                output[chunk] += product(rows_RK[chunk, part], weight_NOK.transpose(-2, -1), own)
            else:
                output[chunk, part] = product(rows_RK[chunk], weight_NOK, own)
    _idle.append(scratch)
    if backward and columns is not None:
        output = columns.gathered(output)
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


def _in_columns(stack: Stack, columns: Columns, index: Tensor | slice, rows: slice, scratch: Scratch) -> Tensor:
    """The same as float32 `columns`; valid until the next call with this scratch."""
    scale_NOG = stack.scale[index, rows].float()
    symmetric = stack.encoding.symmetric
    zero_NOG = None if symmetric else unpack(stack.zero[index, rows], stack.encoding.bits, scale_NOG.shape[-1])
    return columns.values(stack.codes[index, rows], scale_NOG, zero_NOG, scratch)


def by_chunks(projection: PackedProjection, input_RK: Tensor, dispatch: Dispatch, backward: bool = False) -> Tensor:
    """Each expert's rows times its own of a projection's matrices → [R, O]; of the experts with rows, some at a time.

    `backward`: rows [R, O] times the matrices transposed → [R, K].
    """
    counts = dispatch.counts
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


def run_or_index(ascending: list[int], device: torch.device) -> Tensor | slice:
    """An index to these places: a slice where they are a run, which copies nothing."""
    if ascending[-1] - ascending[0] == len(ascending) - 1:
        return slice(ascending[0], ascending[-1] + 1)
    return torch.tensor(ascending, device=device)
