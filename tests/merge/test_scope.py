"""Experts per layer from one total: costs against vectors, numbers against enumeration, runs from disk as in memory."""

import itertools

import pytest
import torch
from checkpoints import recipe, small_checkpoint, texts
from families import input_batch
from grouped import randn
from pydantic import ValidationError
from reference import build, experts_calls, joined, measure, outputs_ETH
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.calib.collect import MemoryStore, Profile
from moe_compress.calib.outputs import OutputGram
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.merge.scope import MergingCost, merging_floors
from moe_compress.model import MoEModel
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import find_pass
from moe_compress.progress import Monitor


def merge(target="native", **options):
    cls = find_pass("merge.average")
    return cls(cls.Options(**options), find_target(target))


def shape_of(*experts, top_k=2, groups=None):
    layers = {i: LayerShape(n, top_k, groups, 8, 4, 3, 0, 2, 0).with_experts(n) for i, n in enumerate(experts)}
    return ModelShape(layers, 0)


def test_cost_is_what_no_multiple_of_the_mean_gives():
    unit = torch.nn.functional.normalize(randn(7, 5), dim=1)
    energy, usage = randn(7, seed=1).square(), randn(7, seed=2).square()
    usage[[1, 4]] = 0  # nobody chose these two: averaged equally
    cost = MergingCost(unit @ unit.T, energy, usage)
    for groups in ([[0, 2], [1, 4], [3, 5, 6]], [[0, 1, 2, 3, 4, 5, 6]], [[e] for e in range(7)]):
        expected = 0.0
        for members in groups:
            weight = usage[members] if float(usage[members].sum()) else torch.ones(len(members), dtype=torch.float64)
            mean = (weight.unsqueeze(1) * unit[members]).sum(0)
            for e in members:
                best = torch.linalg.lstsq(mean.unsqueeze(1), unit[e].unsqueeze(1)).solution
                expected += float(energy[e] * (mean * best[0] - unit[e]).square().sum())
        assert cost.of(groups) == pytest.approx(expected, abs=1e-12)
    assert cost.of([[e] for e in range(7)]) == pytest.approx(0, abs=1e-12)


def test_floors_leave_room_for_every_routing_group():
    assert merging_floors("m", shape_of(8, 8), 9, 2, None, {}) == {0: 2, 1: 2}
    assert merging_floors("m", shape_of(8, 8), 9, 2, 3, {}) == {0: 3, 1: 3}
    assert merging_floors("m", shape_of(8, 8), 9, None, None, {}) == {0: 4, 1: 4}
    # Three alone, the other five in groups of two; none alone, eight in groups of two.
    assert merging_floors("m", shape_of(8, 8), 10, 2, 2, {0: [1, 4, 7]}) == {0: 6, 1: 4}
    assert merging_floors("m", shape_of(8, 8), 10, 2, None, {0: [1, 4, 7]}) == {0: 4, 1: 2}
    # Two routing groups: the one with two that stay alone needs three, so both have three.
    assert merging_floors("m", shape_of(8, 8, groups=(2, 1)), 12, 2, None, {1: [4, 5]}) == {0: 4, 1: 6}
    with pytest.raises(RecipeError, match=r"m: 9 experts are to be left, but .* the layers need 10"):
        merging_floors("m", shape_of(8, 8), 9, 2, 2, {0: [1, 4, 7]})


def measured(vectors, energies):
    """A store as if layers' experts put out these directions, with these energies."""
    store = MemoryStore()
    for layer, (vector, energy) in enumerate(zip(vectors, energies, strict=True)):
        unit = torch.nn.functional.normalize(vector, dim=1)
        store.put(layer, OutputSimilarity().key, {"similarity": unit @ unit.T, "tokens": torch.tensor(9)})
        store.put(layer, Routing().key, {"counts": energy.clone(), "gate": energy.clone()})
        store.put(layer, OutputNorms().key, {"gated_norm": energy.clone(), "gated_norm_squared": energy.clone()})
        store.put(layer, OutputGram().key, {"gram": torch.eye(8), "relative": torch.diag(energy)})
    return store


@pytest.mark.parametrize("cluster", ["average", "dominant", "ream"])
def test_counts_are_the_cheapest_of_all(cluster):
    for seed in range(4):
        vectors = [randn(8, 3 + seed, seed=10 * seed + i) for i in range(3)]
        energies = [10.0**i * randn(8, seed=50 + i).square() for i in range(3)]
        options = {"cluster": cluster, "protect_super_experts": False}
        profile = Profile(shape_of(8, 8, 8), measured(vectors, energies), 3)
        costs = {}
        for n in range(2, 9):  # costs of every number, from uniform plans
            plan = merge(experts=n, **options).plan(profile)
            for i in range(3):
                unit = torch.nn.functional.normalize(vectors[i], dim=1)
                costs[i, n] = MergingCost(unit @ unit.T, energies[i], energies[i]).of(plan.layers[i]["groups"])
        for i, n in itertools.product(range(3), range(3, 9)):  # keeping more is never taken to cost more
            costs[i, n] = min(costs[i, n], costs[i, n - 1])
        plan = merge(experts=5, scope="global", minimum=2, **options).plan(profile)
        found = [len(plan.layers[i]["groups"]) for i in range(3)]
        assert sum(found) == 15
        assert plan.summary["experts_by_global"] == found
        best = min(
            sum(costs[i, n] for i, n in enumerate(counts))
            for counts in itertools.product(range(2, 9), repeat=3)
            if sum(counts) == 15
        )
        assert sum(costs[i, n] for i, n in enumerate(found)) == pytest.approx(best, rel=1e-4)
        assert plan.summary["expected_cost_global"] <= plan.summary["expected_cost_uniform"]


