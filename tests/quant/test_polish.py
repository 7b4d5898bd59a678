"""Coordinate descent over codes and scales against plain float64 loops, and what it promises of the error."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gptq import random_problem, trace_error

from moe_compress.quant.gptq import gptq
from moe_compress.quant.grid import Grid, Quantized, dequantize
from moe_compress.quant.polish import polish
from moe_compress.quant.rtn import round_to_nearest

KINDS = [(1, 16, True), (1.58, 16, True), (2, 16, True), (2, 16, False), (3, -1, True), (4, 16, False), (4, 48, True)]
KINDS.append((3, 24, True))  # groups that don't end with a block of columns
GRIDS = [Grid(bits, group, symmetric) for bits, group, symmetric in KINDS]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def slow(weight, hessian, start, row, sweeps):
    """One row, one coordinate at a time: every code tries all levels, every scale the minimum of its parabola."""
    grid, groups = start.grid, start.scale.shape[-1]
    size, columns = len(weight) // groups, len(weight)
    scale = start.scale[row].double().clone()
    zero = [grid.center if start.zero is None else float(start.zero[row, g]) for g in range(groups)]
    level = torch.cat([start.codes[row].double().view(groups, size)[g] - zero[g] for g in range(groups)])

    def error(scale, level):
        difference = weight.double() - level * scale.repeat_interleave(size)
        return float(difference @ hessian.double() @ difference)

    for _ in range(sweeps):
        for group in range(groups):
            own = slice(group * size, (group + 1) * size)
            direction = torch.zeros(columns, dtype=torch.float64)
            direction[own] = level[own]
            curvature = direction @ hessian.double() @ direction
            if curvature > 0:
                rest = weight.double() - level * scale.repeat_interleave(size)
                moved = scale.clone()
                moved[group] += (direction @ hessian.double() @ rest) / curvature
                moved[group] = float(moved[group].to(start.scale.dtype))
                if error(moved, level) < error(scale, level):
                    scale = moved
            for column in range(own.start, own.stop):
                tried = []
                for code in range(grid.max_code + 1):
                    level[column] = code - zero[group]
                    tried.append((error(scale, level), code - zero[group]))
                level[column] = min(tried)[1]
    return error(scale, level)


@every_grid
def test_equals_a_plain_loop(grid):
    weight_EOK, hessian_EKK = random_problem(experts=2, rows=4, columns=48, tokens=60, seed=1)
    hessian_EKK += 0.5 * torch.eye(48)
    start = round_to_nearest(weight_EOK, grid, scale_dtype=torch.float32)
    for sweeps in (1, 3):
        found = dequantize(polish(weight_EOK, hessian_EKK, start, sweeps).quantized)
        close = 0
        for expert, row in itertools.product(range(2), range(4)):
            own = Quantized(
                start.codes[expert], start.scale[expert], None if start.zero is None else start.zero[expert], grid
            )
            expected = slow(weight_EOK[expert, row], hessian_EKK[expert], own, row, sweeps)
            got = trace_error(weight_EOK[expert, row : row + 1], found[expert, row : row + 1], hessian_EKK[expert])
            close += abs(got - expected) <= 1e-4 * expected
        assert close >= 7  # in float32 a code in the middle of two may go the other way, and paths part


@every_grid
def test_says_what_changed(grid):
    """Of every row tr(Δ H Δᵀ) and ‖Δ‖², against both in float64; more columns than a panel, the last one narrower."""
    weight_EOK, hessian_EKK = random_problem(experts=2, rows=4, columns=336, tokens=200, seed=2)
    start = round_to_nearest(weight_EOK, grid)
    found = polish(weight_EOK, hessian_EKK, start, 2)
    before, after = (weight_EOK.double() - dequantize(q).double() for q in (start, found.quantized))
    for got, of in (
        (found.change_EO, hessian_EKK.double()),
        (found.squares_EO, torch.eye(336).double().expand(2, -1, -1)),
    ):
        errors = [((delta @ of) * delta).sum(2) for delta in (before, after)]
        torch.testing.assert_close(got, errors[1] - errors[0], rtol=1e-4, atol=2e-6 * float(errors[0].max()))
    assert (found.change_EO < 0).all()


@settings(max_examples=40, deadline=None)
@given(
    grid=st.sampled_from(GRIDS),
    tokens=st.integers(0, 80),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_never_worse(grid, tokens, dtype, seed):
    """Whatever the rank of the Hessian, from sweep to sweep; and zero points stay."""
    weight_EOK, hessian_EKK = random_problem(experts=2, rows=6, columns=48, tokens=tokens, seed=seed)
    weight_EOK[0, 0] = 0
    last = round_to_nearest(weight_EOK, grid, scale_dtype=dtype)
    size = float(hessian_EKK.diagonal(dim1=1, dim2=2).sum()) * 0.0025
    for sweeps in (0, 1, 1):
        found = polish(weight_EOK, hessian_EKK, last, sweeps).quantized
        assert found.scale.dtype == dtype
        assert (found.zero is None and last.zero is None) or torch.equal(found.zero, last.zero)
        assert int(found.codes.max()) <= grid.max_code
        for expert in range(2):
            for row in range(6):
                one = slice(row, row + 1)
                errors = [
                    trace_error(weight_EOK[expert, one], dequantize(q)[expert, one], hessian_EKK[expert])
                    for q in (found, last)
                ]
                assert errors[0] <= errors[1] * (1 + 1e-5) + 1e-6 * size
        if sweeps == 0:
            assert torch.equal(found.codes, last.codes)
            assert torch.equal(found.scale, last.scale)
        last = found


@every_grid
def test_improves_gptq(grid):
    weight_EOK, hessian_EKK = random_problem(experts=2, rows=48, columns=96, tokens=2000, seed=5)
    plain, polished = (gptq(weight_EOK, hessian_EKK, grid, sweeps=s) for s in (0, 2))
    assert (polished.error_E < 0.97 * plain.error_E).all()
    assert (polished.error_E <= plain.rtn_error_E).all()
    for expert in range(2):  # what it says is what the matrices do
        found = dequantize(polished.quantized)[expert]
        assert trace_error(weight_EOK[expert], found, hessian_EKK[expert]) == pytest.approx(
            float(polished.error_E[expert]), rel=1e-3
        )
