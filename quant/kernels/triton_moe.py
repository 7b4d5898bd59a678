"""Rows times packed matrices on a GPU: one Triton kernel that unpacks inside the product, all widths in one launch.

Contract: `grouped_packed` gives what the torch path gives (run_packed.py): every expert's rows times its own matrix,
weights computed in float32 and rounded once to the rows' dtype, sums in float32. Nothing is unpacked into memory, and
nothing waits for the GPU: where an expert's rows begin is read by the kernel.

A program computes BLOCK_R rows of one expert by BLOCK_O outputs. Where the expert's matrix is and how it is encoded
comes from a table; codes are taken from their 32-bit words in registers. How an encoding's codes are read is in
`_codes`, what they stand for in `_weights`, and nowhere else.

Only imported where Triton and a GPU are there (`fused_kernel` in run_packed.py), and by tests in Triton's interpreter.

Letters: R rows, E experts, K/O input and output features.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compress.quant.trits import TERNARY

if TYPE_CHECKING:
    from moe_compress.quant.packed import PackedProjection
    from moe_compress.quant.stack import Encoding, Stack

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
TRITS = tl.constexpr(9)  # stands for the width of ternary codes
# Per expert: width of a code (0: dense; or TRITS), weights that share a scale, whether zero points are stored, and
# addresses of the matrix (codes, or dense weights), its scales and its zero points.
_COLUMNS = 6
BLOCK_K = 64
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which multiplies no bfloat16


@triton.jit  # type: ignore[untyped-decorator]
def _codes(row_address, index, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code `index` of the rows that begin at `row_address`: packing.py's layout, where codes may straddle two words;
    trits.py's, five codes a byte, where BITS says ternary."""
    if BITS == TRITS:
        byte = index // 5
        words = tl.load(row_address + byte // 4, mask=inside, other=0).to(tl.uint32, bitcast=True)
        value = (words >> (byte % 4 * 8).to(tl.uint32)) & 255
        # Divided by 3^digit, and by 3: products with 2^16 / 3^digit rounded up are exact below 256.
        digit = index % 5
        factor = tl.where(digit < 2, tl.where(digit == 0, 65536, 21846), tl.where(digit == 2, 7282, 2428))
        quotient = value * tl.where(digit == 4, 810, factor).to(tl.uint32) >> 16
        return quotient - 3 * (quotient * 21846 >> 16)
    position = index * BITS
    word = position // 32
    shift = position % 32
    codes = tl.load(row_address + word, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if 32 % BITS != 0:
        straddles = inside & (shift + BITS > 32)
        upper = tl.load(row_address + word + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        codes = codes | (upper << ((32 - shift) % 32).to(tl.uint32))
    return codes & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _weights(entry, o_1O, k_K1, inside, K, BITS: tl.constexpr, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights [K, O] of one expert's matrix, float32: scale · (code − zero), or as stored where BITS is 0."""
    stored = tl.load(entry + 3)
    if BITS == 0:
        return tl.load(stored.to(tl.pointer_type(SCALE)) + o_1O * K + k_K1, mask=inside, other=0.0).to(tl.float32)
    else:
        group = tl.load(entry + 1)
        words = (K + 19) // 20 if BITS == TRITS else (K * BITS + 31) // 32
        groups = K // group
        codes = _codes(stored.to(tl.pointer_type(tl.int32)) + o_1O * words, k_K1, inside, BITS)
        index = k_K1 // group
        scale = tl.load(tl.load(entry + 4).to(tl.pointer_type(SCALE)) + o_1O * groups + index, mask=inside, other=0.0)
        zero_address = tl.load(entry + 5).to(tl.pointer_type(tl.int32)) + o_1O * ((groups * BITS + 31) // 32)
        has_zero = index < groups * tl.load(entry + 2)  # all groups, or none
        zero = _codes(zero_address, index, inside & has_zero, BITS).to(tl.float32)
        middle = 0.5 if BITS == 1 else 1.0 if BITS == TRITS else 1.0 * (1 << (BITS - 1))
        return scale.to(tl.float32) * (codes.to(tl.float32) - tl.where(has_zero, zero, middle))


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    entry,
    input_RK,
    r_R1,
    rows,
    o_1O,
    out_features,
    K,
    acc,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows times one matrix of a known width, over all of K."""
    for start in range(0, K, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        values = tl.load(input_RK + r_R1 * K + k_K[None, :], mask=(r_R1 < rows) & (k_K[None, :] < K), other=0.0)
        inside = (k_K[:, None] < K) & (o_1O < out_features)
        weights = _weights(entry, o_1O, k_K[:, None].to(tl.int64), inside, K, BITS, SCALE).to(values.dtype)
        acc = tl.dot(values.to(FACTOR), weights.to(FACTOR), acc, input_precision="ieee")
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    input_RK,
    output_RO,
    table,
    tile_expert,
    tile_end_E,
    offsets_E,
    E,
    out_features,
    K,
    WIDTHS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert >= E:  # the grid is as large as it may have to be
        return
    entry = table + expert * COLUMNS
    first = tl.load(offsets_E + expert - 1, mask=expert > 0, other=0)
    first_tile = tl.load(tile_end_E + expert - 1, mask=expert > 0, other=0)
    rows = tl.load(offsets_E + expert)
    r_R1 = (first + (tile - first_tile) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    o_1O = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O))[None, :].to(tl.int64)
    bits = tl.load(entry)
    acc = tl.full((BLOCK_R, BLOCK_O), 0.0, tl.float32)
    # The widths of this launch, one loop each: in a loop of a known width shifts and masks are constants.
    for width in tl.static_range(10):
        if (WIDTHS >> width) % 2 == 1:  # noqa: SIM102 - decided when compiling, the other when running
            if bits == width:
                acc = _product(entry, input_RK, r_R1, rows, o_1O, out_features, K, acc, width, SCALE, FACTOR, BLOCK_K)
    inside = (r_R1 < rows) & (o_1O < out_features)
    tl.store(output_RO + r_R1 * out_features + o_1O, acc.to(output_RO.dtype.element_ty), mask=inside)


_tables: weakref.WeakKeyDictionary[PackedProjection, tuple[tuple[int, ...], Tensor]] = weakref.WeakKeyDictionary()


def takes(input_RK: Tensor, stacks: list[Stack]) -> bool:
    """Whether the kernel can: no GGUF blocks, one device, one dtype of scales and dense weights, no gradients."""
    tensors = [p for stack in stacks for p in stack.parameters()]
    return (
        input_RK.dtype in _TYPES
        and not any(stack.encoding.blocks for stack in stacks)
        and all(tensor.device == input_RK.device and tensor.is_contiguous() for tensor in tensors)
        and len({stack.encoding.dtype for stack in stacks}) == 1
        and not (torch.is_grad_enabled() and input_RK.requires_grad)
    )


def grouped_packed(input_RK: Tensor, projection: PackedProjection, offsets_E: Tensor) -> Tensor:
    """Each expert's rows times its own packed matrix → [R, O].

    Args:
        input_RK: rows sorted by expert, bfloat16, float16 or float32.
        projection: whose stacks `takes` accepts.
        offsets_E: end of each expert's rows, int32.
    """
    stacks = projection.stacks
    rows, experts = len(input_RK), len(offsets_E)
    output_RO = input_RK.new_empty(rows, projection.out_features)
    if not rows:
        return output_RO
    block = 16 if rows <= 16 * experts else 64
    # As many tiles as there can be: whole ones, and one that isn't for each expert with rows.
    tiles = rows // block + min(rows, experts)
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    tile_end_E = ((counts_E + block - 1) // block).cumsum(0).to(torch.int32)
    numbers = torch.arange(tiles, dtype=torch.int32, device=input_RK.device)
    tile_expert = torch.searchsorted(tile_end_E, numbers, right=True).to(torch.int32)
    columns = 64
    _kernel[(tiles, triton.cdiv(projection.out_features, columns))](
        input_RK.contiguous(),
        output_RO,
        _table(projection, stacks, input_RK.device),
        tile_expert,
        tile_end_E,
        offsets_E,
        experts,
        projection.out_features,
        projection.in_features,
        WIDTHS=sum({1 << _width(stack.encoding) for stack in stacks.values()}),
        COLUMNS=_COLUMNS,
        SCALE=_TYPES[next(iter(stacks.values())).encoding.torch_dtype],
        FACTOR=_TYPES[torch.float32 if _INTERPRETED else input_RK.dtype],
        BLOCK_R=block,
        BLOCK_O=columns,
        BLOCK_K=BLOCK_K,
        # Loading ahead would put every gathered word in shared memory, of each width anew: more than there is.
        num_stages=1,
    )
    return output_RO


def _table(projection: PackedProjection, stacks: dict[str, Stack], device: torch.device) -> Tensor:
    """Where and how each expert's matrix is stored, int64 [E, columns]; made anew when the tensors have moved."""
    key = tuple(p.data_ptr() for stack in stacks.values() for p in stack.parameters())
    known = _tables.get(projection)
    if known is None or known[0] != key or known[1].device != device:
        entries = []
        for name, slot in zip(projection.assignment, projection.slots, strict=True):
            stack = stacks[name]
            encoding = stack.encoding
            parts: dict[str, Any] = dict(stack.named_parameters())
            addresses = [
                parts[n][slot].data_ptr() if n in parts else 0
                for n in ("weight" if encoding.bits == 0 else "codes", "scale", "zero")
            ]
            group = projection.in_features if encoding.group_size == -1 else encoding.group_size
            entries.append([_width(encoding), group, int(not encoding.symmetric), *addresses])
        known = _tables[projection] = (key, torch.tensor(entries, dtype=torch.int64).to(device))
    return known[1]


def _width(encoding: Encoding) -> int:
    return int(TRITS.value) if encoding.bits == TERNARY else int(encoding.bits)
