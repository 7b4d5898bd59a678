"""Groups of bounded size, against brute force and plain procedures; k-means of many layers against a plain loop."""

import itertools

import pytest
import torch
from grouped import randn, spread
from reference import build

from moe_compress.calib.collect import MemoryStore, Profile
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.merge.bounded import assigned, bounded_linkage
from moe_compress.merge.cluster import hierarchical, joined
from moe_compress.merge.kmeans import kmeans, kmeans_layers
from moe_compress.merge.options import MergeOptions
from moe_compress.model import MoEModel
from moe_compress.model.shape import LayerShape, ModelShape, model_shape
from moe_compress.passes import find_pass


def labels(experts, rooms, filled):
    """All assignments within the bounds."""
    for label in itertools.product(range(len(rooms)), repeat=experts):
        sizes = [label.count(c) for c in range(len(rooms))]
        if all(s <= r for s, r in zip(sizes, rooms, strict=True)) and (not filled or min(sizes) > 0):
            yield label


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("rooms", [[2, 2, 2], [1, 4, 1], [5, 1, 3], [2, 9, 1]])
def test_assignment_is_the_best_of_all(rooms, filled):
    for seed in range(6):
        cost = randn(5, 3, seed=seed) * 10.0 ** (seed - 2)
        cost[:, 1] -= seed  # one that all would like
        found = assigned(cost, rooms, filled)
        assert tuple(found) in set(labels(5, rooms, filled))
        best = min(sum(float(cost[e, c]) for e, c in enumerate(label)) for label in labels(5, rooms, filled))
        assert sum(float(cost[e, c]) for e, c in enumerate(found)) == pytest.approx(best, abs=1e-9)


def test_what_cannot_be_assigned():
    with pytest.raises(ValueError, match="5 experts don't fit into 2 groups with room for"):
        assigned(torch.zeros(5, 2), [2, 2])
    with pytest.raises(ValueError, match="don't fit"):
        assigned(torch.zeros(1, 2), [2, 2], filled=True)
    for form in (lambda s: kmeans(s, 2, torch.Generator(), most=2), lambda s: bounded_linkage(s, 2, "average", 2)):
        with pytest.raises(ValueError, match="5 experts can't form 2 groups of at most 2"):
            form(torch.eye(5))


@pytest.mark.parametrize(("clusters", "most"), [(3, 2), (3, 3), (2, 4), (4, 2), (6, 1)])
def test_bounded_kmeans_against_all_partitions(clusters, most):
    for seed in range(3):
        vectors = randn(6, 3, seed=seed) + 3  # one crowd: without a bound groups are unequal
        partitions = {
            tuple(tuple(e for e in range(6) if label[e] == c) for c in range(clusters))
            for label in labels(6, [most] * clusters, True)
        }
        best = min(spread(vectors, [list(g) for g in p]) for p in partitions)
        groups = kmeans(vectors @ vectors.T, clusters, torch.Generator().manual_seed(seed), restarts=96, most=most)
        assert sorted(e for g in groups for e in g) == list(range(6))
        assert len(groups) == clusters
        assert max(map(len, groups)) <= most
        assert spread(vectors, groups) == pytest.approx(best, abs=1e-9)


def plain_kmeans(vectors, draw_RC, most):
    """k-means++ and Lloyd on the vectors themselves, start by start; draws say who is a seed."""
    results = []
    for draws in draw_RC.tolist():
        seeds = []
        for draw in draws:
            weight = [1.0 if not seeds else min(float((v - vectors[s]).square().sum()) for s in seeds) for v in vectors]
            weight = [0.0 if e in seeds else w for e, w in enumerate(weight)]
            sums = list(itertools.accumulate(weight))
            seeds.append(next(e for e, s in enumerate(sums) if s > draw * sums[-1]))
        means, label = vectors[seeds], None
        while True:
            distance = torch.cdist(vectors, means).square()
            if label is None:
                new = (
                    distance.argmin(1) if most is None else torch.tensor(assigned(distance, [most] * len(means), True))
                )
                for c, e in enumerate(seeds) if most is None else ():
                    new[e] = c
            elif most is None:
                new = distance.argmin(1)
                for c in range(len(means)):
                    own = (label == c).nonzero().flatten()
                    new[own[distance[own, c].argmin()]] = c
            else:
                new = torch.tensor(assigned(distance, [most] * len(means), True))
            if label is not None and torch.equal(new, label):
                break
            label = new
            means = torch.stack([vectors[label == c].mean(0) for c in range(len(means))])
        groups = [(label == c).nonzero().flatten().tolist() for c in range(len(means))]
        results.append((spread(vectors, groups), sorted(groups)))
    return min(results, key=lambda r: round(r[0], 9))[1]