def test_a_layer_of_copies_gives_way():
    """Pairs of copies in one layer, eight different experts in the other: the copies go."""
    vectors = [randn(8, 9, seed=1), randn(4, 9, seed=2).repeat(2, 1)]
    profile = Profile(shape_of(8, 8), measured(vectors, [torch.ones(8).double()] * 2), 2)
    step = merge(keep=0.75, scope="global", cluster="average", protect_super_experts=False)
    plan = step.plan(profile)
    assert plan == step.plan(profile)
    assert plan.layers[1]["groups"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert len(plan.layers[0]["groups"]) == 8
    assert plan.summary["expected_cost_global"] == pytest.approx(0, abs=1e-9)
    assert plan.summary["expected_cost_uniform"] > 0.1
    bounded = merge(keep=0.75, scope="global", minimum=2, cluster="kmeans", max_group=2, protect_super_experts=False)
    assert [len(d["groups"]) for d in bounded.plan(profile).layers.values()] == [8, 4]


def test_energy_is_relative_to_the_hidden_state():
    """What the pass takes as energies, against the model's own forward."""
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 2, 16, 1), input_batch(model, 1, 20, 2)]
    step = merge(keep=0.75, scope="global", protect_super_experts=False)
    profile = measure(view, batches, step.statistics())
    behind = {layer: [] for layer in view.moe_layers}
    for layer in view.moe_layers:
        view.layers[layer].register_forward_hook(
            lambda _m, _a, out, layer=layer: behind[layer].append((out[0] if isinstance(out, tuple) else out).detach())
        )
    calls = experts_calls(model, batches)
    for layer in view.moe_layers:
        call, hidden = joined(calls[layer]), torch.cat([h.flatten(0, 1) for h in behind[layer]]).double()
        own = outputs_ETH(view.block(layer).experts_module, call.hidden_TH)
        energy = torch.zeros(8, dtype=torch.float64)
        for token, expert, weight in call.choices():
            energy[expert] += weight**2 * own[expert, token].square().sum() / hidden[token].square().sum()
        torch.testing.assert_close(step._merging_cost(profile, layer).energy_E, energy, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("router", ["dominant", "remap"])
def test_from_disk_as_in_memory(router, tmp_path):
    model, text = small_checkpoint(tmp_path / "model"), texts(tmp_path / "text")
    step = {"merge.average": {"keep": 0.75, "scope": "global", "minimum": 2, "refit": "none", "router": router}}
    theirs = moe_compress.run(recipe(model, tmp_path / "out", [step], text), monitor=Monitor(show=False)).report
    mine = moe_compress.compress(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(model),
        passes=[step],
        calibration=recipe(model, tmp_path, [], text)["calibration"],
        monitor=Monitor(show=False),
    ).report
    counts = [layer["num_experts"] for layer in theirs["layers"]]
    assert sum(counts) == 6 * len(counts)
    assert len(set(counts)) > 1
    assert theirs["passes"][0]["summary"]["experts_by_global"] == counts
    for own, other in zip(mine["layers"], theirs["layers"], strict=True):
        assert own["passes"][0]["groups"] == other["passes"][0]["groups"]
    loaded = MoEModel.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert [loaded.block(i).num_experts for i in loaded.moe_layers] == counts


def test_what_cannot_be():
    with pytest.raises(ValidationError, match="`minimum` belongs to scope: global"):
        merge(keep=0.5, minimum=3)
    with pytest.raises(RecipeError, match=r"scope 'global' gives layers different numbers of experts, which .*'vllm'"):
        merge("vllm", keep=0.5, scope="global").forecast(shape_of(8, 8))
    with pytest.raises(RecipeError, match=r"merge.average: 4 experts are to be kept, .* lower `minimum`, or keep more"):
        merge(keep=0.25, scope="global", minimum=4).forecast(shape_of(8, 8))
    with pytest.raises(RecipeError, match="raise `max_group`"):
        merge(experts=3, scope="global", minimum=2, max_group=2).forecast(shape_of(8, 8))
    assert merge(experts=3, scope="global", minimum=2, max_group=2).forecast(shape_of(8, 4)).layers  # 4 and 2
