"""Passes that merge experts, on tiny models: as planned, by the papers' procedures, copies without loss."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from families import input_batch
from grouped import partitions, spread
from pydantic import ValidationError
from reference import activations_ETI, build, carry_out, experts_calls, joined, measure, outputs_ETH

from moe_compress.calib.collect import MemoryStore, Profile
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.merge.experts import PRIOR
from moe_compress.merge.options import MergeOptions, SubspaceOptions
from moe_compress.model import MoEModel
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Plan, find_pass


def merge(name="merge.average", preset="sub-moe", **options):
    """A pass, by default as Sub-MoE has it: k-means, frequencies, nothing aligned or refitted."""
    cls = find_pass(name)
    return cls(cls.Options(preset=preset, **options), find_target("native"))


@functools.cache
def batches_of(name):
    model = build(name)
    return [input_batch(model, 4, 24, 1), input_batch(model, 2, 40, 2)]


def planned(name, step, change=None, **overrides):
    """(changed model, its view, plan)."""
    model = build(name, **overrides)
    view = MoEModel.wrap(model)
    if change is not None:
        change(view)
    return model, view, step.plan(measure(view, batches_of(name), step.statistics()))


def raw(view, layer):
    return {name: tensor.clone() for name, tensor in view.block(layer).experts.weights().items()}


def plant_copy(view, original, copy):
    """Make one expert of the last layer an exact copy of another, router rows and biases included."""
    layer = view.moe_layers[-1]
    for name, tensor in view.layers[layer].state_dict().items():
        if tensor.shape[:1] == (8,) and (".experts." in name or ".gate." in name or ".router." in name):
            tensor[copy] = tensor[original]


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        *(("qwen3_moe", weight) for weight in ("frequency", "gate", "equal")),
        *((n, "gate") for n in ("deepseek_v3", "gpt_oss", "nemotron_h", "zaya", "gemma4")),
    ],
)
def test_average_merges_as_planned(name, weight):
    """Groups' matrices and biases become the weighted average, and so do the router's rows; the report says so."""
    step = merge(experts=4, weight=weight)
    model, view, plan = planned(name, step)
    before = {layer: raw(view, layer) for layer in view.moe_layers}
    beside = {i: {n: t.clone() for n, t in view.layers[i].state_dict().items()} for i in view.moe_layers}
    usage = {layer: {} for layer in view.moe_layers}
    for layer, calls in experts_calls(model, batches_of(name)).items():
        for _, expert, gate in joined(calls).choices():
            count = {"frequency": 1.0, "gate": gate, "equal": 0.0}[weight]
            usage[layer][expert] = usage[layer].get(expert, 0.0) + count
    plan = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    for layer, (report, _) in carry_out(view, step, plan, batches_of(name)).items():
        block, groups = view.block(layer), report["groups"]
        assert block.num_experts == len(groups) == 4
        assert sorted(e for g in groups for e in g) == list(range(8))
        assert [next(s for s, g in enumerate(groups) if e in g) for e in range(8)] == report["slots"]
        assert json.loads(json.dumps(report)) == report
        if block.groups:  # experts are merged inside a routing group, and the groups stay in order
            assert [{e // 4 for e in g} for g in groups] == [{0}, {0}, {1}, {1}]
        shares = []
        for members in groups:
            w = torch.tensor(
                [1.0 if weight == "equal" else usage[layer].get(e, 0.0) for e in members], dtype=torch.float64
            )
            shares.append(w / w.sum() if float(w.sum()) else torch.ones_like(w) / len(w))
        for part, tensor in raw(view, layer).items():
            for slot, members in enumerate(groups):
                old = before[layer][part]
                if len(members) == 1:
                    assert torch.equal(tensor[slot], old[members[0]])
                else:
                    expected = sum(float(f) * old[e].double() for f, e in zip(shares[slot], members, strict=True))
                    torch.testing.assert_close(tensor[slot].double(), expected, rtol=1e-5, atol=1e-6)
        for n, tensor in view.layers[layer].state_dict().items():
            old = beside[layer][n]
            if tensor.shape != old.shape and ".experts." not in f".{n}":
                assert torch.equal(tensor[4:], old[8:])  # classes of the router that are no experts
                for slot, members in enumerate(groups):
                    expected = sum(float(f) * old[e].double() for f, e in zip(shares[slot], members, strict=True))
                    torch.testing.assert_close(tensor[slot].double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert model(**input_batch(model)).logits.isfinite().all()


@pytest.mark.parametrize("router", ["dominant", "mean", "weighted"])
def test_router_rows(router):
    step = merge(experts=4, router=router)
    _, view, plan = planned("qwen3_moe", step)
    old = {layer: view.block(layer).router.weight.detach().clone() for layer in view.moe_layers}
    for layer, (report, _) in carry_out(view, step, plan, batches_of("qwen3_moe")).items():
        for slot, members in enumerate(report["groups"]):
            weights = plan.layers[layer]["weights"][slot]
            dominant = members[weights.index(max(weights))]
            assert plan.layers[layer]["dominant"][slot] == dominant
            expected = {
                "dominant": old[layer][dominant],
                "mean": old[layer][members].mean(0),
                "weighted": sum(w * old[layer][e] for w, e in zip(weights, members, strict=True)) / (sum(weights) or 1),
            }[router]
            torch.testing.assert_close(view.block(layer).router.weight[slot], expected, rtol=1e-5, atol=1e-6)


def test_plan_groups_what_is_alike_and_prices_it():
    """The inertia reported is that of the experts' normalised outputs, put end to end over all tokens."""
    step = merge(experts=5, sample=10_000)
    model, view, plan = planned("qwen3_moe", step)
    for layer, calls in experts_calls(model, batches_of("qwen3_moe")).items():
        call = joined(calls)
        outputs = outputs_ETH(view.block(layer).experts_module, call.hidden_TH)
        unit = outputs / outputs.norm(dim=-1, keepdim=True)
        vectors = unit.flatten(1) / len(call.hidden_TH) ** 0.5
        vectors = torch.linalg.qr(vectors.T)[1].T  # the same distances in eight dimensions
        decision = plan.layers[layer]
        assert decision["spread"] == pytest.approx(spread(vectors, decision["groups"]), rel=1e-4)
        best = min(spread(vectors, groups) for groups in partitions(8, 5))
        assert decision["spread"] <= 1.02 * best
    assert plan.summary == {
        "experts": 15,
        "merged_groups": sum(len(g) > 1 for d in plan.layers.values() for g in d["groups"]),
    }
    assert step.plan(measure(view, batches_of("qwen3_moe"), step.statistics())) == plan


