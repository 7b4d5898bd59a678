"""Rules of merging: Fisher-weighted means, zipped neurons, MergeMoE's least squares, router rows with folded biases."""

import pytest
import torch
from families import input_batch
from grouped import randn
from reference import activations_ETI, build, carry_out, experts_calls, joined, measure

from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.fisher import WeightFisher
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing
from moe_compress.export.targets import find_target
from moe_compress.merge.align import activations_on, permuted
from moe_compress.merge.combine import fisher_average, weighted_average
from moe_compress.merge.refit import refit_down, refit_mean
from moe_compress.merge.routers import FoldedBias, router_mixing
from moe_compress.merge.zipping import zip_experts, zipped_neurons
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.backward import GradientSweep
from moe_compress.model.experts import ExpertWeights
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import model_shape
from moe_compress.passes import find_pass
from moe_compress.progress import Progress


def block_and_call(name="qwen3_moe", batch=(6, 40)):
    model = build(name)
    block = MoEModel.wrap(model).block(MoEModel.wrap(model).moe_layers[0])
    return block, joined(experts_calls(model, [input_batch(model, *batch, 1)])[block.layer])


# Fisher


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4), (2, 3, 4, 5)])
def test_fisher_average_is_the_least_cost(shape):
    """Σ_i Σ F_i (W − W_i)², its prior in F: no step away from it costs less; single weights by plain loops."""
    members, fisher = randn(*shape), randn(*shape, seed=1).square()
    lead = shape[:-2] if len(shape) != 4 else shape[:2]
    weight = randn(*(lead if len(shape) > 2 else shape[:1]), seed=2).abs()
    found = fisher_average(members, fisher, weight, prior=0)
    dim = weight.dim() - 1

    def cost(at):
        return float((fisher * (at.unsqueeze(dim) - members).square()).sum())

    for seed in range(5):
        assert cost(found + 1e-3 * randn(*found.shape, seed=seed)) > cost(found)
    if len(shape) == 3:
        for o in range(4):
            for k in range(5):
                by_hand = sum(fisher[i, o, k] * members[i, o, k] for i in range(3)) / sum(fisher[:, o, k])
                assert float(found[o, k]) == pytest.approx(float(by_hand), rel=1e-12)
    torch.testing.assert_close(
        fisher_average(members, torch.zeros_like(fisher), weight),
        (
            members * (s := weight / weight.sum(-1, keepdim=True)).reshape(*s.shape, *(1,) * (members.dim() - s.dim()))
        ).sum(dim),
    )  # nothing known: the plain weighted mean


def test_fisher_heeds_what_one_member_alone_needs():
    members = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    fisher = torch.tensor([[[1.0, 0], [0, 0]], [[0.0, 1], [0, 0]]])
    found = fisher_average(members, fisher, torch.tensor([3.0, 1.0]))
    assert found[0, 0] == pytest.approx(0, abs=1e-3)
    assert found[0, 1] == pytest.approx(1, abs=1e-3)
    assert found[1].tolist() == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("align", ["none", "weights"])
def test_the_pass_weighs_single_weights(align):
    """By hand from what was measured, neurons reordered with their Fisher information."""
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 4, 20, 1)]
    cls = find_pass("merge.average")
    step = cls(cls.Options(experts=5, weight="fisher", refit="none", align=align), find_target("native"))
    assert step.goes_back()
    store = MemoryStore()
    with GradientSweep(view, batches, None) as sweep:
        collect(sweep, step.statistics(), store, Progress(), NextToken(batches))
    step.profile = Profile(model_shape(view), store, len(view.layers))
    plan = step.plan(step.profile)
    first = view.moe_layers[0]
    fisher = ExpertWeights(**store.get(first, WeightFisher().key))
    before = view.block(first).experts.weights().map(torch.clone)
    carry_out(view, step, plan, batches, only=first)
    after = view.block(first).experts.weights()
    decision = plan.layers[first]
    for slot, (members, weights, own) in enumerate(
        zip(decision["groups"], decision["weights"], decision["dominant"], strict=True)
    ):
        moved, known = [], []
        for e in members:
            order = torch.arange(before.up.shape[1])[None]
            if align == "weights" and e != own:
                from moe_compress.merge.align import exact_assignment, weight_similarity

                pair = [before.map(lambda w, n=n: w[n : n + 1]) for n in (own, e)]
                order = exact_assignment(weight_similarity(*pair))
            moved.append(permuted(before.map(lambda w, e=e: w[e : e + 1]), order))
            known.append(permuted(fisher.map(lambda w, e=e: w[e : e + 1]), order))
        for name, target in after.items():
            parts = torch.cat([getattr(m, name) for m in moved])
            if len(members) == 1:
                assert torch.equal(target[slot], parts[0])
                continue
            value = fisher_average(parts, torch.cat([getattr(k, name) for k in known]), torch.tensor(weights))
            torch.testing.assert_close(target[slot].double(), value, rtol=1e-4, atol=1e-6)