@pytest.mark.parametrize("most", [None, 4])
def test_layers_at_once_are_a_plain_loop(most):
    vectors = randn(5, 14, 4)
    generator = torch.Generator().manual_seed(3)
    together = kmeans_layers(vectors @ vectors.mT, 5, generator, most=most)
    generator.manual_seed(3)
    draws = torch.rand(5, 8, 5, generator=generator).double()
    assert together == [plain_kmeans(v, d, most) for v, d in zip(vectors, draws, strict=True)]
    generator.manual_seed(3)  # one after the other, they draw the same
    assert together == [kmeans(v @ v.T, 5, generator, most=most) for v in vectors]


def test_layers_in_chunks_are_layers_at_once(monkeypatch):
    vectors = randn(5, 14, 4)
    whole = kmeans_layers(vectors @ vectors.mT, 5, torch.Generator().manual_seed(3))
    monkeypatch.setattr("moe_compress.merge.kmeans._AT_ONCE", 8 * 8 * 14 * 14 * 2)
    assert kmeans_layers(vectors @ vectors.mT, 5, torch.Generator().manual_seed(3)) == whole


def linkage(vectors, clusters, method, most):
    """Join the two nearest groups that may be joined, again and again; None where there are none."""
    groups, pairs = [[e] for e in range(len(vectors))], torch.cdist(vectors, vectors)

    def distance(a, b):
        if method == "ward":
            gap = (vectors[a].mean(0) - vectors[b].mean(0)).square().sum()
            return float(gap) * len(a) * len(b) / (len(a) + len(b))
        return float(pairs[a][:, b].mean() if method == "average" else pairs[a][:, b].max())

    while len(groups) > clusters:
        allowed = [(a, b) for a, b in itertools.combinations(groups, 2) if len(a) + len(b) <= most]
        if not allowed:
            return None
        a, b = min(allowed, key=lambda p: distance(*p))
        groups = [g for g in groups if g not in (a, b)] + [a + b]
    return sorted(sorted(g) for g in groups)


@pytest.mark.parametrize("method", ["average", "complete", "ward"])
def test_linkage_skips_what_would_be_too_large(method):
    free, bounded, stuck = 0, 0, 0
    for seed in range(12):
        vectors = randn(12, 3, seed=seed)
        similarity = vectors @ vectors.T
        for clusters, most in ((3, 12), (3, 6), (4, 4), (5, 3), (4, 3), (12, 1)):
            groups, broken = bounded_linkage(similarity, clusters, method, most)
            assert sorted(e for g in groups for e in g) == list(range(12))
            assert len(groups) == clusters
            assert max(map(len, groups)) <= most
            expected = linkage(vectors, clusters, method, most)
            assert bool(broken) == (expected is None)
            if expected is not None:
                assert groups == expected
            free += groups == hierarchical(similarity, clusters, method)
            bounded += expected is not None and groups != hierarchical(similarity, clusters, method)
            stuck += expected is None
    assert free >= 24
    assert bounded >= 5
    assert stuck >= 2


