"""Rules between router and experts: against plain loops in float64, and in front of every kind of experts."""

import copy
import json

import pytest
import torch
from families import discover, input_batch, tiny_model
from packs import mixture, pack_block
from safetensors.torch import load_file, save_file
from test_dispatch import random_routing
from transformers import AutoConfig

import moe_compress
from moe_compress.api import _settle
from moe_compress.errors import CheckpointError, UnsupportedModelError
from moe_compress.export.verify import verify
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel, hf
from moe_compress.model.attention import Attention
from moe_compress.model.routes import Routes, routes_of
from moe_compress.model.rules import Capacity, Choice, Learned, Ratio, Remap, TopK, TopP, executed, make_rule
from moe_compress.model.sweep import Sweep
from moe_compress.probe import streamed
from moe_compress.progress import Progress

EXPERTS, HIDDEN = 8, 6
RECEIVED = torch.rand(40, generator=torch.Generator().manual_seed(9))  # attention that each token receives


def routing(kind, tokens=40, slots=4):
    """Weights as families have them: normalised, softmax that isn't, scaled sigmoid; with slots that nobody serves."""
    index, weight = random_routing(tokens, slots, EXPERTS, zeros=0.1, sentinels=0.1)
    served = executed(index, weight, EXPERTS)
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    score = {
        "normalised": logits.softmax(-1),
        "softmax": logits.softmax(-1),
        "sigmoid": 2.5 * logits.sigmoid(),
    }[kind]
    weight = score.gather(1, index.clamp_max(EXPERTS - 1)) * served
    if kind == "normalised":
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
    weight = weight.masked_fill((index >= EXPERTS), 0.3)  # whatever stands where nobody serves, it isn't a weight
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(3))
    return hidden, index, weight, logits


def loops(rule, hidden, index, weight, logits):
    """What a rule does, token by token and slot by slot: one dict expert → weight per token."""
    rows = [
        {int(e): float(w) for e, w in zip(i, v, strict=True) if w and e < EXPERTS}
        for i, v in zip(index, weight, strict=True)
    ]
    before = [sum(row.values()) for row in rows]
    after = []
    for t, row in enumerate(rows):
        order = sorted(row, key=lambda e: -row[e])
        if isinstance(rule, TopK):
            kept = order[: rule.keep]
        elif isinstance(rule, Ratio):
            importance = float(hidden[t].abs().sum()) * (float(RECEIVED[t]) if rule.protect_by == "attention" else 1)
            safe = rule.protect is not None and importance >= rule.protect
            kept = [e for e in order if safe or e == order[0] or row[e] >= rule.threshold * row[order[0]]]
        elif isinstance(rule, TopP):
            kept, total = [], 0.0
            while order and (not kept or total < rule.share * before[t]):
                kept.append(order.pop(0))
                total += row[kept[-1]]
        elif isinstance(rule, Learned):
            unit = hidden[t].double() / hidden[t].double().square().mean().sqrt()
            shares = [row[e] / before[t] for e in order] + [0.0] * (rule.slots - len(order))
            score = rule.weight.double() @ torch.cat([unit, torch.tensor(shares, dtype=torch.float64)])
            kept = order[: int((score + rule.bias.double()).argmax()) + 1]
        else:
            raise AssertionError(rule)
        after.append({e: row[e] for e in kept})
    if rule.renormalize:
        after = [
            {e: w * total / sum(row.values()) for e, w in row.items()} for row, total in zip(after, before, strict=True)
        ]
    return after


def found(index, weight):
    return [
        {int(e): float(w) for e, w in zip(i, v, strict=True) if w and e < EXPERTS}
        for i, v in zip(index, weight, strict=True)
    ]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-6)


def learned(slots=4, hidden=HIDDEN):
    rule = Learned(hidden, slots)
    generator = torch.Generator().manual_seed(5)
    rule.weight = torch.nn.Parameter(torch.randn(slots, hidden + slots, generator=generator), requires_grad=False)
    rule.bias = torch.nn.Parameter(torch.randn(slots, generator=generator), requires_grad=False)
    return rule


