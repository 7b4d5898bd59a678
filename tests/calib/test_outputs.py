"""Statistics of experts' outputs against plain loops in float64, and for what they are measured for."""

import functools
import itertools

import pytest
import torch
from families import input_batch
from places import DEMO
from reference import KINDS, assert_close, build, experts_calls, joined, measure, outputs_ETH
from transformers import AutoConfig

from moe_compress.calib.outputs import OutputGram, OutputMoments, TokenContribution
from moe_compress.calib.statistics import ChosenLogits, Routing
from moe_compress.checkpoint.workspace import DiskStatistics
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEModel, hf

LATENT = ("nemotron_h", "muse_spark")  # experts as wide as a latent space: no token contribution
EVERYWHERE = (OutputGram(), OutputMoments(), ChosenLogits(), Routing())
every_kind = pytest.mark.parametrize("name", [*KINDS, "demo"])


@functools.cache
def model_of(name):
    return build(name, DEMO / "moe-demo")


@functools.cache
def batches_of(name):
    return [input_batch(model_of(name), *shape) for shape in ((2, 9, 1), (1, 7, 2), (3, 4, 3))]


@functools.cache
def reference(name):
    """Layer → (joined call, outputs [E, T, H] in float64)."""
    view, calls = MoEModel.wrap(model_of(name)), experts_calls(model_of(name), batches_of(name))
    return {
        layer: (joined(found), outputs_ETH(view.block(layer).experts_module, joined(found).hidden_TH))
        for layer, found in calls.items()
    }


@functools.cache
def measured(name):
    return measure(MoEModel.wrap(model_of(name)), batches_of(name), EVERYWHERE)


def gated_ETH(call, outputs):
    """What each expert adds to each token: zeros where it isn't chosen."""
    gated = torch.zeros_like(outputs)
    for token, expert, weight in call.choices():
        gated[expert, token] += weight * outputs[expert, token]
    return gated


@every_kind
def test_output_gram(name):
    for layer, (call, outputs) in reference(name).items():
        gated = gated_ETH(call, outputs)
        found = measured(name).of(layer, OutputGram())["gram"]
        expected = torch.stack([torch.stack([(a * b).sum() for b in gated]) for a in gated])
        assert_close(found, expected)
        assert torch.allclose(found, found.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "zaya", "demo"])
def test_output_gram_relative_to_the_hidden_state(name):
    behind = behind_layers(model_of(name), batches_of(name))
    for layer, (call, outputs) in reference(name).items():
        gated = gated_ETH(call, outputs) / behind[layer].norm(dim=1).view(1, -1, 1)
        expected = torch.stack([torch.stack([(a * b).sum() for b in gated]) for a in gated])
        assert_close(measured(name).of(layer, OutputGram())["relative"], expected)


@every_kind
def test_output_gram_is_the_error_of_dropping_a_set(name):
    """Without routing anew: the block's own output with the weights of the dropped experts set to zero."""
    view = MoEModel.wrap(model_of(name))
    generator = torch.Generator().manual_seed(0)
    for layer, (call, outputs) in reference(name).items():
        gram = measured(name).of(layer, OutputGram())["gram"]
        for size in (1, 2, len(outputs) // 2, len(outputs)):
            dropped = torch.randperm(len(outputs), generator=generator)[:size]
            weight = call.weight_TK.masked_fill(torch.isin(call.index_TK, dropped), 0)
            with torch.no_grad(), hf.implementation(model_of(name), "eager"):
                without = view.block(layer).experts_module(call.hidden_TH, call.index_TK, weight)
            error = float((call.output_TH - without).double().square().sum())
            energy = float(call.output_TH.double().square().sum())
            assert float(gram[dropped][:, dropped].sum()) == pytest.approx(error, rel=1e-4, abs=1e-6 * energy)


@every_kind
def test_output_moments(name):
    for layer, (call, outputs) in reference(name).items():
        found = measured(name).of(layer, OutputMoments())
        counts = torch.zeros(len(outputs), dtype=torch.float64)
        total, squares = (torch.zeros(len(outputs), outputs.shape[2], dtype=torch.float64) for _ in range(2))
        for token, expert, _ in call.choices():
            counts[expert] += 1
            total[expert] += outputs[expert, token]
            squares[expert] += outputs[expert, token] ** 2
        assert torch.equal(found["counts"], counts)
        assert_close(found["sum"], total)
        assert_close(found["squares"], squares)


@every_kind
def test_chosen_logits(name):
    """From what the family's own router returned to its own forward."""
    model, view = model_of(name), MoEModel.wrap(model_of(name))
    logits = {layer: [] for layer in view.moe_layers}
    handles = [
        view.block(layer).router.register_forward_hook(
            lambda _module, _arguments, output, layer=layer: logits[layer].append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for layer in view.moe_layers
    ]
    with torch.no_grad():
        for batch in batches_of(name):
            model(**batch)
    for handle in handles:
        handle.remove()
    for layer, (call, outputs) in reference(name).items():
        own = torch.cat([part.reshape(-1, part.shape[-1]) for part in logits[layer]]).double()
        expected = torch.zeros(len(outputs), dtype=torch.float64)
        for token, expert, _ in call.choices():
            expected[expert] += own[token, expert]
        assert_close(measured(name).of(layer, ChosenLogits())["sum"], expected)


def behind_layers(model, batches):
    """Layer → hidden states [T, H] behind it, from the model's own forward."""
    view, found = MoEModel.wrap(model), {}
    handles = []
    for layer in view.moe_layers:

        def ran(_module, _arguments, output, layer=layer):
            hidden = output[0] if isinstance(output, tuple) else output
            found.setdefault(layer, []).append(hidden.reshape(-1, hidden.shape[-1]).double())

        handles.append(view.layers[layer].register_forward_hook(ran))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "demo"])
