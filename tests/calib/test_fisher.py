"""The Fisher information of single weights: against plain autograd, one (token, expert) row at a time, in float64."""

import copy

import pytest
import torch
from families import input_batch
from reference import build
from torch.func import functional_call

from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.fisher import WeightFisher, squared_gradients
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.backward import GradientSweep
from moe_compress.model.dispatch import Dispatch
from moe_compress.model.losses import NextToken
from moe_compress.progress import Progress


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_squares_are_those_of_every_row_alone(name):
    """The family's own module asked for one expert on one token, and plain autograd on its parameters."""
    view = MoEModel.wrap(build(name))
    module = copy.deepcopy(view.block(view.moe_layers[0]).experts_module).double()
    experts = FusedExperts(module)
    generator = torch.Generator().manual_seed(0)
    count, hidden = experts.num_experts, experts.hidden_size
    index = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(9)])
    inputs = torch.randn(9, hidden, generator=generator, dtype=torch.float64)
    dispatch = Dispatch.of(index, torch.ones(9, 2, dtype=torch.float64), count)
    gradient_RH = torch.randn(18, hidden, generator=generator, dtype=torch.float64)
    found = squared_gradients(experts, dispatch, inputs[dispatch.token_R], gradient_RH)

    expected = experts.weights().map(torch.zeros_like)
    module.config._experts_implementation = "eager"
    parameters = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    one = torch.ones(1, 1, dtype=torch.float64)
    for row, (token, expert) in enumerate(zip(dispatch.token_R.tolist(), dispatch.expert_R.tolist(), strict=True)):
        output = functional_call(module, parameters, (inputs[token : token + 1], torch.tensor([[expert]]), one))
        own = [parameters[n] for n in parameters if not n.startswith("post_expert_norm")]
        gradients = torch.autograd.grad((output[0] * gradient_RH[row]).sum(), own)
        for parameter, gradient in zip(own, gradients, strict=True):
            name_of = next(n for n, p in parameters.items() if p is parameter)
            getattr(module, name_of).data.copy_(gradient.square())  # squares, read through the same view
        for (_, total), (_, square) in zip(expected.items(), experts.weights().items(), strict=True):
            total.add_(square)
        for parameter_name, parameter in parameters.items():
            getattr_path(module, parameter_name).data.copy_(parameter.detach())
    assert set(found) == {n for n, _ in expected.items()}
    for part, total in expected.items():
        torch.testing.assert_close(found[part], total, rtol=1e-9, atol=1e-12)


def getattr_path(module, path):
    """A parameter by its dotted name."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def test_the_sweep_hands_over_the_loss_gradients():
    """Whatever the batches; and what it says of down projections is what the taps' own gradients say."""
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 2, 7, 1), input_batch(model, 1, 9, 2)]
    found = []
    for parts in (
        batches,
        [
            {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in b.items()}
            for b in batches
            for i in range(len(b["input_ids"]))
        ],
    ):
        store = MemoryStore()
        with GradientSweep(view, parts, None) as sweep:
            collect(sweep, [WeightFisher()], store, Progress(), NextToken(parts))
        found.append({i: store.get(i, WeightFisher().key) for i in view.moe_layers})
    for layer, one in found[0].items():
        assert {n: t.dtype for n, t in one.items()} == dict.fromkeys(("gate", "up", "down"), torch.bfloat16)
        for name, value in one.items():
            assert float(value.float().sum()) > 0
            torch.testing.assert_close(value.float(), found[1][layer][name].float(), rtol=2e-2, atol=1e-12)
    # Σ over a row of down, of all squares: Σ_r δ² ‖a‖².
    last = view.moe_layers[-1]
    seen = torch.zeros(8, view.block(last).experts.hidden_size, dtype=torch.float64)
    tokens = sum(b["input_ids"].numel() for b in batches)
    with GradientSweep(view, batches, None) as sweep:
        for step in sweep:
            step.advance()
        for step in sweep.backward(NextToken(batches)):
            if step.index == last:
                taps = []
                step.advance(taps.append)
                for tap in taps:
                    delta = (tap.gradient_TH[tap.dispatch.token_R] * tap.dispatch.weight_R[:, None]).double() * tokens
                    norms = tap.activation_RI.double().square().sum(-1, keepdim=True)
                    seen.index_add_(0, tap.dispatch.expert_R, delta.square() * norms)
    torch.testing.assert_close(found[0][last]["down"].double().sum(2), seen, rtol=2e-2, atol=1e-12)
