import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.errors import InputError, RecipeError, RunError
from moe_compress.quant import grid as grid_module
from moe_compress.quant.grid import Grid, Quantized, dequantize, encode, find_scales
from moe_compress.quant.rtn import output_error, round_to_nearest

GRIDS = [Grid(bits, 16, symmetric, signed) for bits in (2, 3, 4, 8) for symmetric, signed in
         ((True, False), (True, True), (False, None))] + [Grid(1, 16), Grid(1.58, 16)]  # fmt: skip
ids = [f"{g.bits}{'s' if g.symmetric else 'a'}{'±' if g.has_signed_scale else ''}" for g in GRIDS]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=ids)


def random_weight(*shape: int, seed: int = 0, tails: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if tails:  # Student-t with 5 degrees of freedom
        weight /= (torch.randn(*shape, 5, generator=generator).square().mean(-1)).sqrt()
    return weight * 0.02


def group_error(weight, quantized, importance=None, power=2.0):
    """Σ importance · |w − ŵ|^power per group, in float64."""
    groups = quantized.scale.shape[-1]
    difference = (weight.double() - dequantize(quantized).double()).abs().pow(power)
    if importance is not None:
        difference = difference * importance.double().unsqueeze(-2)
    return difference.unflatten(-1, (groups, -1)).sum(-1)


def relative_error(weight, quantized):
    return float(group_error(weight, quantized).sum() / weight.double().square().sum())


def test_grid_arguments():
    assert Grid(3, 64).groups(256) == 4
    assert Grid(3, -1).groups(250) == 1
    for bad in ((0, 64), (9, 64), (1.6, 64), (4, 0), (4, -2)):
        with pytest.raises(RecipeError):
            Grid(*bad)
    with pytest.raises(RecipeError, match="1 bit has only a symmetric grid"):
        Grid(1, 64, symmetric=False)
    with pytest.raises(RecipeError, match="a ternary grid is symmetric"):
        Grid(1.58, 64, symmetric=False)
    assert not Grid(1.58, 64).has_signed_scale
    assert (Grid(1.58, 64).center, Grid(1.58, 64).max_code) == (1.0, 2)
    with pytest.raises(RecipeError, match="group_size 48 doesn't divide the row length 64"):
        round_to_nearest(random_weight(2, 64), Grid(4, 48))
    assert [Grid(bits, 64).has_signed_scale for bits in range(1, 9)] == [False, True, True, True] + [False] * 4
    assert Grid(8, 64, signed_scale=True).has_signed_scale
    assert not Grid(4, 64, symmetric=False, signed_scale=True).has_signed_scale


@settings(max_examples=60, deadline=None)
@given(
    grid=st.sampled_from(GRIDS),
    search=st.sampled_from(["mse", "pnorm"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    weighted=st.booleans(),
    tails=st.booleans(),
    shift=st.sampled_from([0.0, 0.01, -0.1]),
    seed=st.integers(0, 1000),
)
def test_search_is_never_worse_than_none(grid, search, dtype, weighted, tails, shift, seed):
    weight = random_weight(2, 5, 48, seed=seed, tails=tails) + shift
    importance = random_weight(2, 48, seed=seed + 1).abs().pow(3) if weighted else None
    power = 2.0 if search == "mse" else 2.4
    plain = round_to_nearest(weight, grid, search="none", scale_dtype=dtype)
    found = round_to_nearest(weight, grid, search=search, scale_dtype=dtype, importance=importance)
    errors = [group_error(weight, q, importance, power) for q in (found, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()  # float32 against float64


@every_grid
@pytest.mark.parametrize("tails", [False, True])
def test_close_to_an_exhaustive_search(grid, tails):
    weight = random_weight(64, 16, tails=tails) + 0.003
    best = torch.full((64,), math.inf, dtype=torch.float64)
    zeros = [grid.center] if grid.symmetric else range(grid.max_code + 1)
    if not grid.symmetric and grid.bits == 8:
        zeros = range(0, 256, 15)
    top = 2.2 * weight.abs().amax(-1, keepdim=True)
    for zero in zeros:
        for sign in (1, -1) if grid.has_signed_scale else (1,):
            for fraction in torch.linspace(0.005, 1, 700).tolist():
                low, high = -zero, grid.max_code - zero
                scale = sign * fraction * top / max(abs(low), high, 1)
                if grid.bits == 1:
                    level = torch.where(weight < 0, -0.5, 0.5)
                else:
                    level = (weight / scale).round().clamp(low, high)
                best = torch.minimum(best, (weight - scale * level).double().square().sum(-1))
    found = group_error(weight, round_to_nearest(weight, grid, scale_dtype=torch.float32)).squeeze(-1)
    # At 8 bits the errors are all but 0 and a hundredth of a step decides; a series of candidates can't be that fine.
    assert found.sum() <= best.sum() * (1.3 if grid.bits == 8 else 1.005)
    if grid.bits < 8:
        assert (found <= best * 1.5).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_outlier_in_a_whole_row(bits):
    weight = random_weight(8, 1024)
    weight[:, 5] = 1.0  # fifty standard deviations
    best = torch.full((8,), math.inf, dtype=torch.float64)
    for scale in torch.logspace(-3, 0.1, 2000):
        for sign in (1, -1):
            level = (weight / (sign * scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            best = torch.minimum(best, (weight - sign * scale * level).double().square().sum(-1))
    found = group_error(weight, round_to_nearest(weight, Grid(bits, -1))).squeeze(-1)
    assert found.sum() <= best.sum() * 1.02


def test_signed_scales_help():
    for tails in (False, True):
        weight = random_weight(128, 256, tails=tails)
        for bits, gain in ((2, 0.90), (3, 0.90), (4, 0.95)):
            signed = round_to_nearest(weight, Grid(bits, 64))
            unsigned = round_to_nearest(weight, Grid(bits, 64, signed_scale=False))
            assert (signed.scale < 0).any()
            assert (unsigned.scale > 0).all()
            assert relative_error(weight, signed) < gain * relative_error(weight, unsigned)


@every_grid
@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_the_nearest_to_the_stored_scale(grid, search, dtype):
    weight = random_weight(3, 4, 32, tails=True)
    found = round_to_nearest(weight, grid, search=search, scale_dtype=dtype)
    assert found.codes.shape == weight.shape
    assert found.codes.dtype == torch.uint8
    assert found.scale.shape == (3, 4, 2)
    assert found.scale.dtype == dtype
    assert (found.zero is None) == grid.symmetric
    # All values that the group can have, computed from what is stored.
    zero = torch.tensor(grid.center) if found.zero is None else found.zero.double()
    levels = torch.arange(grid.max_code + 1).double() - zero.unsqueeze(-1)
    values = (found.scale.double().unsqueeze(-1) * levels).repeat_interleave(16, dim=-2)
    distances = (weight.double().unsqueeze(-1) - values).abs()
    chosen = values.gather(-1, found.codes.long().unsqueeze(-1)).squeeze(-1)
    assert ((weight.double() - chosen).abs() <= distances.amin(-1) * (1 + 1e-5) + 1e-9).all()
    # Dequantized: that value, rounded once.
    assert torch.equal(dequantize(found), chosen.float())
    if dtype != torch.float32:
        for target in (torch.bfloat16, torch.float16):
            assert torch.equal(dequantize(found, target), chosen.float().to(target))


@every_grid
def test_idempotent(grid):
    weight = random_weight(3, 4, 32)
    found = round_to_nearest(weight, grid)
    again = encode(dequantize(found), found.scale, found.zero, grid)
    assert torch.equal(again, found.codes)
    # The scale that ends at the largest weight finds itself again.
    if grid.has_signed_scale or grid.bits == 1:
        found = round_to_nearest(weight, grid, search="none")
        again = round_to_nearest(dequantize(found), grid, search="none")
        assert torch.equal(dequantize(again), dequantize(found))


@every_grid
@pytest.mark.parametrize("search", ["none", "mse", "pnorm"])
def test_zero_groups_stay_zero(grid, search):
    weight = random_weight(3, 4, 32)
    weight[1, 2, 16:] = 0
    weight[2] = 0
    importance = torch.ones(3, 32)
    importance[0, :16] = 0  # nothing matters in this group: any scale will do, but a finite one
    found = round_to_nearest(weight, grid, search=search, importance=importance)
    restored = dequantize(found)
    assert restored.isfinite().all()
    assert (restored[weight == 0] == 0).all()
    assert (found.scale[2] == 0).all()
    assert (found.scale[0] != 0).all()
    tiny = dequantize(round_to_nearest(weight * 1e-9, grid, search=search, scale_dtype=torch.float16))
    assert tiny.isfinite().all()  # the scales underflow


def test_one_bit():
    weight = random_weight(3, 4, 32)
    found = round_to_nearest(weight, Grid(1, 16), scale_dtype=torch.float32)
    torch.testing.assert_close(found.scale / 2, weight.abs().unflatten(-1, (2, 16)).mean(-1))
    assert torch.equal(found.codes, (weight >= 0).to(torch.uint8))
    torch.testing.assert_close(dequantize(found).abs(), (found.scale / 2).repeat_interleave(16, dim=-1))
    importance = random_weight(3, 32, seed=1).square()
    weighted = round_to_nearest(weight, Grid(1, 16), scale_dtype=torch.float32, importance=importance)
    numerator = (weight.abs() * importance[:, None]).unflatten(-1, (2, 16)).sum(-1)
    expected = numerator / importance.unflatten(-1, (2, 16)).sum(-1)[:, None]
    torch.testing.assert_close(weighted.scale / 2, expected)


@every_grid
def test_experts_rows_and_chunks_are_independent(grid, monkeypatch):
    weight = random_weight(5, 7, 32)
    importance = random_weight(5, 32, seed=1).square()
    whole = round_to_nearest(weight, grid, importance=importance)
    single = [round_to_nearest(w, grid, importance=i) for w, i in zip(weight, importance, strict=True)]
    assert torch.equal(whole.codes, torch.stack([q.codes for q in single]))
    assert torch.equal(whole.scale, torch.stack([q.scale for q in single]))
    for limit in (1, 100, 500):
        monkeypatch.setitem(grid_module.CHUNK_WEIGHTS, "cpu", limit)
        chunked = round_to_nearest(weight.transpose(1, 2).contiguous().transpose(1, 2), grid, importance=importance)
        if grid.bits < 8:  # at 8 bits, rounding (a chunk of one row is summed otherwise) may decide between candidates
            assert torch.equal(whole.codes, chunked.codes)
            assert torch.equal(whole.scale, chunked.scale)
        errors = [group_error(weight, q, importance).sum() for q in (whole, chunked)]
        torch.testing.assert_close(*errors, rtol=0.02, atol=0)


def test_whole_row_groups_and_empty_stacks():
    weight = random_weight(3, 48)
    rows, group = (round_to_nearest(weight, Grid(3, size)) for size in (-1, 48))
    assert rows.scale.shape == (3, 1)
    assert torch.equal(dequantize(rows), dequantize(group))
    nothing = round_to_nearest(torch.zeros(0, 3, 48), Grid(3, 16))
    assert nothing.scale.shape == (0, 3, 3)
    assert dequantize(nothing).shape == (0, 3, 48)


def test_importance_moves_the_error():
    weight = random_weight(32, 64)
    importance = torch.ones(64)
    importance[::16] = 1000
    blind, seeing = (round_to_nearest(weight, Grid(3, 64), importance=i) for i in (None, importance))
    error = [(weight - dequantize(q)).square()[:, ::16].sum() for q in (blind, seeing)]
    assert error[1] < 0.5 * error[0]


def test_bad_values():
    weight = random_weight(2, 32)
    for bad in (math.nan, math.inf, -math.inf):
        broken = weight.clone()
        broken[1, 3] = bad
        for grid in GRIDS:
            with pytest.raises(RunError, match="NaN or infinity"):
                find_scales(broken, grid)
    with pytest.raises(RunError, match=r"doesn't fit torch\.float16"):
        find_scales(weight * 1e9, Grid(4, 16), scale_dtype=torch.float16)
    for importance in (torch.full((32,), -1.0), torch.full((32,), math.nan), torch.ones(16), torch.ones(3, 32)):
        with pytest.raises(InputError, match="importance"):
            find_scales(weight, Grid(4, 16), importance=importance)
    with pytest.raises(InputError, match="known: none, mse, pnorm"):
        find_scales(weight, Grid(4, 16), search="best")
    with pytest.raises(InputError, match="scale_dtype"):
        find_scales(weight, Grid(4, 16), scale_dtype=torch.float64)
    with pytest.raises(InputError, match=r"\[..., out, in\]"):
        find_scales(weight[0], Grid(4, 16))
    with pytest.raises(InputError, match=r"scale is \[2, 1\], not \[2, 2\]"):
        encode(weight, torch.ones(2, 1), None, Grid(4, 16))
    codes, zero = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"zero is \[2, 1\]"):
        dequantize(Quantized(codes, torch.ones(2, 2), zero, Grid(4, 16, False)))


def test_output_error_is_the_trace(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(3, 5, 24, generator=generator)
    tokens = torch.randn(3, 40, 24, generator=generator)
    hessian = tokens.transpose(1, 2) @ tokens
    expected = torch.einsum("eok,etk->eot", difference.double(), tokens.double()).square().sum(-1)
    for block in (24, 7, 512):
        monkeypatch.setattr("moe_compress.quant.rtn.ERROR_BLOCK", block)
        torch.testing.assert_close(output_error(difference, hessian), expected, rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="hessian"):
        output_error(difference, hessian[:2])


@pytest.mark.parametrize("weighted", [False, True])
def test_ternary_scales_are_optimal(weighted):
    """No assignment of {−, 0, +} to the eight weights of a group has less error at its own best scale."""
    weight = random_weight(40, 8, tails=True)
    importance = random_weight(8, seed=4).abs() if weighted else torch.ones(8)
    level_A8 = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 8).double()
    weight_64, importance_64 = weight.double(), importance.double()
    product_OA = (weight_64 * importance_64) @ level_A8.T
    norm_A = (level_A8.square() @ importance_64).clamp_min(1e-300)
    best_O = (weight_64.square() @ importance_64) - (product_OA.square() / norm_A).amax(1)
    found = round_to_nearest(weight, Grid(1.58, -1), importance=importance, scale_dtype=torch.float32)
    torch.testing.assert_close(group_error(weight, found, importance).squeeze(-1), best_O, rtol=1e-5, atol=1e-12)
