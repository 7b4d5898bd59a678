"""Merging experts: clustering against brute force, combining against the papers' procedures, passes on tiny models."""

import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch
from families import input_batch
from pydantic import ValidationError
from reference import activations_ETI, build, carry_out, experts_calls, joined, measure, outputs_ETH
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compress.calib.collect import MemoryStore, Profile
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.merge.cluster import inertia
from moe_compress.merge.combine import joint_subspace, output_gram, subspace_merge, weighted_average
from moe_compress.merge.experts import PRIOR
from moe_compress.merge.kmeans import kmeans
from moe_compress.merge.options import MergeOptions, SubspaceOptions
from moe_compress.model import MoEModel
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Plan, find_pass


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# Clustering


def spread(vectors, groups):
    """Sum of squared distances to the means of the groups, from the vectors themselves."""
    total = 0.0
    for members in groups:
        mean = vectors[members].sum(0) / len(members)
        total += sum(float((vectors[e] - mean).square().sum()) for e in members)
    return total


def partitions(count, clusters):
    """All partitions of range(count) into non-empty groups: each next one goes into a group there is, or a new one."""
    found = [[]]
    for e in range(count):
        grown = [[[*g, e] if g is mine else g for g in p] for p in found for mine in p]
        found = grown + [[*p, [e]] for p in found if len(p) < clusters]
    return [p for p in found if len(p) == clusters]


def lloyd(vectors, seeds):
    """Plain k-means on vectors from these seeds; None where a group runs empty."""
    means = vectors[list(seeds)]
    label = None
    while True:
        new = torch.cdist(vectors, means).argmin(dim=1)
        if len(new.unique()) < len(seeds):
            return None
        if label is not None and torch.equal(new, label):
            return [(label == c).nonzero().flatten().tolist() for c in range(len(seeds))]
        label = new
        means = torch.stack([vectors[label == c].mean(0) for c in range(len(seeds))])


def check_partition(groups, count, clusters):
    assert len(groups) == clusters
    assert all(groups)
    assert sorted(e for g in groups for e in g) == list(range(count))
    assert groups == sorted(sorted(g) for g in groups)


