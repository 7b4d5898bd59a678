"""Grouping experts: linkages and dominants against plain procedures, similarities against loops, presets."""

import pytest
import torch
from families import input_batch
from pydantic import ValidationError
from reference import build, carry_out, experts_calls, joined, measure

from moe_compress.calib.similarity import CoActivation, LogitSimilarity, WeightSimilarity, cosines
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.merge.cluster import grabbed, hierarchical
from moe_compress.merge.cluster import joined as joined_to_kept
from moe_compress.merge.grouping import Asked, group_layers
from moe_compress.merge.options import PRESETS, MergeOptions, SubspaceOptions
from moe_compress.model import MoEModel
from moe_compress.passes import find_pass


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linkage(vectors, clusters, method):
    """Agglomerative clustering as it is defined: join the two nearest groups, again and again."""
    groups = [[e] for e in range(len(vectors))]
    pairs = torch.cdist(vectors, vectors)

    def distance(a, b):
        between = pairs[a][:, b]
        if method == "ward":  # what the sum of squared distances to the means grows by
            gap = vectors[a].mean(0) - vectors[b].mean(0)
            return float(gap.square().sum()) * len(a) * len(b) / (len(a) + len(b))
        return float(between.mean() if method == "average" else between.max())

    while len(groups) > clusters:
        a, b = min(
            ((i, j) for i in range(len(groups)) for j in range(i)), key=lambda p: distance(groups[p[0]], groups[p[1]])
        )
        groups[b] = groups[b] + groups.pop(a)
    return sorted(sorted(g) for g in groups)


@pytest.mark.parametrize("method", ["average", "complete", "ward"])
def test_hierarchical_clustering(method):
    for seed in range(4):
        vectors = rand(12, 5, seed=seed)
        for clusters in (1, 3, 7, 11, 12):
            assert hierarchical(vectors @ vectors.T, clusters, method) == linkage(vectors, clusters, method)
    copies = rand(3, 5)[[0, 1, 0, 2, 1, 0, 2, 2]]
    for clusters in range(1, 9):  # also where distances tie, as many groups as asked for
        assert len(hierarchical(copies @ copies.T, clusters, method)) == clusters
    assert hierarchical(copies @ copies.T, 3, method) == [[0, 2, 5], [1, 4], [3, 6, 7]]
    with pytest.raises(ValueError, match="8 experts can't form 9 groups"):
        hierarchical(copies @ copies.T, 9, method)


SIMILARITY = torch.tensor(
    [
        [1.0, 0.1, 0.9, 0.2, 0.8, 0.3],
        [0.1, 1.0, 0.3, 0.7, 0.2, 0.4],
        [0.9, 0.3, 1.0, 0.1, 0.5, 0.2],
        [0.2, 0.7, 0.1, 1.0, 0.3, 0.6],
        [0.8, 0.2, 0.5, 0.3, 1.0, 0.1],
        [0.3, 0.4, 0.2, 0.6, 0.1, 1.0],
    ]
)


def test_who_joins_whom():
    assert joined_to_kept(SIMILARITY, [1, 0]) == {1: [1, 3, 5], 0: [0, 2, 4]}
    assert joined_to_kept(SIMILARITY, list(range(6))) == {e: [e] for e in range(6)}
    assert grabbed(SIMILARITY, [1, 0], 17) == {1: [1, 2, 3, 4, 5], 0: [0]}
    assert grabbed(SIMILARITY, [1, 0], 3) == {1: [1, 3, 5], 0: [0, 2, 4]}
    assert grabbed(SIMILARITY, [0, 1], 4) == {0: [0, 2, 4, 5], 1: [1, 3]}
    with pytest.raises(ValueError, match="6 experts don't fit into 2 groups of at most 2"):
        grabbed(SIMILARITY, [0, 1], 2)


def grouped(count, cluster, routing_groups=1, alone=(), **options):
    usage, saliency = torch.tensor([1.0, 2, 9, 8, 7, 6]), torch.tensor([9.0, 8, 1, 1, 1, 1])
    asked = Asked(SIMILARITY, count, usage, saliency, routing_groups, alone)
    options = MergeOptions(experts=count, cluster=cluster, **options)
    return [(g.members, g.dominant) for g in group_layers([asked], options, torch.Generator().manual_seed(0))[0]]


def test_dominants_are_those_that_stay():
    assert grouped(2, "absorb") == [([0, 2, 4], 0), ([1, 3, 5], 1)]
    assert grouped(2, "average") == [([0, 2, 4], 2), ([1, 3, 5], 3)]
    # Two routing groups of three, and expert 4 by itself: experts 3 and 5 share the second group's other place.
    assert grouped(4, "absorb", 2, [4]) == [([0, 2], 0), ([1], 1), ([3, 5], 3), ([4], 4)]
    with pytest.raises(RecipeError, match="2 experts are to stay by themselves, and only 2 groups are allowed"):
        grouped(4, "absorb", 2, [4, 5])
    with pytest.raises(RecipeError, match="1 experts are to stay by themselves, and the others' 1 groups of at most 4"):
        grouped(2, "absorb", 1, [4], max_group=4)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "zaya", "deepseek_v3"])
