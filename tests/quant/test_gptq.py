import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.errors import DataError, InputError, RecipeError, RunError
from moe_compress.quant import gptq as gptq_module
from moe_compress.quant.gptq import gptq, shrink_hessians
from moe_compress.quant.grid import Grid, Quantized, dequantize, encode, find_scales
from moe_compress.quant.rtn import output_error, round_to_nearest


def random_problem(experts=3, rows=24, columns=64, tokens=200, spread=1.0, seed=0):
    """Weights, and Hessians of tokens whose channels are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight_EOK = torch.randn(experts, rows, columns, generator=generator) * 0.05
    mix_EKK = torch.randn(experts, columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    size_EK = torch.exp(0.5 * spread * torch.randn(experts, 1, columns, generator=generator))
    tokens_ETK = torch.randn(experts, tokens, columns, generator=generator) @ (mix_EKK * spread) * size_EK
    return weight_EOK, tokens_ETK.transpose(1, 2) @ tokens_ETK


def trace_error(weight_OK, quantized_OK, hessian_KK):
    difference = (weight_OK - quantized_OK).double()
    return float(torch.trace(difference @ hessian_KK.double() @ difference.T))


def textbook_pass(weight_OK, hessian_KK, order, scale_OG, zero_OG, grid, damping=0.01, refit=None):
    """One expert, one column at a time, float64, the inverse of H updated explicitly: what the paper describes.

    Returns the codes, what was rounded, and the inverse conditional variances, all in the original order.
    """
    weight, hessian = weight_OK.double().clone(), hessian_KK.double().clone()
    size = weight.shape[1] // scale_OG.shape[1]
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] += diagonal.mean()
    diagonal += damping * hessian_KK.double().diagonal().mean()
    inverse = torch.linalg.inv(hessian)
    codes, rounded, variance = torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight[0])
    for column in order:
        group = column // size
        if refit is not None and column % size == 0:
            part = slice(column, column + size)
            scale, zero = refit(weight[:, part].float(), part)
            scale_OG[:, group] = scale[:, 0]
            if zero is not None:
                zero_OG[:, group] = zero[:, 0]
        scale = scale_OG[:, group].double()
        zero = grid.center if zero_OG is None else zero_OG[:, group].double()
        if grid.bits == 1:
            codes[:, column] = (weight[:, column] / scale >= 0).double()
        else:
            codes[:, column] = ((weight[:, column] / scale).round() + zero).clamp(0, grid.max_code)
        rounded[:, column] = weight[:, column]
        variance[column] = 1 / inverse[column, column]
        error = (weight[:, column] - scale * (codes[:, column] - zero)) * variance[column]
        weight -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) * variance[column]
    return codes.to(torch.uint8), rounded, variance


def textbook(weight_OK, hessian_KK, grid, order, passes):
    """`gptq` of one expert by textbook passes: codes, dequantized weight."""
    unit = hessian_KK.double().diagonal().mean()
    damped = (hessian_KK.double().diagonal() / unit + 0.01).float()
    best = round_to_nearest(weight_OK, grid, importance=damped)
    columns = weight_OK.shape[1]
    sequence = damped.argsort(descending=True, stable=True).tolist() if order == "static" else list(range(columns))
    scale, zero = best.scale.clone(), None if best.zero is None else best.zero.clone()
    _, _, variance = textbook_pass(weight_OK, hessian_KK, sequence, scale, zero, grid)
    importance = (damped * variance / unit).sqrt().float()

    def refit(part, where):
        return find_scales(part, Grid(grid.bits, -1, grid.symmetric), importance=importance[where])

    for _ in range(passes):
        codes, rounded, _ = textbook_pass(
            weight_OK, hessian_KK, sequence, scale, zero, grid, refit=refit if order == "none" else None
        )
        found = Quantized(codes, scale.clone(), None if zero is None else zero.clone(), grid)
        errors = [output_error((dequantize(q) - weight_OK)[None], hessian_KK[None])[0] for q in (found, best)]
        pick = (errors[0] < errors[1])[:, None]
        best = Quantized(
            torch.where(pick, found.codes, best.codes),
            torch.where(pick, found.scale, best.scale),
            None if found.zero is None else torch.where(pick, found.zero, best.zero),
            grid,
        )
        scale, zero = find_scales(rounded.float(), grid, importance=importance)
    return best


@pytest.mark.parametrize("grid", [Grid(1, 16), Grid(2, 16), Grid(3, 32), Grid(4, -1), Grid(3, 16, symmetric=False)])
@pytest.mark.parametrize(("order", "passes"), [("static", 1), ("static", 2), ("none", 1)])
@pytest.mark.parametrize("tokens", [200, 20])
def test_same_as_the_textbook(grid, order, passes, tokens):
    weight_EOK, hessian_EKK = random_problem(tokens=tokens)
    result = gptq(weight_EOK, hessian_EKK, grid, order=order, passes=passes, block=24)
    same = []
    for expert in range(len(weight_EOK)):
        expected = textbook(weight_EOK[expert], hessian_EKK[expert], grid, order, passes)
        same.append((result.quantized.codes[expert] == expected.codes).all(-1))
        error = trace_error(weight_EOK[expert], dequantize(expected), hessian_EKK[expert])
        assert float(result.error_E[expert]) == pytest.approx(error, rel=0.05)
        mine = trace_error(weight_EOK[expert], dequantize(result.quantized)[expert], hessian_EKK[expert])
        assert float(result.error_E[expert]) == pytest.approx(mine, rel=1e-4)
    # A tie that float32 breaks otherwise than float64 changes the rest of its row; it is rare.
    assert torch.cat(same).float().mean() >= 0.95


@pytest.mark.parametrize("order", ["static", "none"])
def test_ill_conditioned_hessians(order):
    """Eigenvalues over twelve orders of magnitude, and rank 3: finite, no worse than rounding, as good as float64."""
    weight_EOK, hessian_EKK = random_problem(experts=2, columns=48)
    generator = torch.Generator().manual_seed(1)
    rotation_KK = torch.linalg.qr(torch.randn(48, 48, generator=generator))[0]
    hessian_EKK[0] = (rotation_KK * torch.logspace(4, -8, 48)) @ rotation_KK.T
    hessian_EKK[1] = rotation_KK[:, :3] @ rotation_KK[:, :3].T
    result = gptq(weight_EOK, hessian_EKK, Grid(3, 16), order=order, passes=1)
    assert torch.equal(result.damping_E, torch.full((2,), 0.01))
    assert (result.error_E <= result.rtn_error_E).all()
    for expert in range(2):
        expected = textbook(weight_EOK[expert], hessian_EKK[expert], Grid(3, 16), order, 1)
        error = trace_error(weight_EOK[expert], dequantize(expected), hessian_EKK[expert])
        assert float(result.error_E[expert]) == pytest.approx(error, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 4),
    symmetric=st.booleans(),
    order=st.sampled_from(["static", "none"]),
    passes=st.integers(1, 3),
    search=st.sampled_from(["none", "mse", "pnorm"]),
    tokens=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
def test_never_worse_than_rounding(bits, symmetric, order, passes, search, tokens, seed):
    """Guaranteed, for every row: the tokens that the Hessian saw have no larger error than with round-to-nearest."""
    grid = Grid(bits, 8, symmetric or bits == 1)
    weight_EOK, hessian_EKK = random_problem(experts=2, rows=4, columns=16, tokens=tokens, seed=seed)
    result = gptq(weight_EOK, hessian_EKK, grid, order=order, passes=passes, search=search)
    assert (result.error_E <= result.rtn_error_E).all()
    assert (result.rtn_rows_E >= 0).all()
    assert (result.rtn_rows_E <= 4).all()
    more = gptq(weight_EOK, hessian_EKK, grid, order=order, passes=passes + 1, search=search)
    assert (more.error_E <= result.error_E).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_much_better_than_rounding_on_correlated_inputs(bits):
    """Statistical: no theorem, but what the method is for. Measured: 0.42 to 0.56 of round-to-nearest's error."""
    weight_EOK, hessian_EKK = random_problem(experts=4, rows=48, columns=128, tokens=600)
    result = gptq(weight_EOK, hessian_EKK, Grid(bits, 32))
    plain = gptq(weight_EOK, hessian_EKK, Grid(bits, 32), passes=1)
    assert (result.error_E < 0.6 * result.rtn_error_E).all()
    assert (result.error_E < plain.error_E).all()
    assert torch.equal(result.rtn_error_E, plain.rtn_error_E)