@pytest.mark.parametrize(
    ("name", "router", "options"),
    [
        ("qwen3_moe", "dominant", {}),
        ("qwen3_moe", "weighted", {}),
        ("qwen3_moe", "mean", {"weight": "gate"}),
        ("gpt_oss", "weighted", {}),
        ("muse_spark", "weighted", {}),
    ],
)
def test_merging_copies_loses_nothing(name, router, options):
    """Identical experts, top-1 routing with weight 1: whichever was chosen, the merged one is now, and is the same."""
    step = merge(experts=7, router=router, **options)
    model, view, plan = planned(name, step, lambda view: plant_copy(view, 2, 6), num_experts_per_tok=1)
    last = view.moe_layers[-1]
    assert [2, 6] in plan.layers[last]["groups"]
    assert plan.layers[last]["spread"] == pytest.approx(0, abs=1e-6)
    chosen = {e for _, e, _ in joined(experts_calls(model, batches_of(name))[last]).choices()}
    assert chosen & {2, 6}
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches_of(name)]
    report, inputs = carry_out(view, step, plan, batches_of(name), only=last)[last]
    assert report["slots"][2] == report["slots"][6]
    assert inputs.tokens == 176
    with torch.no_grad():
        for batch, expected in zip(batches_of(name), before, strict=True):
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "muse_spark"])
def test_merging_copies_with_top_2(name):
    """Tokens that were not sent to both copies get the same outputs; those that were lose one of their two experts."""
    step = merge(experts=7)
    model, view, plan = planned(name, step, lambda view: plant_copy(view, 2, 6))
    last = view.moe_layers[-1]
    assert [2, 6] in plan.layers[last]["groups"]
    before = joined(experts_calls(model, batches_of(name))[last])
    report, _ = carry_out(view, step, plan, batches_of(name), only=last)[last]
    after = joined(experts_calls(model, batches_of(name))[last])
    both = torch.tensor([{2, 6} <= set(row) for row in before.index_TK.tolist()])
    assert 0 < int(both.sum()) < len(both)
    torch.testing.assert_close(after.output_TH[~both], before.output_TH[~both], rtol=1e-4, atol=1e-5)
    slots = torch.tensor(report["slots"])
    assert torch.equal(slots[before.index_TK[~both]].sort().values, after.index_TK[~both].sort().values)
    assert (after.index_TK[both] == slots[2]).any(dim=1).all()
    assert not torch.allclose(after.output_TH[both], before.output_TH[both], rtol=1e-2, atol=1e-2)