# ZipIt


def computed(weights, hidden):
    """SwiGLU experts by hand, [E, T, H] float64."""
    gate = torch.einsum("eih,th->eti", weights.gate, hidden)
    up = torch.einsum("eih,th->eti", weights.up, hidden)
    return torch.einsum("ehi,eti->eth", weights.down, torch.nn.functional.silu(gate) * up)


def neurons(weights, hidden):
    gate = torch.einsum("eih,th->eti", weights.gate, hidden)
    return torch.nn.functional.silu(gate) * torch.einsum("eih,th->eti", weights.up, hidden)


def expert(neurons_, hidden, seed):
    return ExpertWeights(randn(1, neurons_, hidden, seed=seed), randn(1, hidden, neurons_, seed=seed + 1),
                         randn(1, neurons_, hidden, seed=seed + 2))  # fmt: skip


def together(*experts):
    return ExpertWeights(*(torch.cat([getattr(e, n) for e in experts]) for n in ("up", "down", "gate")))


def test_zipping_copies_loses_nothing():
    """An expert and its permuted copy: each neuron finds its own, and what comes out computes the same."""
    one, hidden = expert(12, 6, 0), randn(50, 6, seed=9)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))[None]
    both = together(one, permuted(one, order))
    place = zipped_neurons(neurons(both, hidden))
    assert torch.equal(place[0][order[0]], place[1])
    assert sorted(place[0].tolist()) == list(range(12))
    merged = zip_experts(both.map(lambda w: w[None]), torch.tensor([[0.3, 0.7]]), place[None])
    torch.testing.assert_close(computed(merged, hidden), computed(one, hidden))


def test_zipping_joins_what_one_expert_has_twice():
    """Two unrelated experts with every neuron doubled: all of both fits, which no alignment can give."""
    parts = [expert(6, 5, seed) for seed in (0, 10)]
    twice = [ExpertWeights(p.up.repeat(1, 2, 1), p.down.repeat(1, 1, 2), p.gate.repeat(1, 2, 1)) for p in parts]
    hidden = randn(60, 5, seed=4)
    both = together(*twice)
    place = zipped_neurons(neurons(both, hidden))
    assert torch.equal(place[:, :6], place[:, 6:])
    assert len(place.unique()) == 12
    merged = zip_experts(both.map(lambda w: w[None]), torch.tensor([[1.0, 3.0]]), place[None])
    wanted = (computed(twice[0], hidden) + 3 * computed(twice[1], hidden)) / 4
    torch.testing.assert_close(computed(merged, hidden), wanted)


def test_zipping_joins_the_most_alike_first():
    """Against a plain loop: join the two sets with the largest mean correlation, until I are left."""
    for seed in range(3):
        values = randn(2, 40, 5, seed=seed)
        corr = torch.corrcoef(values.transpose(0, 1).flatten(1).T)
        sets = [[u] for u in range(10)]
        while len(sets) > 5:
            pairs = [(i, j) for i in range(len(sets)) for j in range(i)]
            i, j = max(pairs, key=lambda p: float(corr[sets[p[0]]][:, sets[p[1]]].mean()))
            sets[j] += sets.pop(i)
        found = zipped_neurons(values).flatten()
        assert sorted(sorted(s) for s in sets) == sorted((found == c).nonzero().flatten().tolist() for c in range(5))