def test_reported_rounding_error_is_that_of_round_to_nearest():
    weight_EOK, hessian_EKK = random_problem()
    result = gptq(weight_EOK, hessian_EKK, Grid(3, 16))
    unit_E = hessian_EKK.diagonal(dim1=1, dim2=2).mean(1)
    damped_EK = hessian_EKK.diagonal(dim1=1, dim2=2) / unit_E[:, None] + 0.01
    nearest = dequantize(round_to_nearest(weight_EOK, Grid(3, 16), importance=damped_EK))
    for expert in range(3):
        error = trace_error(weight_EOK[expert], nearest[expert], hessian_EKK[expert])
        assert float(result.rtn_error_E[expert]) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("grid", [Grid(1, 16), Grid(3, 16), Grid(3, 16, symmetric=False)])
@pytest.mark.parametrize("order", ["static", "none"])
def test_diagonal_hessian_is_rounding(grid, order):
    """Without correlations nothing can make up for anything."""
    weight_EOK, hessian_EKK = random_problem()
    hessian_EKK = torch.diag_embed(hessian_EKK.diagonal(dim1=1, dim2=2))
    result = gptq(weight_EOK, hessian_EKK, grid, order=order, passes=1, scale_dtype=torch.float32)
    if order == "static":
        expected = encode(weight_EOK, result.quantized.scale, result.quantized.zero, grid)
        assert torch.equal(result.quantized.codes, expected)
        assert torch.equal(result.error_E, result.rtn_error_E)
    torch.testing.assert_close(result.error_E, result.rtn_error_E, rtol=1e-3, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), symmetric=st.booleans(), tokens=st.integers(1, 8))
