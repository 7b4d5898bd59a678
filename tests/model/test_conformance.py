"""Every family of the installed transformers, against the family's own code.

The families are found by scanning the installed modelling files, so a new one fails here until it is handled or refused
by name. Each is a tiny random model (tests/families.py); nothing here or in the package knows a family's layout.
"""

import functools
import inspect
from contextlib import ExitStack

import pytest
import torch
import transformers
from families import FAMILIES, discover, input_batch, tiny_model

from moe_compress.errors import UnsupportedModelError
from moe_compress.export.loader import load
from moe_compress.export.write import write_folder, write_memory
from moe_compress.model import FusedExperts, MoEModel, families, hf, observe
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress
from moe_compress.quant.grid import Grid, dequantize
from moe_compress.quant.packed import pack_experts
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.stack import Stack

FOUND = discover()
SUPPORTED = [name for name in FOUND if families.refusal(name) is None]
every_family = pytest.mark.parametrize("name", SUPPORTED)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family → folder with its tiny model, as `save_pretrained` writes it."""

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp(name)
        tiny_model(name).save_pretrained(path)
        return path

    return folder


def from_pretrained(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    return hf.model_class(config).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(**input_batch(model)).logits


def test_every_family_is_known():
    """A modelling file with the experts interface is handled, or refused with a reason."""
    assert len(FOUND) >= 50
    assert set(FOUND) <= set(FAMILIES)
    assert all(families.refusal(name) for name in set(FOUND) - set(SUPPORTED))


def test_refusals_are_raised():
    for name in set(FOUND) - set(SUPPORTED):
        with pytest.raises(UnsupportedModelError, match="not supported"):
            MoEModel.wrap(tiny_model(name))


@every_family
def test_block_view_equals_the_model(name):
    """Routing, activations and outputs from the view, against what the family's own forward uses and returns."""
    model = tiny_model(name)
    view = MoEModel.wrap(model)
    calls, routed, taps = {}, {}, {}
    with ExitStack() as stack:
        for layer in view.moe_layers:
            block = view.block(layer)

            def ran(module, arguments, output, layer=layer):
                calls[layer] = (*arguments, output)

            def scored(module, arguments, keywords, layer=layer):
                names = list(inspect.signature(module.forward).parameters)
                routed[layer] = {**dict(zip(names, arguments, strict=False)), **keywords}

            handles = [
                block.experts_module.register_forward_hook(ran),
                block.router.register_forward_pre_hook(scored, with_kwargs=True),
            ]
            for handle in handles:
                stack.callback(handle.remove)
        with hf.implementation(model, "eager"):
            expected = logits(model)
    with ExitStack() as stack:
        stack.enter_context(hf.implementation(model))
        for layer in view.moe_layers:
            stack.enter_context(observe(view.block(layer), lambda tap: taps.__setitem__(tap.layer, tap)))
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=2e-5)
    assert set(calls) == set(taps) == set(view.moe_layers)
    for layer, (hidden, index, weight, output) in calls.items():
        block, tap = view.block(layer), taps[layer]
        torch.testing.assert_close(tap.output_TH, output, rtol=1e-5, atol=2e-5)
        assert torch.equal(tap.index_TK, index)
        torch.testing.assert_close(tap.weight_TK, weight)
        first, *rest = routed[layer].items()
        context = {k: v for k, v in rest if v is not None}
        if "router_states" in context:
            context["router_states"] = context["router_states"].reshape(1, -1, context["router_states"].shape[-1])
        with torch.no_grad():
            routing = block.route(first[1].reshape(-1, first[1].shape[-1]), **context)
        assert torch.equal(routing.index_TK, index)
        torch.testing.assert_close(routing.weight_TK, weight)
        assert routing.index_TK.shape[1] == block.top_k
        assert tap.logits_TE is not None
        assert tap.logits_TE.shape[1] >= block.num_experts
        check_experts(block.experts, tap, hidden)


def check_experts(experts, tap, hidden):
    """`expert(e)` in canonical orientation recomputes, row by row, what the module computes."""
    assert isinstance(experts, FusedExperts)
    for row, (expert, token) in enumerate(
        zip(tap.dispatch.expert_R.tolist(), tap.dispatch.token_R.tolist(), strict=True)
    ):
        parts = experts.expert(expert)
        x = hidden[token].double()

        def linear(weight, bias, value):
            return weight.double() @ value + (0 if bias is None else bias.double())

        up = linear(parts.up, parts.up_bias, x).float()
        if parts.gate is not None:
            gate = linear(parts.gate, parts.gate_bias, x).float()
            activation = experts.activate(experts.interleave(gate.unsqueeze(0), up.unsqueeze(0)))[0]
        else:
            activation = experts.activate(up.unsqueeze(0))[0]
        output = linear(parts.down, parts.down_bias, activation.double()).float()
        if experts.has_norm:
            output = experts.module.post_expert_norm(output)
        torch.testing.assert_close(tap.activation_RI[row], activation, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tap.output_RH[row], output, rtol=1e-4, atol=1e-4)