def test_zip_weights_of_biases_and_sums():
    """gpt_oss: gate and up biases are means, the down bias is the members' mean; one merged neuron by hand."""
    block, _ = block_and_call("gpt_oss")
    own = block.experts.weights()
    members = own.map(lambda w: w[[1, 4]])
    place = torch.arange(members.up.shape[1]).expand(2, -1)
    merged = zip_experts(members.map(lambda w: w[None]), torch.tensor([[1.0, 1.0]]), place[None])
    for name, value in members.items():
        torch.testing.assert_close(getattr(merged, name)[0], value.double().mean(0))  # neuron i with neuron i


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_zip_pass_zips(name):
    model = build(name)
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 4, 40, 1)]
    cls = find_pass("merge.zip")
    step = cls(cls.Options(experts=6, preset="zipit", protect_super_experts=False), find_target("native"))
    plan = step.plan(measure(view, batches, step.statistics()))
    first = view.moe_layers[0]
    before = view.block(first).experts.weights().map(torch.clone)
    experts = FusedExperts(view.block(first).experts_module)
    hidden = joined(experts_calls(model, batches)[first]).hidden_TH
    wanted = {}
    for slot, members in enumerate(plan.layers[first]["groups"]):
        chosen = before.map(lambda w, m=members: w[m])
        if len(members) > 1:
            place = zipped_neurons(activations_on(experts, chosen, hidden))
            ones = torch.ones(1, len(members), dtype=torch.float64)
            chosen = zip_experts(chosen.map(lambda w: w[None]), ones, place[None])
        wanted[slot] = chosen.map(lambda w: w[0])
    report, _ = carry_out(view, step, plan, batches, only=first)[first]
    assert report["refit"] is None
    after = view.block(first).experts.weights()
    for slot, weights in wanted.items():
        for name_of, value in weights.items():
            torch.testing.assert_close(getattr(after, name_of)[slot].double(), value.double(), rtol=1e-5, atol=1e-6)


# MergeMoE


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_refit_mean_is_mergemoes_closed_form(name):
    """W' T1 with T1 = Q P⁺, P the merged expert's neurons and Q all members', stacked, in float64."""
    block, call = block_and_call(name, (8, 60))
    experts = FusedExperts(block.experts_module)
    groups, weights = (
        [[0, 3], [1], [2, 4, 5], [6, 7]],
        [torch.tensor(w) for w in ([1.0, 3], [1.0], [1.0, 1, 2], [2.0, 1])],
    )
    merged = experts.weights().map(
        lambda w: torch.stack(
            [torch.einsum("n,n...->...", v / v.sum(), w[g]) for g, v in zip(groups, weights, strict=True)]
        )
    )
    start = merged.map(torch.clone)
    error = refit_mean(experts, merged, groups, weights, call.hidden_TH, 1e-9)
    own = experts.weights().map(torch.clone)
    neurons_ETI = activations_ETI(block.experts_module, call.hidden_TH)
    for (_, target), (_, value) in zip(experts.weights().items(), start.items(), strict=True):
        target[:4] = value  # in the module, to ask the family's own class
    merged_ETI = activations_ETI(block.experts_module, call.hidden_TH)
    assert torch.equal(merged.down[1], start.down[1])
    for slot in (0, 2, 3):
        share = (weights[slot] / weights[slot].sum()).double()
        stacked = torch.cat([s * own.down[e].double() for s, e in zip(share, groups[slot], strict=True)], dim=1)
        members = torch.cat([neurons_ETI[e].T for e in groups[slot]])
        wanted = stacked @ (members @ torch.linalg.pinv(merged_ETI[slot].T))  # W' T1
        got = merged.down[slot].double()
        target = stacked @ members
        left = {
            w: float((w_ @ merged_ETI[slot].T - target).square().sum()) for w, w_ in (("got", got), ("paper", wanted))
        }
        assert left["got"] == pytest.approx(left["paper"], rel=1e-3)
        if own.down_bias is None:
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-4)
    assert error.after < error.before


