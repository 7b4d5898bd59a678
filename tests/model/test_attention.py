"""Attention that tokens receive: against the whole map of eager attention, by plain loops in float64."""

import copy

import pytest
import torch
from families import discover, input_batch, tiny_model
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import moe_compress
from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.skipping import RankedImportance
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEModel, attention, hf
from moe_compress.model.rules import Ratio
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress

WINDOW = 5
# Grouped queries; a sliding window; sinks beside a window; latent keys wider than values.
SETTINGS = {"qwen3_moe": {}, "mixtral": {"sliding_window": WINDOW}, "gpt_oss": {}, "deepseek_v3": {}}
CASES = [(n, i) for n in SETTINGS for i in ("eager", "sdpa") if n in discover() and (n, i) != ("gpt_oss", "sdpa")]
PADDING = {
    "none": [[1] * 12, [1] * 12],
    "left": [[0] * 4 + [1] * 8, [1] * 12],
    "right": [[1] * 12, [1] * 7 + [0] * 5],
}


def model_of(name, implementation="eager", scale=6.0):
    """With attention that chooses; float32: families take softmax in it, and padding breaks float64."""
    model = tiny_model(name, **SETTINGS.get(name, {}))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("q_proj.weight", "q_b_proj.weight", "q_norm.weight")):
                parameter *= scale
    return model


def watched(model):
    """Every layer watched: layer → what it says of the last forward."""
    view = MoEModel.wrap(model)
    blocks = {index: view.block(index) for index in view.moe_layers}
    return {i: attention.watch(b.module, i, [b.experts_module, b.router]) for i, b in blocks.items()}


def reference(weights_BNQL, real_BL, windows, first=0):
    """What tokens received, by loops over texts, tokens and who sees them."""
    batch, heads, queries, _ = weights_BNQL.shape
    result = torch.zeros(batch, queries, dtype=torch.float64)
    for b in range(batch):
        for j in range(queries):
            own = first + j
            seeing = [i for i in range(queries) if own <= first + i < own + windows and real_BL[b][first + i]]
            if not real_BL[b][own] or not seeing:
                continue
            total = sum(float(weights_BNQL[b, h, i, own]) for h in range(heads) for i in seeing)
            result[b, j] = total / heads / len(seeing)
    return result


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def window_of(model, layer):
    kinds = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    return window if window and (kinds is None or kinds[layer] == "sliding_attention") else 10**6


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_it_is_the_mean_over_heads_and_those_who_see(name, implementation, padding, monkeypatch):
    """In chunks of one query, padded on either side; and the model computes, bit for bit, what it did."""
    monkeypatch.setattr(attention, "_WEIGHTS_AT_ONCE", 1)
    real = torch.tensor(PADDING[padding])
    batch = {**input_batch(model_of(name)), "attention_mask": real}
    with torch.no_grad():
        maps = model_of(name)(**batch, output_attentions=True).attentions
        model = model_of(name, implementation)
        plain = model(**batch).logits
        found = watched(model)
        assert torch.equal(model(**batch).logits, plain)
    assert found
    for index, seen in found.items():
        expected = reference(maps[index], real.bool(), window_of(model, index))
        got = seen.read(24).view(2, 12).double()
        close(got[real.bool()], expected[real.bool()])
        assert not got[~real.bool()].any()
        assert float(got.max() / got[real.bool()].min()) > 3  # there is something to choose by


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_with_a_cache_the_new_tokens_count(cache):
    """A second part of a text: what its tokens receive from one another; one token alone: 0."""
    model = model_of("qwen3_moe", "sdpa")
    ids = input_batch(model)["input_ids"]
    with torch.no_grad():
        maps = model_of("qwen3_moe")(ids, output_attentions=True).attentions
        found = watched(model)
        store = cache(config=model.config, **({"max_cache_len": 20} if cache is StaticCache else {}))
        model(ids[:, :5], past_key_values=store, use_cache=True)
        assert found[1].read(10).all()
        model(ids[:, 5:11], past_key_values=store, use_cache=True)
        expected = reference(maps[1][:, :, 5:11, :11], torch.ones(2, 12, dtype=torch.bool), 10**6, first=5)
        close(found[1].read(12).view(2, 6), expected)
        model(ids[:, 11:], past_key_values=store, use_cache=True)
        assert found[1].read(2).tolist() == [0, 0]