RULES = [
    *(TopK(k, r) for k in (1, 2, 3, 4) for r in (True, False)),
    *(Ratio(b, p, r) for b in (0.0, 0.4, 0.8, 2.0) for p in (None, 5.0) for r in (True, False)),
    *(TopP(p, r) for p in (0.01, 0.5, 0.9, 2.0) for r in (True, False)),
    *(Ratio(b, p, True, "attention") for b in (0.4, 2.0) for p in (None, 2.5)),
    learned(),
]


@pytest.mark.parametrize("kind", ["normalised", "softmax", "sigmoid"])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: json.dumps(r.describe()))
def test_rules_do_what_loops_do(rule, kind):
    """With weights of every kind; renormalised weights sum up to what the token had; slots without expert stay so."""
    hidden, index, weight, logits = routing(kind)
    routes = Routes([rule])
    if routes.reads_attention:
        routes.attention = Attention("here")
        routes.attention.put(RECEIVED)
    got = routes(hidden, index, weight, EXPERTS)
    expected = loops(rule, hidden, index, weight, logits)
    assert_same(found(*got), expected)
    assert routes.executed == sum(map(len, expected))
    assert routes.tokens == len(index)


def test_a_threshold_keeps_ties_and_dtypes():
    """Weights equal to the largest are never below a ratio of 1; bfloat16 stays bfloat16."""
    weight = torch.tensor([[0.5, 0.5, 0.25]], dtype=torch.bfloat16)
    index = torch.tensor([[1, 2, 3]])
    _, after = Ratio(1.0, renormalize=True)(Choice(torch.ones(1, 4), index, weight, 4))
    assert after.dtype == torch.bfloat16
    assert after.tolist() == [[0.625, 0.625, 0.0]]


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5, 8.0])
def test_capacity_does_what_loops_do(factor, overflow):
    hidden, index, weight, logits = routing("softmax")
    tokens, slots = index.shape
    limit = int(-(-factor * slots * tokens // EXPERTS))
    rule = Capacity(factor, overflow, tries=3)
    routes = Routes([rule])
    routes.logits = logits
    got = routes(hidden, index, weight, EXPERTS)

    served = [(t, s) for t in range(tokens) for s in range(slots) if weight[t, s] and index[t, s] < EXPERTS]
    kept = {}
    for e in range(EXPERTS):
        own = sorted((p for p in served if index[p] == e), key=lambda p: -weight[p])
        kept |= dict.fromkeys(own[:limit], e)
    if overflow == "reroute":
        load = [sum(e == x for e in kept.values()) for x in range(EXPERTS)]
        used = [{int(index[t, s]) for s in range(slots) if (t, s) in served} for t in range(tokens)]
        order = logits.argsort(-1, descending=True).tolist()
        for s in range(slots):
            waiting = [(t, s) for t in range(tokens) if (t, s) in served and (t, s) not in kept]
            for _ in range(3):
                asked = {}
                for t, _ in waiting:
                    free = [e for e in order[t] if e not in used[t]]
                    if free:
                        asked[t] = free[0]
                        used[t].add(free[0])
                room = [limit - n for n in load]
                for t in sorted(asked, key=lambda t: -weight[t, s]):
                    if room[asked[t]] > 0:
                        room[asked[t]] -= 1
                        load[asked[t]] += 1
                        kept[t, s] = asked[t]
                waiting = [p for p in waiting if p not in kept]
    expected = [{} for _ in range(tokens)]
    for (t, s), e in kept.items():
        expected[t][e] = float(weight[t, s])
    assert_same(found(*got), expected)
    load = torch.bincount(got[0][executed(*got, EXPERTS)], minlength=EXPERTS)
    assert int(load.max()) <= limit
    if factor == 8.0:
        assert_same(expected, found(index, weight))  # room for all
    if overflow == "reroute" and factor == 1.0:
        dropping = Routes([Capacity(factor)])
        dropping(hidden, index, weight, EXPERTS)
        assert routes.executed > dropping.executed  # some did find room


def test_one_token_has_room():
    """While a model writes, one token at a time, nothing is dropped."""
    hidden, index, weight, _ = routing("softmax", tokens=1)
    assert Capacity(0.01)(Choice(hidden, index, weight, EXPERTS))[1] is weight


def test_remapped_classes_add_up():
    """Several router rows → one expert: weights of a token's slots that meet there are summed, once."""
    hidden, _, _, _ = routing("softmax")
    index, weight = random_routing(40, 4, EXPERTS)
    table = [0, 0, 1, -1, 2, 1, 2, 2]
    got = Routes([Remap(table)])(hidden, index, weight, 3)
    expected = []
    for i, v in zip(index.tolist(), weight.tolist(), strict=True):
        row = {}
        for c, w in zip(i, v, strict=True):
            if w and c < EXPERTS and table[c] >= 0:
                row[table[c]] = row.get(table[c], 0.0) + w
        expected.append(row)
    assert_same(found(*got), expected)
    assert int(executed(*got, 3).sum()) == sum(map(len, expected))
    assert any(len(row) < sum(w > 0 for w in v) for row, v in zip(expected, weight.tolist(), strict=True))


def test_a_remapped_block_computes_with_merged_experts():
    """Two equal experts as one, with the router untouched: the model's logits stay what they were."""
    model = tiny_model("qwen3_moe")
    view = MoEModel.wrap(model)
    taps = []
    with Sweep(view, [input_batch(model)]) as sweep:
        for step in sweep:
            step.advance(taps.append)
    kept, gone = sorted(taps[0].index_TK[0].tolist())  # some token uses both
    others = [e for e in range(8) if e != gone]
    with torch.no_grad():
        for i in view.moe_layers:
            for parameter in view.block(i).experts_module.parameters():
                parameter[gone] = parameter[kept]
        expected = model(**input_batch(model)).logits
        for i in view.moe_layers:
            experts = view.block(i).experts_module
            for name, parameter in list(experts.named_parameters()):
                setattr(experts, name, torch.nn.Parameter(parameter[others]))
            view.block(i).add_rule(Remap([others.index(kept if e == gone else e) for e in range(8)]))
        with hf.implementation(model):
            found = model(**input_batch(model)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert moe_compress.experts_per_token(model) < 2  # where a token had both, one expert ran once


def test_rules_follow_one_another():
    hidden, index, weight, _ = routing("softmax")
    both = Routes([TopP(0.9), TopK(2)])(hidden, index, weight, EXPERTS)
    first = Routes([TopP(0.9)])(hidden, index, weight, EXPERTS)
    assert_same(found(*both), found(*Routes([TopK(2)])(hidden, *first, EXPERTS)))


# In front of experts


NAMES = sorted({"qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "gemma4", "nemotron_h", "zaya"} & set(discover()))


def ruled(block):
    """Rules of several kinds, one with parameters, where there is more than one expert to choose among."""
    rule = learned(block.top_k, block.experts.hidden_size)
    block.add_rule(rule)
    block.add_rule(Ratio(0.5))


@pytest.mark.parametrize("packed", [False, True], ids=["fused", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_rules_is_read_again(name, packed, tmp_path):
    """In memory, layer by layer, and by from_pretrained: the same logits, the same experts per token; verified."""
    tiny_model(name).bfloat16().save_pretrained(tmp_path / "source")
    source = MoEModel.open(tmp_path / "source")
    source.overlay = _Ruled(source, packed)
    tokens = list(range(3, 19))
    assert write_folder(source, tmp_path / "out", {"probe": streamed(source, tokens)}, Progress()) == "native"
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    verify(tmp_path / "out", Progress())

    model = _loaded(tmp_path / "out")
    with torch.no_grad():
        after = model(**input_batch(model)).logits
    used = moe_compress.experts_per_token(model, reset=True)
    view = MoEModel.open(tmp_path / "out")
    taps = []
    with Sweep(view, [input_batch(view.module)]) as sweep:
        for step in sweep:
            step.advance(taps.append)
        streamed_logits = next(sweep.outputs())[1]
    torch.testing.assert_close(streamed_logits, after, rtol=1e-4, atol=1e-4)
    seen = [float(executed(t.index_TK, t.weight_TK, t.experts.num_experts).sum()) / len(t.index_TK) for t in taps]
    assert used == pytest.approx(sum(seen) / len(seen), abs=0.05)  # bfloat16 elsewhere may tip a choice

    plain = _loaded(tmp_path / "source")
    with torch.no_grad():
        before = plain(**input_batch(plain)).logits
    if source.block(source.moe_layers[0]).top_k > 1:
        assert not torch.allclose(before, after, atol=1e-3)
        assert used < source.block(source.moe_layers[0]).top_k

    # Once more, by transformers' own hand.
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = _loaded(tmp_path / "again")(**input_batch(model)).logits
    torch.testing.assert_close(again, after, rtol=1e-5, atol=1e-5)  # grouped products depend on where tensors lie


def _loaded(folder):
    cls = hf.model_class(AutoConfig.from_pretrained(folder))
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


class _Ruled:
    """An overlay that puts rules into every block."""

    def __init__(self, model, packed):
        self.blocks = {}
        for index in model.moe_layers:
            with model.layer(index, stored=True) as layer:
                if packed:
                    pack_block(layer.block, mixture)
                ruled(layer.block)
                tensors, description = layer.block.state()
                self.blocks[index] = {n: t.clone() for n, t in tensors.items()}, description

    def get(self, layer):
        return self.blocks.get(layer)


def test_rules_stay_in_front_of_other_experts():
    """Packing a block's experts leaves its rules where they are, parameters included."""
    view = MoEModel.wrap(tiny_model("qwen3_moe"))
    block = view.block(view.moe_layers[0])
    ruled(block)
    weight = block.rules[0].weight
    pack_block(block, mixture)
    assert block.kind == "packed"
    assert [r.kind for r in block.rules] == ["learned", "ratio"]
    assert block.rules[0].weight is weight
    assert not any(n.startswith(block.rule_prefix) for n in block.weight_names())


def test_copies_have_rules_of_their_own():
    """A deep copy counts for itself, also where a rule reads the router."""
    view = MoEModel.wrap(tiny_model("qwen3_moe"))
    for index in view.moe_layers:
        view.block(index).add_rule(Capacity(0.5, "reroute"))
    other = copy.deepcopy(view.module)
    with torch.no_grad(), hf.implementation(other):
        after = other(**input_batch(other)).logits
    assert moe_compress.experts_per_token(view.module) is None
    assert moe_compress.experts_per_token(other, reset=True) > 0
    assert moe_compress.experts_per_token(other) is None
    with torch.no_grad(), hf.implementation(view.module):
        assert torch.equal(view.module(**input_batch(view.module)).logits, after)


def test_what_was_made_for_these_experts_keeps_them():
    block = MoEModel.wrap(tiny_model("qwen3_moe")).block(1)
    block.add_rule(TopK(1))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has routing rules \(top_k\): change its experts before"):
        block.keep([0, 1, 2])
    with pytest.raises(UnsupportedModelError, match="before"):
        block.regroup([0, 1], torch.eye(8)[:2])


def test_unknown_rules_are_refused():
    with pytest.raises(CheckpointError, match="'clairvoyant' aren't known: the checkpoint needs a newer moe-compress"):
        make_rule({"kind": "clairvoyant"})
    with pytest.raises(CheckpointError, match="'top_k' has other settings"):
        make_rule({"kind": "top_k", "depth": 3})
    with pytest.raises(CheckpointError, match="'ratio' has other settings: `protect_by` is 'charm', neither"):
        make_rule({"kind": "ratio", "threshold": 0.5, "protect_by": "charm"})


def test_parameters_that_no_rule_has_are_refused(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    model = MoEModel.open(tmp_path / "source")
    model.overlay = _Ruled(model, False)
    write_folder(model, tmp_path / "out", {}, Progress())
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.layers.1.mlp.experts.routing.7.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"routing\.7\.weight"):
        _loaded(tmp_path / "out")


def test_a_loaded_model_runs_what_skips():
    """Others compute a slot of weight 0 like any other: dense experts with rules run by this package's."""
    view = MoEModel.wrap(tiny_model("qwen3_moe"))
    for index in view.moe_layers:
        view.block(index).add_rule(TopK(1))
    _settle(view)
    experts = view.block(view.moe_layers[0]).experts_module
    assert routes_of(experts) is not None
    assert experts.config._experts_implementation == hf.IMPLEMENTATION