def test_between_the_optimum_and_rounding(seed, symmetric, tokens):
    """Four weights at 2 bits: all 256 code vectors can be tried, for the scale that the row ended up with."""
    weight_EOK, hessian_EKK = random_problem(experts=1, rows=3, columns=4, tokens=tokens, seed=seed)
    result = gptq(weight_EOK, hessian_EKK, Grid(2, 4, symmetric), passes=1)
    every_NK = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)
    optimum = 0.0
    for row in range(3):
        scale_N1 = result.quantized.scale[0, row].expand(256, 1)
        zero_N1 = None if symmetric else result.quantized.zero[0, row].expand(256, 1)
        values_NK = dequantize(Quantized(every_NK, scale_N1, zero_N1, result.quantized.grid))
        difference_NK = (values_NK - weight_EOK[0, row]).double()
        errors_N = torch.einsum("nk,kl,nl->n", difference_NK, hessian_EKK[0].double(), difference_NK)
        optimum += float(errors_N.min())
    noise = 1e-6 * float(result.rtn_error_E)
    assert optimum - noise <= float(result.error_E) <= float(result.rtn_error_E)


def test_work_is_split_without_effect():
    weight_EOK, hessian_EKK = random_problem(experts=5)
    expected = gptq(weight_EOK, hessian_EKK, Grid(3, 16), block=64)
    for options in ({"memory_limit": 1}, {"memory_limit": 200_000}, {"block": 7}, {"block": 48}, {"block": 1000}):
        result = gptq(weight_EOK, hessian_EKK, Grid(3, 16), **options)
        same = (result.quantized.codes == expected.quantized.codes).all(-1)
        assert same.float().mean() > 0.95  # sums in another order
        torch.testing.assert_close(result.error_E, expected.error_E, rtol=0.01, atol=0)
    again = gptq(weight_EOK, hessian_EKK, Grid(3, 16), block=64)
    assert torch.equal(again.quantized.codes, expected.quantized.codes)
    assert torch.equal(again.error_E, expected.error_E)


@pytest.mark.parametrize("order", ["static", "none"])
def test_rows_are_independent(order):
    """So gate and up projections can be stacked along the output dimension."""
    weight_EOK, hessian_EKK = random_problem()
    whole = gptq(weight_EOK, hessian_EKK, Grid(3, 16), order=order)
    halves = [gptq(part, hessian_EKK, Grid(3, 16), order=order) for part in weight_EOK.split(12, dim=1)]
    codes_EOK = torch.cat([half.quantized.codes for half in halves], dim=1)
    assert (whole.quantized.codes == codes_EOK).all(-1).float().mean() > 0.95
    torch.testing.assert_close(whole.error_E, halves[0].error_E + halves[1].error_E, rtol=0.01, atol=0)


