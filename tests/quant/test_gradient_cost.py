"""Gradient-weighted cost of a width against brute force: the model's own autograd, one rounded expert at a time."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from families import input_batch, tiny_model
from test_cost import BITS, GROUP, rounded

from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.statistics import Routing
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEModel, hf
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import model_shape
from moe_compress.progress import Progress
from moe_compress.quant.gradient_cost import GradientError
from moe_compress.quant.grid import Grid, dequantize
from moe_compress.quant.rtn import round_to_nearest

NAMES = ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"]


@functools.cache
def model_of(name):
    return tiny_model(name)


def batches_of(name):
    return [input_batch(model_of(name), *shape) for shape in ((2, 9, 1), (1, 6, 2))]


def measure(view, batches, statistics):
    store = MemoryStore()
    with GradientSweep(view, batches) as sweep:
        collect(sweep, statistics, store, Progress(), NextToken(batches))
    return Profile(model_shape(view), store, len(view.layers))


def watched(model, experts, batches, backward):
    """Per batch what an experts module puts out and, by the model's own backward, the gradient there, in float64."""
    found = []

    def ran(_module, arguments, output):
        if backward:
            output.retain_grad()
        found.append(output)

    handle = experts.register_forward_hook(ran)
    with hf.implementation(model, "eager"), torch.set_grad_enabled(backward):
        count = sum(b["input_ids"][:, 1:].numel() for b in batches)
        for batch in batches:
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            if backward:
                (F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum") / count).backward()
    handle.remove()
    outputs = torch.cat([o.detach().flatten(0, -2) for o in found]).double()
    return outputs, torch.cat([o.grad.flatten(0, -2) for o in found]).double() if backward else None


@torch.no_grad()
def rounded_matrix(experts, expert, name, bits):
    """Round one matrix of an expert in place."""
    stack = experts.down_proj if name == "down" else getattr(experts, "gate_up_proj", None)
    stack = experts.up_proj if stack is None else stack
    matrix = stack[expert].T if experts.is_transposed else stack[expert]
    new = dequantize(round_to_nearest(matrix[None].float(), Grid(bits, GROUP, True)), stack.dtype)[0]
    if name != "down" and experts.has_gate:
        half = len(matrix) // 2
        rows = slice(None, half) if name == "gate" else slice(half, None)
        if not experts.is_concatenated:
            rows = slice(0 if name == "gate" else 1, None, 2)
        kept = matrix.clone()
        kept[rows] = new[rows]
        new = kept
    stack[expert] = new.T if experts.is_transposed else new


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_width_and_matrix(name):
    batches = batches_of(name)
    model = copy.deepcopy(model_of(name)).requires_grad_(True)
    whole, apart = GradientError(BITS, GROUP, True), GradientError(BITS, GROUP, True, per_matrix=True)
    view = MoEModel.wrap(model)
    layer = view.moe_layers[0]
    profile = measure(view, batches, [whole, apart, Routing()])
    routing = profile.of(layer, Routing())
    tokens = int(routing["tokens"])
    module = view.block(layer).experts_module
    exact, gradient = watched(model, module, batches, backward=True)
    assert tokens == len(exact) == len(gradient)
    matrices = ["gate", "up", "down"] if view.block(layer).experts.has_gate else ["up", "down"]
    kept = {n: p.detach().clone() for n, p in module.named_parameters()}
    for expert in routing["counts"].topk(3).indices.tolist():
        for column, bits in enumerate(BITS):
            for place, matrix in enumerate([None, *matrices]):
                with torch.no_grad():
                    rounded(module, expert, bits) if matrix is None else rounded_matrix(module, expert, matrix, bits)
                change = exact - watched(model, module, batches, backward=False)[0]
                module.load_state_dict(kept, strict=False)
                diagonal = directional = 0.0
                for delta, g in zip(change, gradient * tokens, strict=True):
                    diagonal += float((delta.square() * g.square()).sum()) / tokens
                    directional += float((delta * g).sum().square()) / tokens
                assert diagonal > 0
                for key, expected in (("gradient", diagonal), ("fisher", directional)):
                    value = (
                        profile.of(layer, whole)[key] if matrix is None else profile.of(layer, apart)[key][:, place - 1]
                    )
                    assert float(value[expert, column]) == pytest.approx(expected, rel=5e-3, abs=1e-9), (key, matrix)


def test_half_the_fisher_estimates_the_loss():
    """What the docstring claims, in expectation over targets: where tokens are drawn from the model's own distribution,
    half of `fisher` is the second-order loss; checked on the whole model with an expert slightly moved."""
    torch.manual_seed(0)
    model = tiny_model("mixtral").double()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
        ids = input_batch(model, 400, 3, 5)["input_ids"]
        with hf.implementation(model, "eager"):
            # The last token drawn from the model itself; the loss of that token alone is measured.
            ids[:, 2] = torch.multinomial(model(input_ids=ids).logits[:, 1].softmax(-1), 1)[:, 0]
    batches = [{"input_ids": ids}]
    view = MoEModel.wrap(model)
    layer, expert = view.moe_layers[-1], 2
    experts = view.block(layer).experts_module
    taps = []

    class Last(NextToken):
        def __call__(self, number, logits):
            value, gradient = super().__call__(number, logits)
            gradient[:, 0] = 0
            return value, gradient

    with GradientSweep(view, batches) as sweep:
        for _ in sweep:
            pass
        for step in sweep.backward(Last(batches)):
            step.advance(taps.append if step.index == layer else None)

    def last_loss(delta):
        with torch.no_grad(), hf.implementation(model, "eager"):
            experts.down_proj[expert] += delta
            log_p = model(input_ids=ids).logits[:, 1].log_softmax(-1)
            experts.down_proj[expert] -= delta
            return log_p

    delta = 0.02 * torch.randn_like(experts.down_proj[expert])
    (tap,) = taps
    rows = tap.dispatch.expert_R == expert
    change = (tap.activation_RI[rows] @ delta.T) * tap.dispatch.weight_R[rows, None]
    # Of the mean over 800 predicted tokens back to each token's own loss.
    gradient = tap.gradient_TH[tap.dispatch.token_R[rows]] * 800
    fisher = float((gradient * change).sum(-1).square().sum()) / 400
    before, after = last_loss(torch.zeros_like(delta)), last_loss(delta)
    lost = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 * fisher == pytest.approx(lost, rel=0.3)


def test_quantized_experts_are_refused():
    view = MoEModel.wrap(copy.deepcopy(model_of("qwen3_moe")))
    block = view.block(0)
    block.experts_module.__class__ = type("Other", (torch.nn.Module,), {"kind": "packed"})
    with pytest.raises(UnsupportedModelError, match="experts are packed already"):
        GradientError().start(block, 3)