@every_family
def test_streamed_from_disk_equals_the_full_forward(name, saved):
    """Layer by layer, bit for bit."""
    whole = from_pretrained(saved(name))
    with hf.implementation(whole):
        expected = logits(whole)
    batch = input_batch(whole)
    model = MoEModel.open(saved(name))
    with Sweep(model, [batch, batch]) as sweep:
        seen = [step.index for step in sweep]
        outputs = dict(sweep.outputs())
    assert seen == list(range(len(model.layers)))
    assert torch.equal(outputs[0], expected)
    assert torch.equal(outputs[1], expected)
    assert all(p.is_meta for p in model.layers.parameters())


@every_family
def test_inputs_alone(name, monkeypatch):
    """What experts read is the same, bit for bit, where they don't run; and they don't."""
    model = tiny_model(name)
    with Sweep(MoEModel.wrap(model), [input_batch(model)]) as sweep:
        for step in sweep:
            if step.layer.block is None:
                continue
            whole, alone = [], []
            step.run(whole.append)
            with monkeypatch.context() as patch:
                patch.setattr("moe_compress.model.tap.run_experts", None)
                step.run(alone.append, inputs_only=True)
            for expected, found in zip(whole, alone, strict=True):
                assert torch.equal(found.hidden_TH, expected.hidden_TH)
                assert torch.equal(found.index_TK, expected.index_TK)
                assert torch.equal(found.weight_TK, expected.weight_TK)
                assert found.layer_output is None
                assert not len(found.output_TH)


@every_family
def test_unchanged_folder_is_copied_byte_for_byte(name, saved, tmp_path):
    model = MoEModel.open(saved(name))
    assert write_folder(model, tmp_path / "copy", {}, Progress()) == "hf"
    copy = MoEModel.open(tmp_path / "copy")
    assert set(copy.source.tensors) == set(model.source.tensors)
    for tensor in model.source.tensors:
        assert torch.equal(copy.source.get(tensor), model.source.get(tensor))
    assert copy.source.config == model.source.config


def keep_three_quarters(view):
    for layer in view.moe_layers:
        with view.layer(layer) as live, view.editing(live) as block:
            block.keep([e for e in range(block.num_experts) if e % 4 != 1])


class Changed:
    """An overlay made by changing layers of a folder in memory."""

    def __init__(self, model, change):
        self.states = {}
        for layer in model.moe_layers:
            with model.layer(layer, stored=True) as live:
                change(live.block)
                tensors, description = live.block.state()
                self.states[layer] = ({n: t.clone() for n, t in tensors.items()}, description)

    def get(self, layer):
        return self.states.get(layer)


@every_family
def test_without_a_quarter_of_the_experts(name, saved, tmp_path):
    """Removed in memory; saved from memory and from disk; loaded by plain from_pretrained: the same logits."""
    model = from_pretrained(saved(name))
    full = logits(model)
    view = MoEModel.wrap(model)
    before = view.original_experts
    keep_three_quarters(view)
    expected = logits(model)
    assert not torch.allclose(full, expected)
    assert write_memory(view, tmp_path / "memory", {}, Progress()) == "hf"

    disk = MoEModel.open(saved(name))
    disk.overlay = Changed(disk, lambda block: block.keep([e for e in range(block.num_experts) if e % 4 != 1]))
    assert write_folder(disk, tmp_path / "disk", {}, Progress()) == "hf"
    for folder in (tmp_path / "memory", tmp_path / "disk"):
        loaded = from_pretrained(folder)
        assert MoEModel.wrap(loaded).original_experts == before * 3 // 4
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


@every_family
def test_unequal_packed_experts(name, saved, tmp_path):
    """Layers with different numbers of experts of different widths: native, loaded by transformers, weights packed."""
    counts = {}

    def change(block, rounded=False):
        if block.layer % 2:  # every other layer loses a quarter
            block.keep([e for e in range(block.num_experts) if e % 4 != 1])
        counts[block.layer] = block.num_experts
        weights = block.experts.weights()
        matrices = {}
        for projection, stacked in weights.matrices():
            size = next(g for g in (16, 14, 12, 8, 7, 4, 2) if stacked.shape[-1] % g == 0)
            entries = []
            for bits, experts in ((3, range(0, block.num_experts, 2)), (4, range(1, block.num_experts, 2))):
                experts = list(experts)
                quantized = round_to_nearest(stacked[experts].float(), Grid(bits, size))
                entries.append((experts, Stack.holding(quantized)))
                if rounded:
                    stacked[experts] = dequantize(quantized, stacked.dtype)
            matrices[projection] = entries
        if not rounded:
            pack_experts(block, matrices)

    reference = from_pretrained(saved(name))
    view = MoEModel.wrap(reference)
    for layer in view.moe_layers:
        change(view.block(layer), rounded=True)
    expected = logits(reference)

    disk = MoEModel.open(saved(name))
    disk.overlay = Changed(disk, change)
    assert write_folder(disk, tmp_path / "native", {}, Progress()) == "native"
    loaded = load(tmp_path / "native", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    wrapped = dict(loaded.named_modules())
    for layer, count in counts.items():
        experts = wrapped[f"{disk.stack}.{layer}.{disk.block(layer).path}"]
        assert experts.num_experts == count
        assert experts.down_proj.get_submodule(experts.down_proj.names[0]).codes.dtype == torch.int32
    streamed = MoEModel.open(tmp_path / "native")
    with Sweep(streamed, [input_batch(loaded)]) as sweep:
        for step in sweep:
            step.advance()
        output = dict(sweep.outputs())[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
