"""DiEP's mix against the models' own outputs, autograd and non-negative least squares."""

import functools

import pytest
import torch
from families import input_batch
from reference import build, experts_calls, joined, measure, outputs_ETH
from scipy.optimize import nnls
from test_criteria import asked, prune

from moe_compress.errors import RunError
from moe_compress.model import MoEModel, Tap
from moe_compress.prune.criteria import CRITERIA
from moe_compress.prune.diep import MixtureMoments, error_of, learn_mix


@functools.cache
def model_of(name):
    return build(name)


def batches_of(model):
    return [input_batch(model, 2, 12, 1), input_batch(model, 1, 9, 2)]


def outputs_of(model, layer):
    """Every expert's output on every token [E, T, H], and what the routed ones together put out [T, H]."""
    call = joined(experts_calls(model, batches_of(model))[layer])
    return outputs_ETH(MoEModel.wrap(model).block(layer).experts_module, call.hidden_TH), call.output_TH.double()


def moments_of(each_ETH, whole_TH):
    each, whole = each_ETH.flatten(1), whole_TH.flatten()
    return {"gram": each @ each.T, "cross": each @ whole, "energy": whole @ whole}


def random_outputs(seed, experts, size=60):
    """Experts that have something in common, each with a part of its own in the output, and noise."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    each = noise(experts, size, 4) + noise(size, 4)
    share = torch.rand(experts, size, 1, generator=generator, dtype=torch.float64)
    return each, (each * share * (share > 0.6)).sum(dim=0) - each[0] * 0.5 + noise(size, 4)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "zaya"])
def test_moments(name):
    model = model_of(name)
    view = MoEModel.wrap(model)
    every, some = MixtureMoments(chunk=7), MixtureMoments(sample=11)
    profile = measure(view, batches_of(model), [every, some])
    for layer in view.moe_layers:
        each, whole = outputs_of(model, layer)
        taken = torch.tensor([(t + 1) * 11 // len(whole) > t * 11 // len(whole) for t in range(len(whole))])
        for statistic, rows in ((every, slice(None)), (some, taken)):
            found = profile.of(layer, statistic)
            for key, expected in moments_of(each[:, rows], whole[rows]).items():
                assert torch.allclose(found[key], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_tokens_count_as_much_as_they_weigh():
    """A weight of 2 is the token twice, 0 is without it."""
    model = model_of("qwen3_moe")
    view = MoEModel.wrap(model)
    block = view.block(view.moe_layers[0])
    call = joined(experts_calls(model, batches_of(model))[view.moe_layers[0]])
    weight = torch.arange(len(call.hidden_TH)) % 3
    each, whole = outputs_of(model, view.moe_layers[0])
    expected = moments_of(each.repeat_interleave(weight, dim=1), whole.repeat_interleave(weight, dim=0))
    tap = Tap(block.layer, block.experts, call.hidden_TH, call.index_TK, call.weight_TK, call.output_TH)
    tap.token_weight_T = weight.float()
    sums = MixtureMoments(chunk=5).start(block, len(weight))
    sums.update(tap)
    for key, found in sums.result().items():
        assert torch.allclose(found, expected[key], rtol=1e-4, atol=1e-5 * float(expected[key].abs().max()))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_error_and_gradient_are_those_of_the_mixed_block(name):
    """The block with its router replaced by one softmax for all tokens, differentiated by autograd."""
    model = model_of(name)
    layer = MoEModel.wrap(model).moe_layers[-1]
    each, whole = outputs_of(model, layer)
    alpha = torch.randn(len(each), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for beta in (0.7, 2.5):
        own = alpha.clone().requires_grad_()
        with torch.enable_grad():
            mixed = beta * (own.softmax(0)[:, None, None] * each).sum(dim=0)
            expected = (mixed - whole).norm() / whole.norm()
            expected.backward()
        error, gradient = error_of(alpha, beta, moments_of(each, whole))
        assert float(error) == pytest.approx(float(expected.detach()), rel=1e-9)
        assert torch.allclose(gradient, own.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("seed", "experts"), [(0, 4), (1, 8), (2, 16), (3, 32), (4, 60)])
def test_it_learns_the_best_mix_of_positive_parts(seed, experts):
    each, whole = random_outputs(seed, experts)
    moments = moments_of(each, whole)
    alpha, beta = learn_mix(moments)
    best, left = nnls(each.flatten(1).T.numpy(), whole.flatten().numpy())
    least = left / float(whole.norm())
    assert least * (1 - 1e-9) <= float(error_of(alpha, beta, moments)[0]) <= least * (1 + 1e-3)
    found = CRITERIA["diep"].score({"mixture_moments": moments}, asked(experts))
    assert torch.equal(found, beta * alpha.softmax(0))
    best = torch.from_numpy(best)
    assert (best == 0).any() or experts == 4
    assert torch.allclose(found, best, rtol=0.02, atol=0.02 * float(best.max()))


def test_a_mix_is_found_again():
    each, _ = random_outputs(5, 8)
    parts = torch.tensor([0.5, 0.1, 0.02, 1.0, 0.3, 0.2, 0.05, 0.7], dtype=torch.float64)
    moments = moments_of(each, (parts[:, None, None] * each).sum(dim=0))
    found = CRITERIA["diep"].score({"mixture_moments": moments}, asked(8))
    assert torch.allclose(found, parts, rtol=1e-2, atol=1e-3)


def test_of_experts_that_put_out_nothing():
    each, whole = random_outputs(6, 8)
    each[3] = 0
    scores = CRITERIA["diep"].score({"mixture_moments": moments_of(each, whole)}, asked(8))
    assert float(scores[3]) == 0
    assert scores.isfinite().all()
    with pytest.raises(RunError, match="put out nothing"):
        CRITERIA["diep"].score({"mixture_moments": moments_of(each * 0, whole * 0)}, asked(8))
    # Of an output that every mix points away from, each expert has as little part as may be.
    away = CRITERIA["diep"].score({"mixture_moments": moments_of(each.abs(), -each.abs().sum(dim=0))}, asked(8))
    assert away.isfinite().all()
    assert float(away.max()) < 1e-2


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_planted_experts(scope):
    """One that is loud and never chosen scores lowest, one that most tokens take highest."""
    model = build("gpt_oss")
    view = MoEModel.wrap(model)
    for layer in view.moe_layers:
        router = view.block(layer).router
        router.bias.data[2] -= 100
        router.bias.data[5] += 3
        experts = view.block(layer).experts_module
        experts.down_proj.data[2] *= 10
        experts.down_proj_bias.data[2] *= 10
    step = prune(criterion="diep", experts=7, protect_super_experts=False, scope=scope)
    profile = measure(view, batches_of(model), step.statistics())
    plan = step.plan(profile)
    for layer in view.moe_layers:
        scores = plan.layers[layer]["scores"]
        assert min(range(8), key=scores.__getitem__) == 2
        assert max(range(8), key=scores.__getitem__) == 5
        assert plan.layers[layer]["remove"] == [2] or scope == "global"
    again = step.plan(measure(view, batches_of(model), step.statistics()))
    assert again.layers == plan.layers