def test_the_scale_of_the_hessian_does_not_matter():
    weight_EOK, hessian_EKK = random_problem()
    expected = gptq(weight_EOK, hessian_EKK, Grid(3, 16))
    for factor, dtype in ((2.0**-30, torch.float32), (2.0**40, torch.float32), (2.0**-300, torch.float64)):
        result = gptq(weight_EOK.to(torch.bfloat16).to(dtype), hessian_EKK.to(dtype) * factor, Grid(3, 16))
        expected = gptq(weight_EOK.to(torch.bfloat16), hessian_EKK, Grid(3, 16))
        torch.testing.assert_close(result.error_E / factor, expected.error_E, rtol=1e-3, atol=0)


@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_dead_channels_and_dead_experts(order, damping):
    weight_EOK, hessian_EKK = random_problem()
    dead = [0, 17, 63]
    hessian_EKK[0, dead] = 0
    hessian_EKK[0, :, dead] = 0
    hessian_EKK[1] = 0
    result = gptq(weight_EOK, hessian_EKK, Grid(4, 16), order=order, damping=damping)
    quantized = result.quantized
    restored_EOK = dequantize(quantized)
    assert restored_EOK.isfinite().all()
    nearest = encode(weight_EOK, quantized.scale, quantized.zero, quantized.grid)
    assert torch.equal(quantized.codes[0][:, dead], nearest[0][:, dead])
    assert torch.equal(quantized.codes[1], nearest[1])
    expected = 0.5 * quantized.scale[1].abs().float().repeat_interleave(16, dim=-1)
    inside = (quantized.codes[1] > 0) & (quantized.codes[1] < 15)
    assert ((restored_EOK[1] - weight_EOK[1]).abs() <= expected * 1.001)[inside].all()
    assert float(result.error_E[1]) == float(result.rtn_error_E[1]) == 0
    assert float(result.error_E[0]) < float(result.rtn_error_E[0])


def test_damping_grows_only_where_it_must():
    weight_EOK, hessian_EKK = random_problem(experts=3, columns=16)
    hessian_EKK[1] = torch.diag_embed(torch.ones(16))
    hessian_EKK[1, 0, 1] = hessian_EKK[1, 1, 0] = 1.5  # an eigenvalue of -0.5, as sums in low precision can give
    result = gptq(weight_EOK, hessian_EKK, Grid(4, 16))
    torch.testing.assert_close(result.damping_E, torch.tensor([0.01, 1.0, 0.01]))
    assert dequantize(result.quantized).isfinite().all()
    alone = gptq(weight_EOK[2:], hessian_EKK[2:], Grid(4, 16))
    assert torch.equal(alone.quantized.codes[0], result.quantized.codes[2])
    hessian_EKK[1] *= -1
    with pytest.raises(RunError, match="expert 1 has a negative diagonal"):
        gptq(weight_EOK, hessian_EKK, Grid(4, 16), memory_limit=1)
    hessian_EKK[1] = torch.ones(16, 16) * 100 - torch.eye(16) * 99
    hessian_EKK[1, 0, 1:] = hessian_EKK[1, 1:, 0] = -100
    with pytest.raises(RunError, match="expert 1 isn't positive semidefinite"):
        gptq(weight_EOK, hessian_EKK, Grid(4, 16))
    zero_damping = gptq(weight_EOK[:1], torch.ones(1, 16, 16), Grid(4, 16), damping=0.0)
    assert float(zero_damping.damping_E) <= 1e-3


def test_errors():
    weight_EOK, hessian_EKK = random_problem()
    for bad in (math.nan, math.inf):
        broken = hessian_EKK.clone()
        broken[2, 3, 4] = bad
        with pytest.raises(RunError, match="expert 2 contains NaN or infinity"):
            gptq(weight_EOK, broken, Grid(4, 16), memory_limit=1)
        broken = weight_EOK.clone()
        broken[2, 3, 4] = bad
        with pytest.raises(RunError, match="weights contain NaN or infinity"):
            gptq(broken, hessian_EKK, Grid(4, 16))
    with pytest.raises(RecipeError, match="doesn't divide"):
        gptq(weight_EOK, hessian_EKK, Grid(4, 48))
    with pytest.raises(InputError, match="hessian has shape"):
        gptq(weight_EOK, hessian_EKK[:2], Grid(4, 16))
    with pytest.raises(InputError, match=r"\[experts, out, in\]"):
        gptq(weight_EOK[0], hessian_EKK[0], Grid(4, 16))
    with pytest.raises(InputError, match="known: none, static"):
        gptq(weight_EOK, hessian_EKK, Grid(4, 16), order="activation")
    for options in ({"block": 0}, {"passes": 0}, {"damping": -0.1}, {"damping": math.nan}):
        with pytest.raises(InputError, match="at least 1"):
            gptq(weight_EOK, hessian_EKK, Grid(4, 16), **options)