def test_linkage_that_is_stuck():
    """Three pairs, of which none may be joined: the first is broken up, its members go where they are nearest."""
    vectors = torch.tensor([[0.0, 0], [0.1, 1], [9, -1], [9.3, -1], [9, 2], [9.6, 2]], dtype=torch.float64)
    groups, broken = bounded_linkage(vectors @ vectors.T, 2, "average", 3)
    assert (groups, broken) == ([[0, 2, 3], [1, 4, 5]], [0, 1])
    vectors[:2] = torch.tensor([[9, -2], [9, -3]])  # both nearer to one group, which has room for one of them
    groups, broken = bounded_linkage(vectors @ vectors.T, 2, "average", 4)
    assert (groups, broken) == ([[0, 1, 2, 3], [4, 5]], [])
    groups, broken = bounded_linkage(vectors @ vectors.T, 2, "average", 3)
    options = [[[0, 2, 3], [1, 4, 5]], [[1, 2, 3], [0, 4, 5]]]
    far = torch.cdist(vectors, vectors)
    lost = [float(far[a[0], [2, 3]].mean() + far[b[0], [4, 5]].mean()) for a, b in options]
    assert broken == [0, 1]
    assert groups == sorted(options[lost.index(min(lost))])


def test_joining_within_a_bound_is_the_best_of_all():
    for seed in range(5):
        similarity = randn(8, 8, seed=seed)
        similarity = (similarity + similarity.T) / 2
        similarity[:, 3] += 2  # one that all would like
        kept, rest = [5, 3, 0], [1, 2, 4, 6, 7]
        found = joined(similarity, kept, 3)
        assert all(k in g and len(g) <= 3 for k, g in found.items())
        sums = [
            sum(float(similarity[e, kept[c]]) for e, c in zip(rest, label, strict=True))
            for label in labels(5, [2, 2, 2], False)
        ]
        reached = sum(float(similarity[e, k]) for k, g in found.items() for e in g if e != k)
        assert reached == pytest.approx(max(sums), abs=1e-9)
        assert joined(similarity, kept, 8) == joined(similarity, kept)


def merge(**options):
    cls = find_pass("merge.average")
    return cls(cls.Options(**options), find_target("native"))


def test_bounds_that_cannot_be_met_are_found_before_any_work():
    shape = model_shape(MoEModel.wrap(build("qwen3_moe")))
    assert merge(experts=4, max_group=2).forecast(shape).layers
    with pytest.raises(
        RecipeError, match=r"layer \d: 3 groups of at most 2 don't hold 8 experts: `max_group` must be 3"
    ):
        merge(experts=3, max_group=2).forecast(shape)
    assert MergeOptions(keep=0.5).bound == 17  # REAM's
    assert MergeOptions(keep=0.5, max_group=40).bound == 40
    assert MergeOptions(keep=0.5, cluster="dominant").bound is None


def test_what_was_broken_up_is_said():
    """Layer 1's experts are three pairs that no bound of 3 lets join; layer 0's would be two threes."""
    step, store = merge(experts=2, cluster="average", max_group=3, protect_super_experts=False), MemoryStore()
    shape = LayerShape(6, 2, None, 8, 4, 3, 0, 2, 0).with_experts(6)
    for layer, sizes in enumerate(([3, 3], [2, 2, 2])):
        which = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        similarity = 0.5 * (which == which.unsqueeze(1)) + 0.5 * torch.eye(6)
        store.put(layer, OutputSimilarity().key, {"similarity": similarity, "tokens": torch.tensor(9)})
        store.put(layer, Routing().key, {"counts": torch.ones(6), "gate": torch.ones(6)})
        store.put(layer, OutputNorms().key, {"gated_norm_squared": torch.ones(6)})
    plan = step.plan(Profile(ModelShape({0: shape, 1: shape}, 0), store, 2))
    assert plan.layers[0]["groups"] == [[0, 1, 2], [3, 4, 5]]
    assert sorted(map(len, plan.layers[1]["groups"])) == [3, 3]
    assert plan.notes == [
        "layer 1: no two groups could be joined within max_group: 3; those of experts [0, 1] were broken up, and these "
        "placed where room was left"
    ]