@pytest.mark.parametrize("seed", range(4))
def test_inertia_is_what_the_vectors_say(seed):
    vectors = randn(7, 5, seed=seed)
    for groups in ([[0, 1, 2, 3, 4, 5, 6]], [[0, 3], [1], [2, 4, 5, 6]], [[e] for e in range(7)]):
        assert inertia(vectors @ vectors.T, groups) == pytest.approx(spread(vectors, groups), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_against_all_partitions(seed):
    """With enough starts the best partition there is; with the default ones nothing that plain k-means improves."""
    vectors = randn(6, 4, seed=seed)
    similarity = vectors @ vectors.T
    for clusters in range(1, 7):
        best = min(spread(vectors, groups) for groups in partitions(6, clusters))
        groups = kmeans(similarity, clusters, generator(seed), restarts=64)
        check_partition(groups, 6, clusters)
        assert spread(vectors, groups) == pytest.approx(best, abs=1e-9)
        groups = kmeans(similarity, clusters, generator(seed))
        check_partition(groups, 6, clusters)
        means = torch.stack([vectors[g].mean(0) for g in groups])
        nearest = torch.cdist(vectors, means).argmin(dim=1)
        if all(len(g) > 1 for g in groups):  # a group never gives up its last member
            assert all(int(nearest[e]) == c for c, members in enumerate(groups) for e in members)


def test_kmeans_is_as_good_as_plain_kmeans_on_the_vectors():
    for seed in range(3):
        vectors = randn(12, 3, seed=seed)
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        starts = (lloyd(vectors, seeds) for seeds in itertools.combinations(range(12), 3))
        best = min(spread(vectors, groups) for groups in starts if groups)
        groups = kmeans(vectors @ vectors.T, 3, generator(seed), restarts=64)
        assert spread(vectors, groups) <= best + 1e-9


def test_kmeans_repeats_for_a_seed_and_depends_on_nothing_else():
    vectors = randn(24, 6)
    similarity = vectors @ vectors.T
    found = [kmeans(similarity, 9, generator(5)) for _ in range(2)]
    torch.manual_seed(1)
    found.append(kmeans(similarity, 9, generator(5)))
    assert found[0] == found[1] == found[2]
    assert len({json.dumps(kmeans(similarity, 9, generator(seed), restarts=1)) for seed in range(8)}) > 1


@pytest.mark.parametrize("clusters", [1, 3, 4, 7, 8])
def test_copies_are_one_group(clusters):
    """Three experts and their copies: as few groups as there are different experts lose nothing."""
    which = [0, 1, 0, 2, 1, 0, 2, 2]
    vectors = randn(3, 5)[which]
    groups = kmeans(vectors @ vectors.T, clusters, generator())
    check_partition(groups, 8, clusters)
    if clusters >= 3:
        assert spread(vectors, groups) == pytest.approx(0, abs=1e-9)
        assert all(len({which[e] for e in g}) == 1 for g in groups)
    if clusters == 3:
        assert groups == [[0, 2, 5], [1, 4], [3, 6, 7]]


def test_kmeans_of_identical_experts_and_of_noise():
    for similarity in (torch.ones(5, 5), torch.zeros(5, 5), torch.eye(5), torch.eye(5) - 0.01 * torch.ones(5, 5)):
        for clusters in range(1, 6):
            check_partition(kmeans(similarity, clusters, generator()), 5, clusters)
    vectors = randn(10, 4).float()
    rounded = (vectors @ vectors.T).bfloat16()  # no longer positive semidefinite
    check_partition(kmeans(rounded, 4, generator()), 10, 4)
    for clusters in (0, 6):
        with pytest.raises(ValueError, match=f"5 experts can't form {clusters} groups"):
            kmeans(torch.eye(5), clusters, generator())


# Combining


def test_weighted_average():
    matrices, weight = randn(2, 3, 5, 4), torch.rand(2, 3, generator=generator(1)) + 0.1
    for g in range(2):
        expected = sum(float(weight[g, i]) * matrices[g, i] for i in range(3)) / float(weight[g].sum())
        torch.testing.assert_close(weighted_average(matrices, weight)[g], expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weighted_average(matrices[g], weight[g]), weighted_average(matrices, weight)[g])
    half = matrices.bfloat16()
    assert weighted_average(half, weight).dtype == torch.float64
    torch.testing.assert_close(weighted_average(half, weight), weighted_average(half.double(), weight))


def moments(*shape, seed=0):
    """Full-rank second moments [..., K, K]."""
    samples = randn(*shape[:-1], 3 * shape[-1], shape[-1], seed=seed)
    scale = torch.linspace(0.1, 3, shape[-1], dtype=torch.float64)
    return torch.einsum("...tk,...tl->...kl", samples * scale, samples * scale)


def sub_moe(matrices_NOK, weight_N, rank, moments_NKK=None):
    """The paper's procedure as it stands: whiten, decompose side by side, cut, de-whiten, average the V, multiply."""
    count, _, width = matrices_NOK.shape
    factors = [torch.eye(width, dtype=torch.float64)] * count
    if moments_NKK is not None:
        factors = [torch.linalg.cholesky(m) for m in moments_NKK]
    wide = torch.cat([w @ s for w, s in zip(matrices_NOK, factors, strict=True)], dim=1)
    u, sigma, vt = torch.linalg.svd(wide, full_matrices=False)
    u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
    blocks = [v @ torch.linalg.inv(s) for v, s in zip(vt.split(width, dim=1), factors, strict=True)]
    average = sum(float(f) * v for f, v in zip(weight_N, blocks, strict=True)) / float(weight_N.sum())
    return u @ torch.diag(sigma) @ average


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 6, 16), (4, 7, 7)])
def test_subspace_merge_is_the_papers_procedure(shape, whiten):
    matrices, weight = randn(*shape), torch.rand(shape[0], generator=generator(1), dtype=torch.float64) + 0.1
    whitening = moments(shape[0], shape[2]) if whiten else None
    for rank in range(1, shape[1] + 1):
        found = subspace_merge(matrices, weight, rank, output_gram(matrices, whitening))
        torch.testing.assert_close(found, sub_moe(matrices, weight, rank, whitening), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("whiten", [False, True])
def test_subspace_merge_at_full_rank_is_averaging(whiten):
    matrices, weight = randn(2, 3, 6, 9), torch.rand(2, 3, generator=generator(1)) + 0.1
    whitening = moments(2, 3, 9) if whiten else None
    for rank in (6, 7):
        assert torch.equal(
            subspace_merge(matrices, weight, rank, output_gram(matrices, whitening)), weighted_average(matrices, weight)
        )
    basis = joint_subspace(output_gram(matrices, whitening), 6)
    projected = basis @ basis.transpose(-2, -1) @ weighted_average(matrices, weight)
    torch.testing.assert_close(projected, weighted_average(matrices, weight))


@pytest.mark.parametrize("whiten", [False, True])
def test_subspace_merge_is_a_projection(whiten):
    matrices, weight = randn(2, 3, 8, 9), torch.rand(2, 3, generator=generator(1)) + 0.1
    whitening = moments(2, 3, 9) if whiten else None
    for rank in (1, 3, 7):
        basis = joint_subspace(output_gram(matrices, whitening), rank)
        assert basis.shape == (2, 8, rank)
        torch.testing.assert_close(
            basis.transpose(-2, -1) @ basis, torch.eye(rank, dtype=torch.float64).expand(2, -1, -1)
        )
        merged = subspace_merge(matrices, weight, rank, output_gram(matrices, whitening))
        assert torch.linalg.matrix_rank(merged).tolist() == [rank, rank]
        torch.testing.assert_close(basis @ (basis.transpose(-2, -1) @ merged), merged)
        copies = merged.unsqueeze(1).repeat(1, 3, 1, 1)
        same = subspace_merge(copies, weight, rank, output_gram(copies, whitening))
        torch.testing.assert_close(same, merged)


@pytest.mark.parametrize("whiten", [False, True])
def test_error_of_the_subspace_is_that_of_the_singular_values(whiten):
    """Eckart–Young in the whitened norm: rank r leaves of the members the squares of the other singular values."""
    matrices, whitening = randn(3, 8, 5), moments(3, 5) if whiten else torch.eye(5, dtype=torch.float64).repeat(3, 1, 1)
    wide = torch.cat([w @ torch.linalg.cholesky(m) for w, m in zip(matrices, whitening, strict=True)], dim=1)
    sigma = torch.linalg.svdvals(wide)
    errors, distances = [], []
    average = weighted_average(matrices, torch.ones(3))
    for rank in range(1, 9):
        basis = joint_subspace(output_gram(matrices, whitening if whiten else None), rank)
        left = wide - basis @ (basis.T @ wide)
        errors.append(float(left.square().sum()))
        assert errors[-1] == pytest.approx(float(sigma[rank:].square().sum()), abs=1e-8)
        merged = subspace_merge(matrices, torch.ones(3), rank, output_gram(matrices, whitening if whiten else None))
        distances.append(float((merged - average).norm()))
    assert errors == sorted(errors, reverse=True)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


def test_matrices_of_low_rank_lose_nothing():
    """Where the members' joint output space is smaller than the rank, the merge is their average."""
    matrices = randn(10, 4) @ randn(3, 4, 6, seed=1)
    for whitening in (None, moments(3, 6)):
        found = subspace_merge(matrices, torch.tensor([1.0, 2, 3]), 4, output_gram(matrices, whitening))
        torch.testing.assert_close(found, weighted_average(matrices, torch.tensor([1.0, 2, 3])))


def test_combining_on_another_device():
    """A stand-in for a GPU: tensors without data that know their device, and refuse to meet another's."""
    with FakeTensorMode():
        matrices = torch.empty(2, 3, 8, 6, device="lazy:0")
        weight, whitening = torch.empty(2, 3, dtype=torch.float64), torch.empty(2, 3, 6, 6)
        assert weighted_average(matrices, weight).device.type == "lazy"
        assert joint_subspace(output_gram(matrices, whitening), 4).device.type == "lazy"


# Passes


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
