"""The Triton kernel against products with the dequantized matrices; in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from moe_compress.model.dispatch import Dispatch  # noqa: E402
from moe_compress.quant.grid import Grid, Quantized  # noqa: E402
from moe_compress.quant.kernels.triton_moe import grouped_packed, takes  # noqa: E402
from moe_compress.quant.packed import PackedProjection  # noqa: E402
from moe_compress.quant.stack import Stack  # noqa: E402

WIDTHS = [(0, -1, True), (1, 16, True), (1.58, 16, True)] + [
    (bits, group, symmetric) for bits in range(2, 9) for group, symmetric in ((-1, True), (16, False))
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def projection_of(kinds, out_features, in_features, scale_dtype=torch.bfloat16):
    """A projection whose expert e is encoded as `kinds[e]`, and its matrices, float64 [E, O, K]."""
    generator = torch.Generator().manual_seed(out_features + in_features)
    matrices = torch.empty(len(kinds), out_features, in_features, dtype=torch.float64)
    stacks, assignment = {}, [""] * len(kinds)
    for kind in dict.fromkeys(kinds):
        bits, group, symmetric = kind
        own = [e for e, other in enumerate(kinds) if other == kind]
        shape = (len(own), out_features, in_features)
        if bits == 0:
            stored = torch.randn(shape, generator=generator).to(scale_dtype)
            matrices[own] = stored.double()
        else:
            grid = Grid(bits, group, symmetric)
            groups = grid.groups(in_features)
            codes = torch.randint(0, grid.max_code + 1, shape, dtype=torch.uint8, generator=generator)
            scale = (torch.randn(*shape[:2], groups, generator=generator) / 2**bits).to(scale_dtype)
            zero = None
            middle = torch.tensor({1: 0.5, 1.58: 1.0}.get(bits) or 2.0 ** (bits - 1)).double()
            if not symmetric:
                zero = torch.randint(0, grid.max_code + 1, scale.shape, dtype=torch.uint8, generator=generator)
                middle = zero.double().repeat_interleave(in_features // groups, -1)
            matrices[own] = scale.double().repeat_interleave(in_features // groups, -1) * (codes.double() - middle)
            stored = Quantized(codes, scale, zero, grid)
        stack = Stack.holding(stored).to(DEVICE)
        stacks[stack.encoding.name] = stack
        for expert in own:
            assignment[expert] = stack.encoding.name
    return PackedProjection(stacks, assignment, out_features, in_features), matrices


def check(kinds, counts, out_features, in_features, dtype=torch.float32, **options):
    projection, matrices = projection_of(kinds, out_features, in_features, **options)
    rows = torch.randn(sum(counts), in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    assert takes(rows.to(DEVICE), list(projection.stacks.values()))
    found = grouped_packed(rows.to(DEVICE), projection, offsets.to(DEVICE)).cpu()
    assert (found.shape, found.dtype) == ((len(rows), out_features), dtype)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    # Weights are rounded once to the dtype of the rows.
    expected = (matrices[expert].to(dtype).double() @ rows.double().unsqueeze(-1)).squeeze(-1)
    limit = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)
    dispatch = Dispatch(len(rows), 1, torch.arange(len(rows)), expert, offsets, torch.ones(len(rows)))
    plain = projection.to("cpu").linear(rows, dispatch)
    torch.testing.assert_close(found.double(), plain.double(), rtol=0, atol=2 * limit)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_widths_in_one_launch(dtype):
    """Every encoding, rows of several words and groups, experts without rows, with one, and with more than a tile."""
    counts = [2, 0, 7, 1, 5, 0, 17, 1, 3, 0, 2, 1, 1, 4, 0, 33, 1]
    assert len(counts) == len(WIDTHS)
    check(WIDTHS, counts, 40, 96, dtype)


@torch.no_grad()
@pytest.mark.parametrize("kind", WIDTHS)
def test_each_width_and_odd_shapes(kind):
    """Sides that no block divides, rows that don't fill their words, codes that straddle them everywhere."""
    bits, group, symmetric = kind
    check([kind] * 3, [1, 0, 2], 37, 80)
    if group == -1:
        check([kind] * 2, [0, 3], 5, 83)
    else:
        check([(bits, 1, symmetric)] * 2, [3, 0], 9, 35)


@torch.no_grad()
def test_one_row_and_many():
    kinds = [(2, 16, True), (3, 16, True), (5, 16, False), (2, 16, True)]
    check(kinds, [0, 1, 0, 0], 64, 128)
    check(kinds, [70, 3, 64, 200], 33, 48)  # tiles of 64 rows
    projection, _ = projection_of(kinds, 8, 16)
    nobody = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    assert grouped_packed(torch.zeros(0, 16, device=DEVICE), projection, nobody).shape == (0, 8)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_another_dtype(dtype):
    check([(0, -1, True), (3, 16, False)], [2, 2], 16, 32, scale_dtype=dtype)


@torch.no_grad()
def test_moved_tensors_are_found():
    """The table of addresses follows the tensors."""
    projection, _ = projection_of([(3, 16, True), (4, 16, True)], 16, 32)
    rows, offsets = torch.randn(4, 32, device=DEVICE), torch.tensor([1, 4], dtype=torch.int32, device=DEVICE)
    before = grouped_packed(rows, projection, offsets)
    for parameter in projection.parameters():
        old = parameter.data
        parameter.data = old.clone()
        old.zero_()
    assert before.any()
    assert torch.equal(grouped_packed(rows, projection, offsets), before)


def test_what_the_kernel_leaves_to_torch():
    projection, _ = projection_of([(3, 16, True)], 8, 16)
    other, _ = projection_of([(4, 16, True)], 8, 16, scale_dtype=torch.float32)
    stacks = list(projection.stacks.values())
    rows = torch.randn(2, 16, device=DEVICE)
    assert takes(rows, stacks)
    assert not takes(rows.double(), stacks)
    assert not takes(rows.to("meta"), stacks)
    assert not takes(rows.clone().requires_grad_(), stacks)
    assert not takes(rows, stacks + list(other.stacks.values()))