def test_similarities_against_loops(name):
    model = build(name)
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 3, 16, 1), input_batch(model, 2, 20, 2)]
    logits = {layer: [] for layer in view.moe_layers}
    handles = []
    for layer in view.moe_layers:

        def routed(_module, _arguments, output, layer=layer):
            tensors = output if isinstance(output, tuple) else (output,)
            scores = next(t for t in tensors if t.is_floating_point() and t.shape[-1] in (8, 9))  # 9: "no expert"
            logits[layer].append(scores.flatten(0, -2))

        handles.append(view.block(layer).router.register_forward_hook(routed))
    with torch.no_grad():
        calls = experts_calls(model, batches)
    for handle in handles:
        handle.remove()
    statistics = [CoActivation(), LogitSimilarity(), WeightSimilarity()]
    profile = measure(view, batches, statistics)
    for layer in view.moe_layers:
        counts = torch.zeros(8, 8, dtype=torch.float64)
        chosen = {}
        for token, expert, _ in joined(calls[layer]).choices():
            chosen.setdefault(token, set()).add(expert)
        for experts in chosen.values():
            for i in experts:
                for j in experts:
                    counts[i, j] += 1
        found = profile.of(layer, CoActivation())
        assert torch.equal(found["counts"], counts)
        score = torch.cat(logits[layer])[:, :8].double()
        flat = [w.double().flatten(1) for _, w in view.block(layer).experts.weights().matrices()]
        expected = {
            CoActivation(): counts,
            LogitSimilarity(): score.T @ score,
            WeightSimilarity(): sum(f @ f.T for f in flat),
        }
        for statistic, gram in expected.items():
            similarity = profile.of(layer, statistic)["similarity"]
            for i in range(8):
                for j in range(8):
                    size = float(gram[i, i] * gram[j, j]) ** 0.5
                    wanted = 1.0 if i == j else float(gram[i, j]) / size if size else 0.0
                    assert float(similarity[i, j]) == pytest.approx(wanted, abs=1e-5)


def test_a_vector_of_zeros_is_like_nothing():
    assert torch.equal(
        cosines(torch.tensor([[4.0, 0, 2], [0, 0, 0], [2, 0, 1]])), torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    )


def merge(**options):
    cls = find_pass("merge.average")
    return cls(cls.Options(**options), find_target("native"))


@pytest.mark.parametrize("max_group", [None, 2, 3])
@pytest.mark.parametrize("grouping", ["output", "router", "weights", "coactivation"])
@pytest.mark.parametrize("cluster", ["kmeans", "average", "complete", "ward", "dominant", "absorb", "ream"])
def test_every_grouping_makes_as_many_groups_as_asked_for(grouping, cluster, max_group):
    model = build("deepseek_v3")  # two routing groups, which stay equal
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 2, 24, 1)]
    step = merge(experts=4, grouping=grouping, cluster=cluster, refit="none", align="none", max_group=max_group)
    profile = measure(view, batches, step.statistics())
    plan = step.plan(profile)
    assert plan == step.plan(profile)
    for layer, decision in plan.layers.items():
        groups = decision["groups"]
        assert sorted(e for g in groups for e in g) == list(range(8))
        assert [{e // 4 for e in g} for g in groups] == [{0}, {0}, {1}, {1}]
        assert all(d in g for d, g in zip(decision["dominant"], groups, strict=True))
        assert max(map(len, groups)) <= (max_group or 8)
        if cluster in ("dominant", "absorb", "ream"):
            counts = profile.of(layer, Routing())["counts"]
            if cluster != "dominant":
                counts = profile.of(layer, OutputNorms())["gated_norm"] / counts.clamp_min(1)
            for first in (0, 4):
                kept = [d for d in decision["dominant"] if d // 4 == first // 4]
                assert min(counts[kept]) >= max(counts[e] for e in range(first, first + 4) if e not in kept)


def test_absorbing_leaves_the_others_as_they_are():
    """Seven of eight kept: one expert goes into one other, and without refitting the rest keeps its bytes."""
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 2, 24, 1)]
    step = merge(experts=7, refit="none")
    first = view.moe_layers[0]
    before = view.block(first).experts.weights().map(torch.clone)
    rows = view.block(first).router.weight.detach().clone()
    report, _ = carry_out(view, step, step.plan(measure(view, batches, step.statistics())), batches, only=first)[first]
    after = view.block(first).experts.weights()
    assert sorted(map(len, report["groups"])) == [1] * 6 + [2]
    for slot, members in enumerate(report["groups"]):
        dominant = next(e for e in members if report["experts"][e]["dominant"])
        assert torch.equal(view.block(first).router.weight[slot], rows[dominant])
        if len(members) == 1:
            both = zip(after.items(), before.items(), strict=True)
            assert all(torch.equal(new[slot], old[members[0]]) for (_, new), (_, old) in both)


def test_presets():
    for name, values in PRESETS.items():
        options = MergeOptions(keep=0.5, preset=name)
        assert {k: getattr(options, k) for k in values} == values
        assert set(values) <= set(MergeOptions.model_fields)
        assert MergeOptions(**options.model_dump()) == options
        assert SubspaceOptions(keep=0.5, preset=name, rank=0.5).cluster == values["cluster"]
    assert MergeOptions(keep=0.5, preset="sub-moe", cluster="ward").cluster == "ward"
    assert set(find_pass("merge.average").choices()["preset"]) == set(PRESETS)
    with pytest.raises(ValidationError, match="hc-smoe"):
        MergeOptions(keep=0.5, preset="hc_smoe")
    plain = merge(keep=0.5, preset="hc-smoe", protect_super_experts=False)
    assert plain.statistics() == [OutputSimilarity(), Routing()]
    assert OutputNorms() in merge(keep=0.5, preset="ream", protect_super_experts=False).statistics()
