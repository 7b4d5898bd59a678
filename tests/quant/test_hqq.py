"""Half-quadratic quantization against a plain float64 loop over groups, and what it promises of its objective."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.errors import InputError
from moe_compress.quant import grid as grid_module
from moe_compress.quant import hqq
from moe_compress.quant.grid import Grid, dequantize
from moe_compress.quant.hqq import half_quadratic
from moe_compress.quant.rtn import round_to_nearest

GRIDS = [Grid(b, 16, s) for b, s in ((1, True), (1.58, True), (2, True), (2, False), (3, True), (4, False), (8, True))]


def heavy(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tails = torch.randn(*shape, 3, generator=generator).square().mean(-1).sqrt()
    return torch.randn(shape, generator=generator) / tails * 0.02


def objective(weight, quantized, power):
    difference = (weight.double() - dequantize(quantized).double()).abs().pow(power)
    return difference.unflatten(-1, (quantized.scale.shape[-1], -1)).sum(-1)


def levels(weight, scale, zero, grid):
    if grid.bits == 1:
        return torch.where(weight / scale < 0, -0.5, 0.5).double()
    return (weight / scale).round().clamp(-zero, grid.max_code - zero)


def slow(weight, scale, zero, grid, power, iterations):
    """One group in float64; every step from the definition of the method."""
    tries = []
    for index in range(iterations + 1):
        level = levels(weight, scale, zero, grid)
        tries.append((float((weight - scale * level).abs().pow(power).sum()), float(scale), float(zero)))
        beta = hqq.BETA * hqq.GROWTH**index
        rest = []
        for w, q in zip(weight.tolist(), level.tolist(), strict=True):
            error = w / float(abs(scale)) - (q if scale > 0 else -q)
            keep = max(abs(error) - max(abs(error), 1e-8) ** (power - 1) / beta, 0) * (1 if error > 0 else -1)
            rest.append(w - keep * float(abs(scale)))
        target = torch.tensor(rest, dtype=torch.float64)
        if not grid.symmetric:
            code = level + zero
            line = torch.linalg.lstsq(torch.stack([code, torch.ones_like(code)], 1), target[:, None]).solution[:, 0]
            zero = (-line[1] / line[0]).round().clamp(0, grid.max_code)
            level = code - zero
        scale = (level @ target) / (level @ level) if level.any() else scale
    return min(tries)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_a_plain_loop(grid):
    weight = heavy(6, 32, seed=3)
    start = round_to_nearest(weight, grid, scale_dtype=torch.float32)
    found = half_quadratic(weight, grid, iterations=6, scale_dtype=torch.float32)
    agree = 0
    for row in range(6):
        for group in range(2):
            own = weight[row, 16 * group : 16 * group + 16].double()
            zero = torch.tensor(grid.center if start.zero is None else float(start.zero[row, group]))
            least, _, _ = slow(own, start.scale[row, group].double(), zero.double(), grid, 0.7, 6)
            got = float(objective(weight, found, 0.7)[row, group])
            # A code at the very middle of two may go either way in float32, and paths part; hence not all, but most.
            agree += abs(got - least) <= 1e-4 * least
    assert agree >= 11


@settings(max_examples=40, deadline=None)
@given(grid=st.sampled_from(GRIDS), power=st.sampled_from([0.5, 0.7, 1.0]), seed=st.integers(0, 100))
def test_objective_never_increases(grid, power, seed):
    weight = heavy(2, 3, 48, seed=seed) + 0.005 * (seed % 3)
    start = round_to_nearest(weight, grid)
    last = objective(weight, start, power)
    for iterations in (0, 1, 5, 20):
        found = objective(weight, half_quadratic(weight, grid, power=power, iterations=iterations), power)
        assert (found <= last * (1 + 1e-5)).all()
        last = found


@pytest.mark.parametrize("grid", GRIDS[2:6], ids=str)
def test_helps_where_weights_have_outliers(grid):
    weight = heavy(64, 64)
    start, found = round_to_nearest(weight, grid), half_quadratic(weight, grid)
    assert objective(weight, found, 0.7).sum() < 0.99 * objective(weight, start, 0.7).sum()


def test_degenerate_groups_and_chunks(monkeypatch):
    weight = heavy(4, 5, 32)
    weight[0] = 0
    weight[1] = 0.25
    for grid in GRIDS:
        found = half_quadratic(weight, grid)
        assert not dequantize(found)[0].any()
        if grid.bits > 1 or grid.symmetric:
            torch.testing.assert_close(dequantize(found)[1], weight[1], rtol=0.01, atol=0)
        with monkeypatch.context() as patch:
            patch.setitem(grid_module.CHUNK_WEIGHTS, "cpu", 32)
            again = half_quadratic(weight, grid)
        # Sums over other shapes may round otherwise.
        torch.testing.assert_close(objective(weight, again, 0.7), objective(weight, found, 0.7), rtol=1e-3, atol=1e-9)


def test_errors():
    with pytest.raises(InputError, match=r"power 1.5 must be in \(0, 1\]"):
        half_quadratic(heavy(2, 16), GRIDS[2], power=1.5)