# Subspaces


def test_subspace_of_full_rank_is_averaging_byte_for_byte():
    states = []
    for step in (
        merge(experts=4),
        merge("merge.subspace", experts=4, rank=1.0),
        merge("merge.subspace", experts=4, rank=0.999),
    ):
        model, view, plan = planned("qwen3_moe", step)
        carry_out(view, step, plan, batches_of("qwen3_moe"))
        states.append(model.state_dict())
    assert all(torch.equal(states[1][n], tensor) for n, tensor in states[0].items())
    assert all(torch.equal(states[2][n], tensor) for n, tensor in states[0].items())  # rounds to all directions


@pytest.mark.parametrize("whiten", [False, True])
def test_subspace_merges_by_the_papers_procedure(whiten):
    """Each projection by the moments of what it reads, summed over the tokens routed to each member."""
    step = merge("merge.subspace", experts=4, rank=0.5, whiten=whiten)
    model, view, plan = planned("qwen3_moe", step)
    first = view.moe_layers[0]  # whose inputs no earlier merge changes
    call = joined(experts_calls(model, batches_of("qwen3_moe"))[first])
    activations = activations_ETI(view.block(first).experts_module, call.hidden_TH)
    sums = {"input": torch.zeros(8, 32, 32).double(), "down": torch.zeros(8, 16, 16).double()}
    for token, expert, _ in call.choices():
        x, a = call.hidden_TH[token].double(), activations[expert, token]
        sums["input"][expert] += torch.outer(x, x)
        sums["down"][expert] += torch.outer(a, a)
    before = raw(view, first)
    report, _ = carry_out(view, step, plan, batches_of("qwen3_moe"))[first]
    after = raw(view, first)
    merged = 0
    for slot, members in enumerate(report["groups"]):
        weight = torch.tensor(plan.layers[first]["weights"][slot], dtype=torch.float64)
        for name in ("gate", "up", "down"):
            if len(members) == 1:
                assert torch.equal(after[name][slot], before[name][members[0]])
                continue
            merged += 1
            matrices = before[name][members].double()
            average = sum(w * m for w, m in zip(weight, matrices, strict=True)) / weight.sum()
            gram = torch.zeros(matrices.shape[1], matrices.shape[1], dtype=torch.float64)
            for w, e in zip(matrices, members, strict=True):
                moment = sums["down" if name == "down" else "input"][e]
                gram += w @ (moment if whiten else torch.eye(w.shape[1], dtype=torch.float64)) @ w.T
            if whiten:  # the weights themselves break ties
                plain = sum(w @ w.T for w in matrices)
                gram += PRIOR * gram.trace() / plain.trace() * plain
            rank = gram.shape[0] // 2
            basis = torch.linalg.svd(gram)[0][:, :rank]
            found = after[name][slot].double()
            torch.testing.assert_close(found, basis @ basis.T @ average, rtol=1e-3, atol=1e-4)
            assert int(torch.linalg.matrix_rank(found, rtol=1e-5)) <= rank
    assert merged


def test_few_tokens_do_not_leave_the_subspace_to_chance():
    """Groups that saw fewer tokens than directions are kept: the order in which tokens are summed must not matter."""
    step = merge("merge.subspace", experts=4, rank=0.75)
    merged = []
    for order in (1, -1):
        model, view, plan = planned("qwen3_moe", step)
        ids = input_batch(model, 2, 10, 5)["input_ids"]
        carry_out(view, step, plan, [{"input_ids": part} for part in ids.split(1)[::order]], only=view.moe_layers[0])
        merged.append(raw(view, view.moe_layers[0]))
    for name, tensor in merged[0].items():
        torch.testing.assert_close(tensor, merged[1][name], rtol=1e-2, atol=1e-2)


# Protection, limits, odd cases