def test_token_contribution(name):
    profile = measure(MoEModel.wrap(model_of(name)), batches_of(name), [TokenContribution()])
    behind = behind_layers(model_of(name), batches_of(name))
    for layer, (call, outputs) in reference(name).items():
        gated = gated_ETH(call, outputs)
        expected = torch.zeros(len(outputs), dtype=torch.float64)
        for token, expert, weight in call.choices():
            after = behind[layer][token]
            before = after - gated[:, token].sum(dim=0)
            cosine = float(before @ after / before.norm() / after.norm())
            expected[expert] += weight * float(outputs[expert, token].norm()) * max(0.0, 1 - cosine)
        assert_close(profile.of(layer, TokenContribution())["turned"], expected, 1e-4)


def test_token_contribution_is_of_the_residual_stream():
    """Without shared experts: between what the norm in front of the block reads, and that with the outputs added."""
    name = "qwen3_moe"
    model, view = model_of(name), MoEModel.wrap(model_of(name))
    read = {}
    handles = [
        view.layers[layer].post_attention_layernorm.register_forward_pre_hook(
            lambda _module, arguments, layer=layer: read.setdefault(layer, []).append(arguments[0].flatten(0, 1))
        )
        for layer in view.moe_layers
    ]
    with torch.no_grad():
        for batch in batches_of(name):
            model(**batch)
    for handle in handles:
        handle.remove()
    profile = measure(view, batches_of(name), [TokenContribution()])
    for layer, (call, outputs) in reference(name).items():
        stream, gated = torch.cat(read[layer]).double(), gated_ETH(call, outputs)
        turn = 1 - torch.cosine_similarity(stream, stream + gated.sum(dim=0), dim=1)
        expected = (gated.norm(dim=2) * turn).sum(dim=1)
        assert_close(profile.of(layer, TokenContribution())["turned"], expected, 1e-4)


@pytest.mark.parametrize("name", LATENT)
def test_token_contribution_is_refused_where_widths_differ(name):
    with pytest.raises(UnsupportedModelError, match=r"layer \d+: token contributions .* this family has none"):
        measure(MoEModel.wrap(model_of(name)), batches_of(name), [TokenContribution()])


def test_independent_of_the_split_into_batches():
    settings = (*EVERYWHERE, TokenContribution())
    for name in ("gpt_oss", "qwen3_moe"):
        model = model_of(name)
        ids = input_batch(model, batch=6, length=8)["input_ids"]
        profiles = [
            measure(MoEModel.wrap(model), [{"input_ids": part} for part in ids.split(size)], settings)
            for size in (6, 2, 1)
        ]
        for layer, statistic, other in itertools.product(profiles[0].shape.layers, settings, profiles[1:]):
            for key, tensor in other.of(layer, statistic).items():
                assert_close(tensor, profiles[0].of(layer, statistic)[key], 1e-4)


def test_in_chunks(monkeypatch):
    """Rows that don't fit at once: the same sums."""
    monkeypatch.setattr("moe_compress.calib.outputs._CHUNK_BYTES", 700)
    for name in ("qwen3_moe", "zaya"):
        profile = measure(MoEModel.wrap(model_of(name)), batches_of(name), EVERYWHERE)
        for layer, statistic in itertools.product(reference(name), EVERYWHERE[:2]):
            for key, tensor in profile.of(layer, statistic).items():
                assert_close(tensor, measured(name).of(layer, statistic)[key], 1e-6)


def test_from_disk_equals_in_memory(tmp_path):
    name = "deepseek_v3"
    settings = (*EVERYWHERE, TokenContribution())
    model_of(name).save_pretrained(tmp_path / "model")
    loaded = hf.model_class(AutoConfig.from_pretrained(tmp_path / "model")).from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    expected = measure(MoEModel.wrap(loaded.eval()), batches_of(name), settings)
    store = DiskStatistics(tmp_path / "statistics")
    found = measure(MoEModel.open(tmp_path / "model"), batches_of(name), settings, store)
    for layer, statistic in itertools.product(reference(name), settings):
        for key, tensor in found.of(layer, statistic).items():
            assert torch.equal(tensor, expected.of(layer, statistic)[key])