def test_when_both_refits_of_groups_are_the_same():
    """All members see all tokens with equal weights: MergeMoE's problem and each member's own have one solution; where
    members see tokens of their own, they don't."""
    block, call = block_and_call()
    experts = FusedExperts(block.experts_module)
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    start = experts.weights().map(lambda w: torch.stack([w[g].mean(0) for g in groups]))
    found = []
    for shared in (True, False):
        mean, down = start.map(torch.clone), start.map(torch.clone)
        refit_mean(experts, mean, groups, [torch.ones(2)] * 4, call.hidden_TH, 1e-7)
        index = torch.arange(8).expand(len(call.hidden_TH), 8) if shared else call.index_TK
        refit_down(experts, down, groups, call.hidden_TH, index, torch.ones(index.shape), 1e-7)
        found.append((mean.down - down.down).abs().max() / (mean.down - start.down).abs().max())
    assert found[0] < 1e-2
    assert found[1] > 0.1


def test_the_preset_is_mergemoe():
    cls = find_pass("merge.average")
    options = cls.Options(keep=0.5, preset="mergemoe")
    assert (options.refit, options.grouping, options.cluster, options.align) == ("mean", "weights", "dominant", "none")
    assert options.ridge == 1e-4
    with pytest.raises(ValueError, match="preset"):
        cls.Options(keep=0.5, preset="zipit")
    assert find_pass("merge.zip").Options(keep=0.5, preset="zipit").refit == "none"
    for other in ("merge.zip", "merge.subspace"):
        with pytest.raises(ValueError, match="weight"):
            find_pass(other).Options(keep=0.5, weight="fisher")


# Routers


def test_mixtures_of_rows():
    groups, weights = [[0, 3], [1], [2, 4]], [torch.tensor([1.0, 3]), torch.tensor([2.0]), torch.tensor([1.0, 1])]
    rows = {how: router_mixing(how, groups, weights, [3, 1, 2]) for how in ("weighted", "mean", "dominant", "folded")}
    assert rows["weighted"].tolist() == [[0.25, 0, 0, 0.75, 0], [0, 1, 0, 0, 0], [0, 0, 0.5, 0, 0.5]]
    assert rows["mean"].tolist() == [[0.5, 0, 0, 0.5, 0], [0, 1, 0, 0, 0], [0, 0, 0.5, 0, 0.5]]
    assert rows["dominant"].tolist() == rows["folded"].tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]


@torch.no_grad()
def test_a_folded_bias_makes_a_group_as_likely_as_its_members():
    """gpt_oss, members with equal rows: each group's probability is the sum of theirs, exactly."""
    block, call = block_and_call("gpt_oss")
    groups = [[0, 3], [1], [2, 4, 5], [6, 7]]
    for members in groups:
        block.router.weight[members] = block.router.weight[members[0]].clone()
    before = block.route(call.hidden_TH).logits_TE.double().softmax(-1)
    folded = FoldedBias(block, groups)
    assert folded.missing is None
    mixing = router_mixing("folded", groups, [torch.ones(len(g)) for g in groups], [g[0] for g in groups])
    block.regroup([g[0] for g in groups], mixing)
    folded.put(block)
    after = block.route(call.hidden_TH).logits_TE.double().softmax(-1)
    wanted = torch.stack([before[:, g].sum(-1) for g in groups], dim=1)
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "has"), [("gpt_oss", True), ("qwen3_moe", False), ("deepseek_v3", False)])
def test_families_without_a_bias_are_told(name, has):
    model = build(name)
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 4, 20, 1)]
    cls = find_pass("merge.average")
    step = cls(cls.Options(experts=6, router="folded", refit="none", align="none"), find_target("native"))
    plan = step.plan(measure(view, batches, step.statistics()))
    first = view.moe_layers[0]
    bias = view.block(first).router.bias.detach().clone() if has else None
    report, _ = carry_out(view, step, plan, batches, only=first)[first]
    if has:
        assert report["router"] == "folded"
        wanted = torch.stack([bias[g].logsumexp(0) for g in plan.layers[first]["groups"]])
        torch.testing.assert_close(view.block(first).router.bias.detach(), wanted)
    else:
        assert "has no bias on its logits" in report["router"]["skipped"]


def test_needed_statistics():
    cls = find_pass("merge.average")
    step = cls(cls.Options(keep=0.5, weight="fisher"), find_target("native"))
    assert {type(s) for s in step.statistics()} == {OutputSimilarity, Routing, WeightFisher, OutputNorms}
    assert torch.equal(weighted_average(torch.ones(2, 1, 1), torch.tensor([1.0, 3.0])), torch.ones(1, 1).double())
