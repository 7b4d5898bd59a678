"""Pruning experts: criteria against their formulas, super experts, plans as plain data."""

import functools
import json

import pytest
import torch
from families import input_batch
from places import DEMO
from pydantic import ValidationError
from reference import KINDS, build, carry_out, experts_calls, joined, measure, outputs_ETH

from moe_compress.calib.collect import MemoryStore, Profile
from moe_compress.calib.statistics import OutputNorms, Routing
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.model import MoEModel
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Plan, all_passes, find_pass
from moe_compress.prune.criteria import CRITERIA, Criterion, criterion
from moe_compress.prune.experts import PruneExperts, PruneOptions
from moe_compress.prune.super_experts import super_experts


def prune(target="native", **options):
    return PruneExperts(PruneOptions(**options), find_target(target))


def layer_shape(experts, top_k=2, groups=None):
    return LayerShape(experts, top_k, groups, 8, 4, 3, 0, 2, 0).with_experts(experts)


def profile_of(scores, top_k=2, groups=None, maxima=None, decoder_layers=10):
    """A profile whose `ean` criterion gives these scores: layer → list."""
    store = MemoryStore()
    for layer, values in scores.items():
        norm = torch.tensor(values, dtype=torch.float64)
        maximum = torch.ones_like(norm) if maxima is None else torch.tensor(maxima[layer], dtype=torch.float64)
        store.put(layer, OutputNorms().key, {"norm": norm, "gated_norm": norm, "maximum": maximum})
        store.put(layer, Routing().key, {"counts": torch.ones_like(norm), "gate": norm})
    shapes = {layer: layer_shape(len(values), top_k, groups) for layer, values in scores.items()}
    return Profile(ModelShape(shapes, 0), store, decoder_layers)


def kept(plan):
    return {layer: decision["keep"] for layer, decision in plan.layers.items()}


# Criteria


@functools.cache
def model_of(name):
    return build(name, DEMO / "moe-demo")


@functools.cache
def batches_of(name):
    model = model_of(name)
    return [input_batch(model, 2, 12, 1), input_batch(model, 1, 9, 2)]


@functools.cache
def profile_of_model(name):
    return measure(MoEModel.wrap(model_of(name)), batches_of(name), [Routing(), OutputNorms()])


FORMULAS = {  # of an expert's (gate, norm of output) pairs
    "frequency": len,
    "gate_mass": lambda rows: sum(gate for gate, _ in rows),
    "ean": lambda rows: sum(norm for _, norm in rows),
    "reap": lambda rows: sum(gate * norm for gate, norm in rows) / len(rows) if rows else 0.0,
}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "zaya", "demo"])
def test_criteria_equal_their_formulas(name):
    view = MoEModel.wrap(model_of(name))
    expected = {}
    for layer, calls in experts_calls(model_of(name), batches_of(name)).items():
        call = joined(calls)
        outputs = outputs_ETH(view.block(layer).experts_module, call.hidden_TH)
        rows = [[] for _ in range(len(outputs))]
        for token, expert, gate in call.choices():
            rows[expert].append((gate, float(outputs[expert, token].norm())))
        expected[layer] = rows
    for name_of, formula in FORMULAS.items():
        keep = {"experts": 4} if name != "demo" else {"experts": 10}
        plan = prune(criterion=name_of, protect_super_experts=False, **keep).plan(profile_of_model(name))
        for layer, rows in expected.items():
            scores = [formula(r) for r in rows]
            assert plan.layers[layer]["scores"] == pytest.approx(scores, rel=1e-5, abs=1e-8)
            size = len(scores) // (view.block(layer).groups or (1,))[0]
            for first in range(0, len(scores), size):  # in every routing group, or among all, the best stay
                inside = range(first, first + size)
                stay = [scores[e] for e in inside if e in plan.layers[layer]["keep"]]
                go = [scores[e] for e in inside if e in plan.layers[layer]["remove"]]
                assert len(stay) == len(plan.layers[layer]["keep"]) * size // len(scores)
                assert min(stay) >= max(go) - 1e-6 * max(scores)


def test_random_is_a_control():
    """Different from layer to layer and seed to seed, the same for a seed."""
    profile = profile_of({0: [1.0] * 8, 1: [1.0] * 8})
    plans = [prune(criterion="random", experts=4, seed=seed).plan(profile) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].layers[0]["scores"] != plans[0].layers[1]["scores"]
    assert plans[0].layers != plans[2].layers