def test_a_model_is_left_as_it_was():
    """Configs and hooks come back; a copy of a watched model reports to itself; it may attend otherwise later."""
    model = model_of("qwen3_moe", "sdpa")
    before = [(m, m.__dict__.get("config"), len(m._forward_pre_hooks)) for m in model.modules()]
    layer = model.model.layers[1]
    first = attention.watch(layer, 1, [])
    assert attention.watch(layer, 1, []) is first
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    with torch.no_grad():
        other(**input_batch(model))
    second = attention.attention_of(other.model.layers[1])
    assert second.read(24).all()
    with pytest.raises(UnsupportedModelError):
        first.read(24)
    attention.unwatch(layer)
    after = [(m, m.__dict__.get("config"), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(a[0] is b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(before, after, strict=True))


REFUSED = {
    "qwen3_next": r"layer 0 \(Qwen3NextDecoderLayer\): .* none of its modules attends through .* `protect: norm`",
    "inkling": r"layer 1 \(InklingDecoderLayer\): .* InklingAttention isn't softmax attention as its queries",
    "deepseek_v32": r"layer 1 \(DeepseekV32DecoderLayer\) computes something else while its attention is watched",
}


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & set(discover())))
def test_families_that_can_not_be_watched_say_so(name):
    """Linear attention; a bias that is learned; a family that asks by which function it attends. Left as they were."""
    model = tiny_model(name)
    with torch.no_grad():
        before = model(**input_batch(model)).logits
        with (
            pytest.raises(UnsupportedModelError, match=REFUSED[name]),
            Sweep(MoEModel.wrap(model), [input_batch(model)]) as sweep,
        ):
            collect(sweep, [RankedImportance()], MemoryStore(), Progress())
        assert torch.equal(model(**input_batch(model)).logits, before)
    assert not any(attention.attention_of(layer) for layer in MoEModel.wrap(model).layers)


def test_other_functions_are_refused_by_name():
    """A rule in a model that is then set to attend by something whose masks aren't known."""
    AttentionInterface.register("another", sdpa_attention_forward)
    model = tiny_model("qwen3_moe")
    MoEModel.wrap(model).block(1).add_rule(Ratio(0.5, 1.0, True, "attention"))
    ids = input_batch(model)["input_ids"][:1]
    with torch.no_grad(), hf.implementation(model):
        model(ids)
        model.config._attn_implementation_internal = "another"
        with pytest.raises(UnsupportedModelError, match=r"layer 1 .*attends by 'another', not by 'eager' or 'sdpa'"):
            model(ids)


# In front of experts


def ruled(model, rule):
    view = MoEModel.wrap(model)
    for index in view.moe_layers:
        view.block(index).add_rule(Ratio(*rule))
    return model


def test_rules_protect_what_is_attended_to():
    """Layer by layer in a text that is read at once: tokens beyond the threshold keep both, the others the first."""
    batch = {**input_batch(model_of("qwen3_moe")), "attention_mask": torch.tensor(PADDING["left"])}
    view = MoEModel.wrap(model_of("qwen3_moe", "sdpa"))
    block = view.block(1)
    with torch.no_grad():
        maps = model_of("qwen3_moe")(**batch, output_attentions=True).attentions
    received = reference(maps[1], batch["attention_mask"].bool(), 10**6).flatten()
    taps = []
    with Sweep(view, [batch]) as sweep:
        for step in sweep:
            step.advance(taps.append if step.index == 1 else None)
    importance = taps[0].hidden_TH.abs().sum(-1) * received
    threshold = float(importance.sort().values[-5:-3].mean())
    block.add_rule(Ratio(2.0, threshold, True, "attention"))
    with torch.no_grad(), hf.implementation(view.module):
        view.module(**batch)
    routes = block.experts_module.routing
    assert routes.tokens == 24
    assert routes.executed == 24 + 4
    with Sweep(view, [batch]) as sweep:
        for step in sweep:
            step.advance(taps.append if step.index == 1 else None)
    assert torch.equal((taps[1].weight_TK != 0).sum(-1) == 2, importance >= threshold)


def test_while_a_model_writes_none_is_protected():
    """`generate` with a cache: the prompt as if read at once, then every token as without protection."""
    rule = (2.0, 1e-9, True, "attention")
    model = ruled(model_of("qwen3_moe", "sdpa"), rule)
    ids = input_batch(model)["input_ids"]
    with torch.no_grad(), hf.implementation(model):
        model(ids)
        assert moe_compress.experts_per_token(model, reset=True) == 2  # a threshold that everybody reaches
        model.generate(ids, max_new_tokens=7, do_sample=False)
    # 12 tokens of the prompt use 2 experts, 6 that are written and read again 1.
    assert moe_compress.experts_per_token(model) == pytest.approx((12 * 2 + 6 * 1) / 18)


def test_rules_that_go_leave_no_watch():
    """Where the last rule that reads attention is replaced, the layer is as it was."""
    view = MoEModel.wrap(tiny_model("qwen3_moe"))
    block = view.block(1)
    block.add_rule(Ratio(0.5, 1.0, True, "attention"))
    assert attention.attention_of(block.module) is block.experts_module.routing.attention
    _, description = block.state()
    description["routing"][0]["protect_by"] = "norm"
    block.restructure(description)
    assert attention.attention_of(block.module) is None
    assert block.experts_module.routing.attention is None