def test_shrinking_hessians():
    _, hessian_EKK = random_problem(experts=4, columns=16)
    tokens_E = torch.tensor([0, 4, 1000, 10])
    hessian_EKK[0] = 0
    mean_KK = hessian_EKK.double().sum(0) / 1014
    shrunk_EKK = shrink_hessians(hessian_EKK, tokens_E, 4.0)
    assert torch.equal(shrunk_EKK[0], mean_KK.float())
    torch.testing.assert_close(shrunk_EKK[1], (0.5 * hessian_EKK[1] / 4 + 0.5 * mean_KK).float())
    torch.testing.assert_close(shrunk_EKK[3], ((hessian_EKK[3] + 4 * mean_KK) / 14).float())
    assert shrunk_EKK.dtype == hessian_EKK.dtype
    # The default is K; none at all is the expert's own mean, except where there is none.
    assert torch.equal(shrink_hessians(hessian_EKK, tokens_E), shrink_hessians(hessian_EKK, tokens_E, 16.0))
    own_EKK = shrink_hessians(hessian_EKK, tokens_E, 0.0)
    torch.testing.assert_close(own_EKK[2], hessian_EKK[2] / 1000)
    assert torch.equal(own_EKK[0], mean_KK.float())
    # Some experts at a time, with the layer's mean.
    parts = [shrink_hessians(hessian_EKK[p], tokens_E[p], 4.0, mean_KK) for p in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), shrunk_EKK)
    assert torch.equal(parts[0][0], mean_KK.float())
    with pytest.raises(InputError, match="mean Hessian"):
        shrink_hessians(hessian_EKK, tokens_E, 4.0, mean_KK[:8])
    with pytest.raises(DataError, match="no expert of this layer saw a token"):
        shrink_hessians(hessian_EKK, torch.zeros(4))
    with pytest.raises(InputError, match="token counts"):
        shrink_hessians(hessian_EKK, tokens_E[:3])
    with pytest.raises(InputError, match="can be negative"):
        shrink_hessians(hessian_EKK, tokens_E, -1.0)


def test_hessians_are_shrunk_where_they_are():
    """Counts are on the CPU, wherever the Hessians are. (The meta device refuses other devices as a GPU does.)"""
    hessian_EKK = torch.ones(3, 16, 16, device="meta")
    shrunk_EKK = shrink_hessians(hessian_EKK, torch.tensor([0.0, 2.0, 5.0]), 4.0, hessian_EKK[0])
    assert (shrunk_EKK.device.type, shrunk_EKK.shape) == ("meta", hessian_EKK.shape)


def test_a_starved_expert_gains_from_its_layer():
    """Eight tokens for 64 channels: on the tokens it will see, its own Hessian alone misleads."""
    generator = torch.Generator().manual_seed(0)
    mix_KK = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    weight_EOK = torch.randn(8, 32, 64, generator=generator)
    tokens = [torch.randn(n, 64, generator=generator) @ mix_KK for n in (8, *[300] * 7)]
    hessian_EKK = torch.stack([t.T @ t for t in tokens])
    counts_E = torch.tensor([len(t) for t in tokens])
    later_EKK = (mix_KK.T @ mix_KK).expand(8, 64, 64)

    def later_error(strength):
        result = gptq(weight_EOK, shrink_hessians(hessian_EKK, counts_E, strength), Grid(3, 16))
        return float(output_error(dequantize(result.quantized) - weight_EOK, later_EKK)[0].sum())

    assert later_error(None) < 0.7 * later_error(0.0)


def test_inner_blocks_do_not_matter(monkeypatch):
    weight_EOK, hessian_EKK = random_problem()
    expected = gptq(weight_EOK, hessian_EKK, Grid(3, 16))
    monkeypatch.setattr(gptq_module, "INNER", 5)
    result = gptq(weight_EOK, hessian_EKK, Grid(3, 16))
    assert (result.quantized.codes == expected.quantized.codes).all(-1).float().mean() > 0.95