def test_criteria_are_registered_by_name():
    assert all(c.name == name and c.source and c.score.__doc__ for name, c in CRITERIA.items())
    with pytest.raises((RecipeError, ValidationError), match="did you mean 'frequency'"):
        prune(criterion="frequencey", keep=0.5)

    @criterion("least", "a test: the last experts are best", Routing())
    def least(measured, _asked):
        """The number of the expert."""
        return torch.arange(len(measured["routing"]["counts"]), dtype=torch.float64)

    try:
        assert isinstance(CRITERIA["least"], Criterion)
        plan = prune(criterion="least", experts=3).plan(profile_of({0: [5.0, 4, 3, 2, 1, 0]}))
        assert kept(plan) == {0: [3, 4, 5]}
    finally:
        del CRITERIA["least"]


def test_reap_keeps_a_rare_but_strong_expert():
    """Outputs are linear in the down projection: n times larger is n times the score, whoever else is chosen."""
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    last = view.moe_layers[-1]  # what it puts out reaches no other expert
    before = measure(view, batches_of("qwen3_moe"), [Routing(), OutputNorms()])
    step = prune(criterion="reap", experts=4, protect_super_experts=False)
    weakest = min(range(8), key=step.plan(before).layers[last]["scores"].__getitem__)
    assert weakest in step.plan(before).layers[last]["remove"]
    view.block(last).experts.weights().down[weakest] *= 64
    after = measure(view, batches_of("qwen3_moe"), [Routing(), OutputNorms()])
    scores = [step.plan(p).layers[last]["scores"] for p in (before, after)]
    assert scores[1][weakest] == pytest.approx(64 * scores[0][weakest], rel=1e-5)
    assert [s for e, s in enumerate(scores[1]) if e != weakest] == [s for e, s in enumerate(scores[0]) if e != weakest]
    assert weakest in step.plan(after).layers[last]["keep"]
    frequency = prune(criterion="frequency", experts=4, protect_super_experts=False)
    assert frequency.plan(after).layers == frequency.plan(before).layers  # which frequency doesn't see


def test_reap_is_what_a_layer_loses():
    """n_e · REAP_e = Σ_t ‖what the layer puts out less without e‖, the weights of the others staying as they are."""
    model = model_of("qwen3_moe")
    view = MoEModel.wrap(model)
    plan = prune(criterion="reap", experts=4).plan(profile_of_model("qwen3_moe"))
    for layer, calls in experts_calls(model, batches_of("qwen3_moe")).items():
        call, counts = joined(calls), profile_of_model("qwen3_moe").of(layer, Routing())["counts"]
        for expert in range(8):
            without = call.weight_TK.masked_fill(call.index_TK == expert, 0)
            with torch.no_grad():
                output = view.block(layer).experts_module(call.hidden_TH, call.index_TK, without)
            lost = float((call.output_TH - output).double().norm(dim=1).sum())
            assert plan.layers[layer]["scores"][expert] * float(counts[expert]) == pytest.approx(
                lost, rel=1e-3, abs=1e-4
            )


# Super experts


def test_super_experts_by_the_rule():
    """Above the 99.5th percentile, a tenth of the largest and far above the ordinary, in the first three quarters."""
    generator = torch.Generator().manual_seed(0)
    maxima = {i: 1 + torch.rand(64, generator=generator) for i in range(12)}
    assert super_experts(maxima, 12) == {}
    maxima[1][3], maxima[2][60], maxima[11][5], maxima[8][0] = 900.0, 400.0, 5000.0, 499.0
    # A tenth of the largest is 500 now, though the largest itself is too late to be one.
    assert super_experts(maxima, 12) == {1: [3]}
    maxima[11][5] = 1.0
    assert super_experts(maxima, 12) == {1: [3], 2: [60], 8: [0]}
    assert super_experts({i + 1: m for i, m in maxima.items()}, 12) == {2: [3], 3: [60]}  # 9 of 12 layers form them
    maxima[2][60] = 30.0
    assert super_experts(maxima, 12) == {1: [3], 8: [0]}


def test_super_experts_of_a_small_model():
    maxima = {i: torch.ones(16) for i in range(4)}
    maxima[0][3], maxima[1][5] = 1000.0, 900.0
    assert super_experts(maxima, 4) == {0: [3], 1: [5]}