def test_super_experts_stay_alone():
    def plant(view):
        view.block(view.moe_layers[0]).experts.weights().down[3] *= 300

    step = merge(experts=4)
    _, view, plan = planned("qwen3_moe", step, plant)
    assert {i: d["protected"] for i, d in plan.layers.items() if d["protected"]} == {0: [3]}
    assert [3] in plan.layers[0]["groups"]
    assert plan.notes == ["layer 0: super experts [3] are not merged"]
    before = raw(view, 0)
    report, _ = carry_out(view, step, plan, batches_of("qwen3_moe"))[0]
    assert report["experts"][3] == {"merged_with": [], "weight": 1.0, "dominant": True, "protected": True}
    assert [e for e, told in enumerate(report["experts"]) if told["protected"]] == [3]
    for members, weights in zip(plan.layers[0]["groups"], plan.layers[0]["weights"], strict=True):
        for expert, weight in zip(members, weights, strict=True):
            told = report["experts"][expert]
            assert told["merged_with"] == [e for e in members if e != expert]
            assert told["weight"] == pytest.approx(weight / sum(weights))
    after = raw(view, 0)
    assert all(torch.equal(after[name][report["slots"][3]], before[name][3]) for name in before)
    assert OutputNorms() not in merge(experts=4, protect_super_experts=False).statistics()


def test_more_protected_than_groups_is_refused():
    """Three experts of a layer are protected where three groups are allowed: none is left for the other five."""
    step, store = merge(experts=3), MemoryStore()
    shape = LayerShape(8, 2, None, 8, 4, 3, 0, 2, 0).with_experts(8)
    for layer in range(60):
        maximum = torch.tensor([1.0, 1e6, 1e6, 1e6, 1, 1, 1, 1] if layer == 2 else [1.0] * 8)
        store.put(layer, OutputNorms().key, {"maximum": maximum})
        store.put(layer, OutputSimilarity().key, {"similarity": torch.eye(8), "tokens": torch.tensor(9)})
        store.put(layer, Routing().key, {"counts": torch.ones(8), "gate": torch.ones(8)})
    with pytest.raises(RecipeError, match="3 experts are to stay by themselves"):
        step.plan(Profile(ModelShape(dict.fromkeys(range(60), shape), 0), store, 60))


def test_experts_that_nobody_chose_are_averaged_equally():
    step = merge(experts=4)
    _, view, plan = planned("qwen3_moe", step)
    first = view.moe_layers[0]
    decision = plan.layers[first]
    decision["weights"] = [[0.0] * len(g) for g in decision["groups"]]
    before = raw(view, first)
    carry_out(view, step, plan, batches_of("qwen3_moe"))
    after = raw(view, first)
    for slot, members in enumerate(decision["groups"]):
        torch.testing.assert_close(after["up"][slot], before["up"][members].mean(0), rtol=1e-5, atol=1e-6)


def test_hashed_tokens_follow_their_expert():
    """DeepSeek-V4's first layers choose experts by token id: the table must name the slot that each went into."""
    step = merge(experts=5)
    _, view, plan = planned("deepseek_v4", step)
    first = view.moe_layers[0]
    before = view.block(first).router.tid2eid.clone()
    report, _ = carry_out(view, step, plan, batches_of("deepseek_v4"))[first]
    after = view.block(first).router.tid2eid
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        assert len(set(new)) == len(new)
        assert {report["slots"][e] for e in old} <= set(new)


@pytest.mark.parametrize(
    ("options", "groups", "complaint"),
    [
        ({"experts": 9}, None, "merge.average: layer 0 has 8 experts, 9 can't be kept"),
        ({"experts": 1}, None, "merge.average: layer 0 routes each token to 2 experts, and 1 would be left"),
        ({"experts": 5}, (2, 1), "merge.average: layer 0 routes in 2 groups of equal size, and 5 experts don't divide"),
    ],
)
def test_counts_that_routing_can_not_do(options, groups, complaint):
    profile = measure(MoEModel.wrap(build("qwen3_moe")), batches_of("qwen3_moe"), [])
    shape = profile.shape.with_layers({0: replace(profile.shape.layers[0], groups=groups)})
    with pytest.raises(RecipeError, match=complaint):
        merge(**options).forecast(shape)
    assert merge(experts=4).forecast(shape).layers[0].num_experts == 4


def test_options():
    assert all(f.description for cls in (MergeOptions, SubspaceOptions) for f in cls.model_fields.values())
    assert merge(keep=0.5, sample=7).statistics()[:2] == [OutputSimilarity(sample=7), Routing()]
    for wrong in ({"keep": 0.5, "rank": 0.5}, {}, {"keep": 0.5, "weight": "norm"}, {"keep": 0.5, "router": "max"}):
        with pytest.raises(ValidationError):
            MergeOptions(**wrong)
    for rank in (0, 1.5):
        with pytest.raises(ValidationError):
            SubspaceOptions(keep=0.5, rank=rank)
