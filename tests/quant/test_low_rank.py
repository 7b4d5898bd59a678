"""Low-rank corrections of quantization error: that they are the best there are, and what runs is what they say."""

import copy

import numpy as np
import pytest
import torch
from packs import DENSE, mixture, pack_block, put
from test_packed import ROUTINGS, expected, first_block, routing

from moe_compress.errors import RunError
from moe_compress.quant.gain import SolverGain, _Shares
from moe_compress.quant.gptq import column_costs, gptq
from moe_compress.quant.grid import Grid, dequantize
from moe_compress.quant.low_rank import Pair, SharedSums, correction, pair_bytes, shares_left
from moe_compress.quant.packed import build_packed
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.run_low_rank import LowRank

E, OUT, K = 4, 12, 20


def problem(seed=0, out=OUT, rows=50):
    """Errors of rounding [E, O, K] and moments of correlated inputs [E, K, K]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(E, out, K, generator=generator)
    error = weight - dequantize(round_to_nearest(weight, Grid(2, -1)))
    inputs = torch.randn(E, rows, K, generator=generator) @ torch.randn(E, K, K, generator=generator)
    return error, inputs.transpose(1, 2) @ inputs / rows


def left(error, hessian):
    """tr(D H Dᵀ) in float64, expert by expert."""
    return np.array(
        [np.trace(d @ h @ d.T) for d, h in zip(error.double().numpy(), hessian.double().numpy(), strict=True)]
    )


@pytest.mark.parametrize("rows", [50, 6])  # 6: singular moments
@pytest.mark.parametrize("out", [OUT, 3 * K])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_no_pair_of_the_rank_leaves_less(rank, out, rows):
    """Exactly what Eckart and Young leave of D H^½, from numpy's decomposition in float64."""
    error, hessian = problem(rank, out, rows)
    pair = correction(error, hessian, rank)
    assert pair.left.shape == (E, out, rank)
    assert pair.right.shape == (E, rank, K)
    found = left(error - pair.product, hessian)
    for e in range(E):
        values, vectors = np.linalg.eigh(hessian[e].double().numpy())
        root = vectors * np.sqrt(values.clip(0))
        singular = np.linalg.svd(error[e].double().numpy() @ root, compute_uv=False)
        best, total = (singular[rank:] ** 2).sum(), (singular**2).sum()
        assert found[e] == pytest.approx(best, rel=1e-3, abs=1e-5 * total)
        share = shares_left(error, hessian, [0, rank])[e]
        assert share[0] == 1
        assert float(share[1]) == pytest.approx(best / total, rel=1e-3, abs=1e-5)
    alike = shares_left(error, torch.eye(K).expand(E, K, K), [rank, 2])
    torch.testing.assert_close(shares_left(error, None, [rank, 2]), alike, rtol=0, atol=1e-6)


def test_it_heeds_what_is_read():
    """A plain decomposition of the error leaves more on the inputs; stored factors hardly more than exact ones."""
    error, hessian = problem()
    plain = correction(error, torch.eye(K).expand(E, K, K), 3)
    ours = correction(error, hessian, 3)
    assert (left(error - ours.product, hessian) < 0.9 * left(error - plain.product, hessian)).all()
    assert (left(error - ours.stored().product, hessian) < 1.001 * left(error - ours.product, hessian)).all()
    assert (left(error - correction(error, hessian, 40).product, hessian) < 1e-4 * left(error, hessian)).all()
    assert not correction(torch.zeros(E, OUT, K), hessian, 2).product.any()
    assert sum(t.nbytes for t in vars(ours.stored()).values()) == E * pair_bytes(OUT, K, 3)
    with pytest.raises(RunError, match="finite"):
        correction(error / 0, hessian, 1)


def test_a_shared_pair_is_the_best_for_all():
    """Against alternating least squares from several starts on the sum over experts itself, float64."""
    error, hessian = problem(5)
    common = torch.randn(OUT, 1, generator=torch.Generator().manual_seed(1)) @ torch.ones(1, K)
    error = error + common
    count = torch.tensor([3.0, 1.0, 0.0, 7.0])
    sums = SharedSums()
    for half in (slice(0, 2), slice(2, 4)):
        sums.add(error[half], hessian[half], count[half])
    pair = sums.pair(2)

    def objective(product):
        return (count.numpy() * left(error - product, hessian)).sum()

    errors, moments = error.double().numpy(), (hessian * count[:, None, None]).double().numpy()
    moment, seen = moments.sum(0), (errors @ moments).sum(0)
    best = np.inf
    for seed in range(5):
        right = np.random.default_rng(seed).normal(size=(2, K))
        for _ in range(300):
            side = seen @ right.T @ np.linalg.inv(right @ moment @ right.T)
            right = np.linalg.solve(side.T @ side, side.T @ seen @ np.linalg.inv(moment))
        best = min(best, objective(torch.from_numpy(side @ right)))
    assert objective(pair.product) == pytest.approx(best, rel=1e-3)
    assert best < 0.8 * objective(torch.zeros(OUT, K))