@pytest.mark.parametrize("name", [*KINDS, "demo"])
def test_ordinary_models_have_none(name):
    profile = profile_of_model(name)
    maxima = {i: profile.of(i, OutputNorms())["maximum"] for i in profile.shape.layers}
    assert super_experts(maxima, profile.decoder_layers) == {}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "demo"])
def test_planted_super_expert_is_found_and_kept(name):
    """One expert with outputs 300 times as large: kept though the criterion would remove it first."""
    model = build(name, DEMO / "moe-demo")
    view = MoEModel.wrap(model)
    layer = view.moe_layers[0]
    counts = profile_of_model(name).of(layer, Routing())["counts"]
    planted = int(counts.masked_fill(counts == 0, 1e9).argmin())  # the least chosen, but chosen
    weights = view.block(layer).experts.weights()
    weights.down[planted] *= 300
    if weights.down_bias is not None:
        weights.down_bias[planted] *= 300
    profile = measure(view, batches_of(name), [Routing(), OutputNorms()])
    experts = len(counts)
    plan = prune(criterion="frequency", keep=0.5).plan(profile)
    assert {i: d["protected"] for i, d in plan.layers.items() if d["protected"]} == {layer: [planted]}
    assert planted in plan.layers[layer]["keep"]
    assert f"layer {layer}: super experts [{planted}] are protected" in plan.notes
    without = prune(criterion="frequency", keep=0.5, protect_super_experts=False)
    assert planted in without.plan(profile).layers[layer]["remove"]
    assert all(len(d["keep"]) == experts // 2 for d in plan.layers.values())


# Plans and what they do


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_plans_are_pure_plain_data(scope):
    profile = profile_of_model("demo")
    step = prune(keep=0.5, scope=scope)
    plan = step.plan(profile)
    again = prune(keep=0.5, scope=scope).plan(profile)
    assert plan == again == step.plan(profile)
    text = json.dumps(plan.to_json())
    assert Plan.from_json(json.loads(text)) == plan
    assert json.dumps(Plan.from_json(json.loads(text)).to_json()) == text
    assert plan.summary == {"kept": 32, "of": 64, "criterion": "reap"}
    forecast = step.forecast(profile.shape)
    assert sum(layer.num_experts for layer in forecast.layers.values()) == plan.summary["kept"]


def test_unseen_experts_are_noted():
    profile = profile_of_model("zaya")
    unseen = {i: int((profile.of(i, Routing())["counts"] == 0).sum()) for i in profile.shape.layers}
    assert any(unseen.values())
    plan = prune(keep=0.5).plan(profile)
    assert plan.notes == [f"layer {i}: {n} experts saw no calibration token" for i, n in unseen.items() if n]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "zaya"])
def test_apply_removes_what_was_planned(name):
    model = build(name)
    view = MoEModel.wrap(model)
    before = {i: view.block(i).experts.weights().map(torch.clone) for i in view.moe_layers}
    step = prune(experts=4, refit=False)
    plan = step.plan(profile_of_model(name))
    plan = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    reports = carry_out(view, step, plan, batches_of(name))
    assert list(reports) == view.moe_layers
    for layer, (report, _) in reports.items():
        keep = plan.layers[layer]["keep"]
        assert view.block(layer).num_experts == 4
        assert report["removed"] == plan.layers[layer]["remove"]
        assert [e for e, told in enumerate(report["experts"]) if told["removed"]] == plan.layers[layer]["remove"]
        assert [told["score"] for told in report["experts"]] == plan.layers[layer]["scores"]
        assert report["slots"] == [keep.index(e) if e in keep else -1 for e in range(8)]
        assert report["refit"] is None
        assert json.loads(json.dumps(report)) == report
        after = view.block(layer).experts.weights()
        for (_, old), (_, new) in zip(before[layer].items(), after.items(), strict=True):
            assert torch.equal(new, old[keep])
    with torch.no_grad():
        assert model(**input_batch(model)).logits.isfinite().all()


def test_pass_is_registered():
    assert find_pass("prune.experts") is PruneExperts
    assert "prune.experts" in all_passes()
    assert all(field.description for field in PruneOptions.model_fields.values())
    with pytest.raises(RecipeError, match=r"did you mean 'prune\.experts'"):
        find_pass("prune.expert")
