"""The backward sweep against plain autograd on the whole model: block outputs, routing weights, parameters."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from families import input_batch, tiny_model
from torch import nn

from moe_compress.errors import InputError, RunError, UnsupportedModelError
from moe_compress.model import MoEModel, hf
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import Divergence, NextToken, predicted_tokens
from moe_compress.model.sweep import Sweep
from moe_compress.quant.packed import pack_experts
from moe_compress.quant.stack import Stack
from moe_compress.resources import holding_all

# Plain; correction bias and dense first layer; experts without a gate beside attention and mamba layers; residual
# streams across layers; a router that reads the last router's state; router beside a dense MLP, norms behind both.
NAMES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "nemotron_h", "deepseek_v4", "zaya", "gemma4"]


def batches_of(model):
    return [input_batch(model, 2, 12, 1), input_batch(model, 1, 9, 2)]


def router_names(view, index):
    block = view.block(index)
    return [n for n, _ in block.module.named_parameters() if n.startswith((block.router_path + ".", block.path + "."))]


def by_autograd(model, batches, loss=None):
    """Layer → (per batch: gradient at the experts' output, at the routing weights; per name: of the parameters)."""
    view = MoEModel.wrap(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(True)
    outputs = {i: [] for i in view.moe_layers}
    handles = []
    for index in view.moe_layers:

        def ran(_module, arguments, output, index=index):
            arguments[2].retain_grad()
            output.retain_grad()
            outputs[index].append((output, arguments[2]))

        handles.append(view.block(index).experts_module.register_forward_hook(ran))
    count = sum(b["input_ids"][:, 1:].numel() for b in batches)
    model.zero_grad()
    total = 0.0
    with hf.implementation(model, "eager"):
        for number, batch in enumerate(batches):
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            if loss is None:
                value = F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum") / count
            else:
                value = loss(number, logits) / count
            value.backward()
            total += value.item()
    for handle in handles:
        handle.remove()
    found = {}
    for index in view.moe_layers:
        own = dict(view.layers[index].named_parameters())
        parameters = {
            n: torch.zeros_like(own[n]) if own[n].grad is None else own[n].grad for n in router_names(view, index)
        }
        parameters = {n: g.clone() for n, g in parameters.items()}
        found[index] = [(o.grad.flatten(0, -2), w.grad.flatten(0, -2)) for o, w in outputs[index]], parameters
    model.zero_grad()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return found, total


def by_sweep(view, batches, loss=None, hold=None, watch=None):
    found = {}
    with GradientSweep(view, batches, hold) as sweep:
        for step in sweep:
            step.advance()
        for step in sweep.backward(loss or NextToken(batches)):
            if watch is not None:
                watch(step)
            if step.layer.block is not None:
                taps = []
                step.advance(taps.append, router_names(view, step.index))
                found[step.index] = taps, step.gradients
        return found, sweep.loss


def compare(found, expected, tolerance):
    def same(a, b, what):
        assert a.shape == b.shape, what
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-30, what

    assert found.keys() == expected.keys()
    for index, (taps, parameters) in found.items():
        blocks, wanted = expected[index]
        assert len(taps) == len(blocks)
        for tap, (output, weight) in zip(taps, blocks, strict=True):
            assert float(output.norm()) > 0
            same(tap.gradient_TH, output, f"output of layer {index}")
            # Where no expert serves (zaya), eager experts multiply a whole expert by 0; here nothing runs.
            served = tap.weight_TK != 0
            same(tap.weight_gradient_TK, weight * served, f"routing weights of layer {index}")
            assert not tap.gradient_TH.requires_grad
            assert not tap.parts[1].requires_grad
        assert parameters.keys() == wanted.keys()
        assert any(float(g.norm()) > 0 for g in wanted.values())
        for name, gradient in wanted.items():
            same(parameters[name], gradient, f"{name} of layer {index}")
            same(sum(tap.parameters[name] for tap in taps), gradient, f"{name} of layer {index}, by batch")


@functools.cache
def model_of(name):
    return tiny_model(name).double()


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_in_float64(name):
    model = model_of(name)
    batches = batches_of(model)
    expected, value = by_autograd(model, batches)
    model.requires_grad_(False)
    found, loss = by_sweep(MoEModel.wrap(model), batches)
    compare(found, expected, 1e-6 if name == "nemotron_h" else 1e-12)  # its mamba layers compute in float32 themselves
    assert loss == pytest.approx(value, rel=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("held", [False, True])
def test_from_disk_with_one_layer_live(name, held, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    view = MoEModel.open(tmp_path / "model")
    batches = batches_of(model)
    hold = None
    if held:
        # Large enough to be mapped: tensors below 1 MB stay in memory.
        batches = [input_batch(model, 64, 128, 1), input_batch(model, 64, 128, 2)]
        hold = tmp_path / "hold"
        hold.mkdir()
    expected, _ = by_autograd(model, batches)
    live = []

    def watch(step):
        layers = enumerate(view.layers)
        live.append([i for i, layer in layers if any(not p.is_meta for p in layer.parameters())])
        assert live[-1] == [step.index]
        files = [] if hold is None else list(hold.glob("hidden-0-*"))
        assert len(files) == (step.index + 1 if held else 0)

    found, _ = by_sweep(view, batches, hold=hold, watch=watch)
    compare(found, expected, 2e-5)
    assert live == [[i] for i in reversed(range(len(view.layers)))]
    assert all(p.is_meta for layer in view.layers for p in layer.parameters())


def test_gradient_behind_the_layer_is_the_blocks_where_it_is_added():
    model = model_of("qwen3_moe")
    batches = batches_of(model)
    taps = [tap for taps, _ in by_sweep(MoEModel.wrap(model), batches)[0].values() for tap in taps]
    for tap in taps:
        torch.testing.assert_close(tap.behind_gradient_TH, tap.gradient_TH, rtol=0, atol=0)
        assert tap.inverse_residual_T is not None
        rows = torch.stack([tap.gradient_TH[t] * tap.weight_TK[t, s] for t, s in zip(*_places(tap), strict=True)])
        torch.testing.assert_close(tap.expert_gradient_RH, rows)


def _places(tap):
    row = tap.dispatch.row_R.tolist()
    return [r // tap.dispatch.slots for r in row], [r % tap.dispatch.slots for r in row]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_from_another_model(temperature):
    model, teacher = model_of("mixtral"), tiny_model("mixtral", seed=5).double()
    batches = batches_of(model)
    with torch.no_grad(), hf.implementation(teacher, "eager"):
        logits = [teacher(**batch).logits for batch in batches]

    def loss(number, found):
        reference = (logits[number][:, :-1].flatten(0, 1) / temperature).log_softmax(-1)
        own = (found / temperature).log_softmax(-1)
        return temperature**2 * F.kl_div(own, reference, reduction="sum", log_target=True)

    expected, value = by_autograd(model, batches, loss)
    with Sweep(MoEModel.wrap(teacher), batches) as sweep:
        for step in sweep:
            step.advance()
        found, own = by_sweep(MoEModel.wrap(model), batches, Divergence(batches, sweep.outputs(), temperature))
    compare(found, expected, 1e-11)
    assert own == pytest.approx(value, rel=1e-9)


def test_losses_part_by_part(monkeypatch):
    """Chunks of positions give what one piece gives."""
    monkeypatch.setattr("moe_compress.model.losses._POSITIONS", 3)
    model = model_of("mixtral")
    batches = batches_of(model)
    compare(by_sweep(MoEModel.wrap(model), batches)[0], by_autograd(model, batches)[0], 1e-12)
    assert predicted_tokens(batches) == 2 * 11 + 8


def test_through_packed_experts():
    """Experts of other classes are gone through as well; against the same weights in the family's own class."""
    model = model_of("qwen3_moe")
    batches = batches_of(model)
    expected, _ = by_autograd(model, batches)
    view = MoEModel.wrap(copy.deepcopy(model))
    for index in view.moe_layers:
        block = view.block(index)
        matrices = block.experts.weights().matrices()
        pack_experts(block, {n: [(list(range(len(w))), Stack.holding(w.clone()))] for n, w in matrices})
        assert block.kind == "packed"
    with GradientSweep(view, batches) as sweep:
        for _ in sweep:
            pass
        for step in sweep.backward(NextToken(batches)):
            taps = []
            step.advance(taps.append)
            for tap, (output, weight) in zip(taps, expected[step.index][0], strict=True):
                torch.testing.assert_close(tap.gradient_TH, output, rtol=1e-9, atol=1e-15)
                torch.testing.assert_close(tap.weight_gradient_TK, weight, rtol=1e-9, atol=1e-15)


def test_state_in_shared_containers_is_refused_by_name():
    model = tiny_model("mistral_large4")
    with pytest.raises(UnsupportedModelError, match=r"MistralLarge4.*KVSharingDict.*shared_kv_states"):
        by_sweep(MoEModel.wrap(model), batches_of(model))


def test_a_layer_that_depends_on_something_else_is_refused():
    model = tiny_model("mixtral")
    counts = iter(range(100))

    class Drifting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden) * (1 + next(counts))

    model.model.layers[1].post_attention_layernorm = Drifting(model.model.layers[1].post_attention_layernorm)
    with pytest.raises(RunError, match=r"layer 1 of MixtralForCausalLM.*depends on something else"):
        by_sweep(MoEModel.wrap(model), batches_of(model))


def test_a_model_without_next_tokens_is_refused():
    model = tiny_model("openai_privacy_filter")
    with pytest.raises(UnsupportedModelError, match="next token"):
        by_sweep(MoEModel.wrap(model), batches_of(model))


def test_going_back_needs_the_way_there():
    model = tiny_model("mixtral")
    batches = batches_of(model)
    with GradientSweep(MoEModel.wrap(model), batches) as sweep:
        next(iter(sweep)).advance()
        with pytest.raises(RuntimeError, match="still at layer"):
            next(sweep.backward(NextToken(batches)))


def test_room_for_what_is_held(tmp_path, monkeypatch):
    view = MoEModel.wrap(tiny_model("mixtral"))
    assert holding_all(view, 1000, tmp_path) is None
    assert holding_all(view, 1000, tmp_path, "disk") == tmp_path
    for folder, where in ((None, "memory"), (tmp_path, str(tmp_path))):
        with pytest.raises(InputError, match=f"3 layers.*{where} has .* free: calibrate with fewer"):
            holding_all(view, 1 << 50, folder)
