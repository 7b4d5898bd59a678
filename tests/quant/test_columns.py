"""Packed rows as columns: whatever the width and the groups, they stand for the codes' own values."""

import itertools

import pytest
import torch
from packs import spread

from moe_compress.quant import run_packed
from moe_compress.quant.columns import Columns, Scratch
from moe_compress.quant.grid import Grid, Quantized
from moe_compress.quant.stack import Stack

GRIDS = [(b, s) for b, s in itertools.product((*range(1, 9), 1.58), (True, False)) if b >= 2 or s]


def random_stack(bits, group, symmetric, features, seed=0):
    """Three matrices of five rows, and what they are in float64."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, group, symmetric)
    codes = torch.randint(0, grid.max_code + 1, (3, 5, features), dtype=torch.uint8, generator=generator)
    scale = torch.randn(3, 5, grid.groups(features), generator=generator)
    zero = {1: 0.5, 1.58: 1.0}.get(bits) or float(1 << (bits - 1))
    stored = None
    if not symmetric:
        stored = torch.randint(0, grid.max_code + 1, scale.shape, dtype=torch.uint8, generator=generator)
        zero = spread(stored.double(), features)
    dense = spread(scale.double(), features) * (codes.double() - zero)
    return Stack.holding(Quantized(codes, scale, stored, grid)), dense


def close(found, expected, times=1e-6):
    return float((found.double() - expected).abs().max()) <= times * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_products_and_products_transposed_are_those_of_the_codes_values(bits, symmetric):
    """Rows that fill their words or not, groups that end within a word, a byte, a lane, or at whole units."""
    for features, group in itertools.product((20, 28, 96, 256), (-1, 1, 2, 4, 7, 16, 32, 64, 128)):
        if group > 0 and features % group:
            continue
        stack, dense = random_stack(bits, group, symmetric, features)
        columns = Columns.of(stack.encoding, features)
        values = run_packed._in_columns(stack, columns, slice(1, 3), slice(1, 4), Scratch())
        expected = dense[1:3, 1:4]
        assert values.shape == (2, 3, columns.count)
        rows = torch.randn(7, features)
        product = columns.spread(rows).double() @ values.double().transpose(1, 2)
        assert close(product, rows.double() @ expected.transpose(1, 2)), (features, group)
        assert close(columns.gathered(values.reshape(6, -1)), expected.reshape(6, -1)), (features, group)
        exact = run_packed.dense(stack, slice(1, 3), slice(1, 4), torch.float64)
        assert torch.equal(exact, expected.float().double())


@pytest.mark.parametrize(("bits", "group", "run"), [(2, 64, 64), (4, 64, 64), (3, 64, 72), (1, 128, 128), (2, 8, 0)])
def test_groups_stay_together(bits, group, run):
    """Where a group is whole units, one run of columns takes its scale; otherwise each column is given its own."""
    columns = Columns.of(random_stack(bits, group, True, 256)[0].encoding, 256)
    assert columns.run == run
    if run:
        assert torch.equal(columns.group_C[columns.factor_C > 0], columns.group_C.sort().values[columns.factor_C > 0])


@pytest.mark.parametrize(("bits", "columns"), [(1, 32), (2, 32), (3, 36), (4, 32), (5, 40), (6, 36), (7, 42), (8, 32)])
def test_how_many_columns_32_codes_take(bits, columns):
    assert Columns.of(random_stack(bits, 32, True, 256)[0].encoding, 256).own == columns * 8


@torch.no_grad()
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("skipped", [0, 4, 8, 12])
def test_words_may_start_anywhere(bits, skipped):
    """Tensors that are parts of a mapped file begin at any word of it, in memory and in the file's tensor."""
    stack, dense = random_stack(bits, -1, True, 256)
    rows, codes = torch.randn(3, 256), stack.codes.data
    for words in (0, 3):
        memory = bytearray(codes.numel() * 4 + 64)
        part = torch.frombuffer(memory, dtype=torch.int32, offset=skipped)[words:][: codes.numel()]
        stack.codes.data = part.view(codes.shape).copy_(codes)
        found = run_packed.multiply(stack, rows, [0, 1, 2], [1, 1, 1])
        assert close(found, (dense @ rows[:, :, None].double())[..., 0])


@torch.no_grad()
@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_far_from_zero_cost_no_accuracy(bits):
    """Rows all positive, weights centred: what is subtracted is larger than the result."""
    stack, dense = random_stack(bits, 64, True, 2048)
    rows = torch.rand(4, 2048) + 1
    expected = rows.double() @ dense[0].T
    size = (rows.double() @ dense[0].abs().T).max()
    found = run_packed.multiply(stack, rows, [0], [4])
    assert float((found.double() - expected).abs().max()) < 3e-7 * float(size)