def shares(**settings):
    return _Shares(SolverGain(bits=(2,), group_size=4, **settings), first_block("qwen3_moe"))


def test_what_a_rank_is_foreseen_to_leave():
    """The spectrum of rounding's error, its columns times R_jj of the damped H in GPTQ's order; near GPTQ's own."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(E, OUT, K, generator=generator)
    _, hessian = problem(1)
    grid, ranks = Grid(2, 4), (0, 1, 4)
    share, left_over = shares(ranks=ranks)._share(weight, hessian, column_costs(hessian), grid)
    rounded = (dequantize(round_to_nearest(weight, grid)) - weight).double()
    for e in range(E):
        h = hessian[e].double() / hessian[e].double().diagonal().mean() + 0.01 * torch.eye(K)
        order = hessian[e].diagonal().argsort(descending=True)
        backwards = order.flip(0)
        factor = torch.linalg.cholesky(h[backwards][:, backwards]).diagonal().flip(0)  # R_jj in GPTQ's order
        singular = torch.linalg.svdvals(rounded[e][:, order] * factor)
        wanted = [float(singular[r:].square().sum() / singular.square().sum()) for r in ranks]
        assert left_over[e].tolist() == pytest.approx(wanted, rel=1e-3)
    own_share, own = shares(ranks=ranks, solve=True)._share(weight, hessian, None, grid)
    solved = weight - dequantize(gptq(weight, hessian, grid).quantized)
    for rank, column in zip(ranks, own.T, strict=True):
        kept = left(solved - correction(solved, hessian, rank).product if rank else solved, hessian)
        assert column.numpy() == pytest.approx(kept / left(solved, hessian), rel=1e-3)
    assert torch.allclose(left_over, own, atol=0.2)
    assert share.shape == own_share.shape == (E,)


def with_pairs(block, choose, shared):
    """Pack a block, and add pairs; both modules as `packed_and_dense` gives them."""
    dense = copy.deepcopy(block)
    values = pack_block(block, choose)
    module, generator = block.experts_module, torch.Generator().manual_seed(2)
    for place, (name, projection) in enumerate(module.projections.items()):
        ranks = [(e + place) % 3 * 2 for e in range(block.num_experts)]
        sides = projection.out_features, projection.in_features

        def pair(rank, *count, sides=sides):
            one = torch.randn(*count, sides[0], rank, generator=generator) / 8
            return Pair(one, torch.randn(*count, rank, sides[1], generator=generator) / 8).stored()

        routed = {r: pair(r, ranks.count(r)) for r in set(ranks) - {0}}
        projection.low_rank = LowRank(ranks, routed, pair(3) if shared else None)
        for e, rank in enumerate(ranks):
            if rank:
                values[name][e] += Pair(*(t[ranks[:e].count(rank)] for t in vars(routed[rank]).values())).product
            if shared:
                values[name][e] += Pair(*projection.low_rank.shared()).product
    put(dense, values)
    return module, dense.experts_module, values


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_runs_as_the_sum_of_both(name, kind, shared):
    """Forward and backward as dense experts with W + A B; described, it has the same tensors."""
    block = first_block(name)
    module, dense, values = with_pairs(block, mixture, shared)
    for key, value in values.items():
        torch.testing.assert_close(getattr(module.weights(), key), value)
    for tokens in (1, 40):
        hidden = torch.randn(tokens, module.hidden_size, generator=torch.Generator().manual_seed(3))
        index, weight = routing(kind, tokens, block.num_experts)
        with torch.no_grad():
            reference = expected(dense, hidden, index, weight)
            scale = float(reference.abs().max() + 1)
            found = module(hidden, index, weight)
            torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-5 * scale)
            assert torch.equal(module.to(torch.bfloat16)(hidden, index, weight), found)  # nothing is cast
    read = hidden.clone().requires_grad_()
    again = hidden.clone().requires_grad_()
    module(read, index, weight).square().sum().backward()
    index = index.clamp_max(block.num_experts - 1), weight * (index < block.num_experts)
    dense(again, *index).square().sum().backward()
    torch.testing.assert_close(read.grad, again.grad, rtol=1e-3, atol=1e-4 * float(again.grad.abs().max() + 1))
    rebuilt = build_packed(block, module.describe()).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in rebuilt.items()} == {
        n: (t.shape, t.dtype) for n, t in module.state_dict().items()
    }


def test_half_precision_rows_are_rounded_no_more_than_twice():
    module, dense, _ = with_pairs(first_block("qwen3_moe"), lambda *_: DENSE, True)
    hidden = torch.randn(20, module.hidden_size).bfloat16()
    index, weight = routing("spread", 20, module.num_experts)
    with torch.no_grad():
        found = module(hidden, index, weight)
        reference = expected(dense, hidden.float(), index, weight)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), reference, rtol=0.05, atol=0.02 * float(reference.abs().max()))
