"""Gradient attribution against the model's own autograd, and for what it claims: the loss's change, to first order."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from families import input_batch
from reference import build, experts_calls, joined, outputs_ETH, tokens_of

from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.statistics import Routing
from moe_compress.export.targets import find_target
from moe_compress.model import MoEModel, hf
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import model_shape
from moe_compress.progress import Progress
from moe_compress.prune.attribution import OutputAttribution
from moe_compress.prune.experts import PruneExperts, PruneOptions


@functools.cache
def model_of(name):
    return build(name)


def batches_of(name):
    return [input_batch(model_of(name), 2, 9, 1), input_batch(model_of(name), 1, 6, 2)]


@functools.cache
def measured(name):
    view, store, batches = MoEModel.wrap(model_of(name)), MemoryStore(), batches_of(name)
    with GradientSweep(view, batches) as sweep:
        collect(sweep, [OutputAttribution(), Routing()], store, Progress(), NextToken(batches))
    return Profile(model_shape(view), store, len(view.layers))


def backward(model, batches):
    """The mean loss of the model's own forward, differentiated."""
    count = sum(b["input_ids"][:, 1:].numel() for b in batches)
    for batch in batches:
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        (F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum") / count).backward()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_signed_is_the_derivative_by_a_scale_of_the_expert(name):
    """An expert is linear in its down projection: ⟨∂L/∂W, W⟩ is the derivative by a factor before the expert."""
    model = copy.deepcopy(model_of(name))
    view = MoEModel.wrap(model)
    with hf.implementation(model, "eager"), torch.enable_grad():
        backward(model, batches_of(name))
    for layer in view.moe_layers:
        weight = view.block(layer).experts_module.down_proj
        expected = (weight.grad.double() * weight.double()).flatten(1).sum(dim=1)
        found = measured(name).of(layer, OutputAttribution())["signed"]
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_sums_over_tokens(name):
    model = copy.deepcopy(model_of(name))
    view, batches = MoEModel.wrap(model), batches_of(name)
    calls, gradients = experts_calls(model, batches), {layer: [] for layer in view.moe_layers}

    def ran(layer, output):
        output.register_hook(lambda gradient: gradients[layer].append(gradient.flatten(0, -2).double()))

    experts = {layer: view.block(layer).experts_module for layer in view.moe_layers}
    handles = [m.register_forward_hook(lambda _, __, out, i=i: ran(i, out)) for i, m in experts.items()]
    with hf.implementation(model, "eager"), torch.enable_grad():
        backward(model, batches)
    for handle in handles:
        handle.remove()
    tokens = tokens_of(batches)
    for layer in view.moe_layers:
        call, gradient_TH = joined(calls[layer]), torch.cat(gradients[layer])
        outputs = outputs_ETH(experts[layer], call.hidden_TH)
        sums = torch.zeros(3, len(outputs), dtype=torch.float64)
        for token, expert, gate in call.choices():
            owed = tokens * gate * float(gradient_TH[token] @ outputs[expert, token])
            sums[:, expert] += torch.tensor([owed, abs(owed), owed**2], dtype=torch.float64) / tokens
        found = measured(name).of(layer, OutputAttribution())
        for key, expected in zip(("signed", "absolute", "squared"), sums, strict=True):
            assert torch.allclose(found[key], expected, rtol=2e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_little_less_of_an_expert_changes_the_loss_by_that():
    """Scaled by 1 - ε the loss grows by ε times the score: finite differences on the whole model."""
    model = copy.deepcopy(model_of("qwen3_moe")).double()
    batches = batches_of("qwen3_moe")

    @torch.no_grad()
    def loss():
        with hf.implementation(model, "eager"):
            logits = [model(**b).logits[:, :-1].flatten(0, 1) for b in batches]
        return float(F.cross_entropy(torch.cat(logits), torch.cat([b["input_ids"][:, 1:].flatten() for b in batches])))

    step = PruneExperts(
        PruneOptions(criterion="attribution", experts=4, protect_super_experts=False), find_target("native")
    )
    assert step.goes_back()
    plan = step.plan(measured("qwen3_moe"))
    layer, epsilon = 1, 1e-2  # norms and routers compute in float32 whatever the model's dtype
    weight = MoEModel.wrap(model).block(layer).experts_module.down_proj.data
    for expert, score in enumerate(plan.layers[layer]["scores"]):
        losses = []
        for sign in (1, -1):
            weight[expert] *= 1 - sign * epsilon
            losses.append(loss())
            weight[expert] /= 1 - sign * epsilon
        assert (losses[0] - losses[1]) / (2 * epsilon) == pytest.approx(score, rel=2e-2, abs=1e-4)
    lowest = sorted(range(8), key=plan.layers[layer]["scores"].__getitem__)[:4]
    assert plan.layers[layer]["remove"] == sorted(lowest)
