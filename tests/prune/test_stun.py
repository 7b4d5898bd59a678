"""STUN's clustering against slow loops on the weights themselves, and for what it is for: duplicates."""

import itertools

import pytest
import torch
from families import input_batch
from reference import KINDS, build, measure
from test_criteria import asked, prune

from moe_compress.counts import chosen
from moe_compress.model import MoEModel
from moe_compress.prune import stun
from moe_compress.prune.criteria import CRITERIA


def slow_clusters(rows, groups, each, protected):
    """Complete linkage by its definition, from the rows: the closest two of all clusters, again and again."""
    size = len(rows) // groups
    found = [[e] for e in range(len(rows))]

    def apart(a, b):
        if a[0] // size != b[0] // size or sum(e in protected for e in a + b) > 1:
            return float("inf")
        if sum(c[0] // size == a[0] // size for c in found) <= each:
            return float("inf")
        return max(float((rows[i] - rows[j]).norm()) for i in a for j in b)

    while True:
        pairs = [(apart(a, b), a, b) for a, b in itertools.combinations(found, 2)]
        nearest = min(pairs, key=lambda pair: pair[0], default=(float("inf"), [], []))
        if nearest[0] == float("inf"):
            return sorted(sorted(c) for c in found)
        found = [c for c in found if c not in nearest[1:]] + [nearest[1] + nearest[2]]


def stand_for(found, weights, protected):
    """Of each cluster the protected member, else the one nearest to the mean of all."""
    kept = []
    for members in found:
        mean = sum(weights[e] for e in members) / len(members)
        off = {e: float((weights[e] - mean).norm()) for e in members}
        own = [e for e in members if e in protected]
        kept.append(own[0] if own else next(e for e in members if off[e] <= min(off.values()) * (1 + 1e-9)))
    return sorted(kept)


@pytest.mark.parametrize(("groups", "protected"), [(1, ()), (1, (2, 7)), (2, ()), (2, (1, 9)), (3, (0, 1))])
@pytest.mark.parametrize("each", [2, 3])
def test_clusters_and_choice(groups, protected, each):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(12, 5, generator=generator, dtype=torch.float64)
        weights = torch.randn(12, 30, generator=generator, dtype=torch.float64)
        expected = slow_clusters(rows, groups, each, protected)
        group = torch.arange(12) // (12 // groups)
        label = stun.clusters(torch.cdist(rows, rows), group, each, list(protected))
        assert sorted((label == c).nonzero().flatten().tolist() for c in set(label.tolist())) == expected
        limit = asked(12, each * groups, (groups, 1) if groups > 1 else None, protected)
        grams = {"router": rows @ rows.T, "experts": weights @ weights.T}
        scores = CRITERIA["stun"].score({"weight_grams": grams}, limit)
        kept = stand_for(expected, weights, protected)
        assert scores.nonzero().flatten().tolist() == kept
        assert chosen(scores, each * groups, limit.layer, protected) == kept


@pytest.mark.parametrize("name", [*KINDS, "deepseek_v4"])
def test_weight_grams(name):
    """Of what `keep` keeps for an expert: its router row, and its own weights."""
    view = MoEModel.wrap(build(name))
    profile = measure(view, [input_batch(view.module, 1, 6, 1)], [stun.WeightGrams()])
    for layer in view.moe_layers:
        found = profile.of(layer, stun.WeightGrams())
        experts = [view.block(layer).experts.expert(e) for e in range(8)]
        flat = torch.stack([torch.cat([v.flatten() for _, v in e.items()]) for e in experts]).double()
        torch.testing.assert_close(found["experts"], flat @ flat.T)
        assert torch.linalg.eigvalsh(found["router"])[0] > -1e-9
        assert (found["router"].diagonal() > 0).all()
        if hasattr(view.block(layer).router, "weight"):
            rows = view.block(layer).router.weight.detach()[:8].double()
            torch.testing.assert_close(found["router"], rows @ rows.T)


def test_of_duplicates_one_stays(monkeypatch):
    """Experts 1 and 6, 2 and 3 have nearly the same router rows: one of each goes, whatever the tokens."""
    monkeypatch.setattr(stun, "_CHUNK_BYTES", 1000)
    view = MoEModel.wrap(build("qwen3_moe"))
    for layer in view.moe_layers:
        weight = view.block(layer).router.weight.data
        weight[6], weight[3] = weight[1] + 1e-4, weight[2] - 1e-4
    step = prune(criterion="stun", experts=6, protect_super_experts=False)
    plan = step.plan(measure(view, [input_batch(view.module, 1, 6, 1)], step.statistics()))
    for decision in plan.layers.values():
        assert decision["remove"] == [3, 6]
        assert decision["scores"] == [1.0, 1, 1, 0, 1, 1, 0, 1]


def test_more_protected_than_clusters():
    """The clusters that can't be joined stay apart; the pass then refuses the number."""
    label = stun.clusters(torch.rand(6, 6), torch.zeros(6, dtype=torch.long), 2, [0, 1, 2])
    assert len(set(label.tolist())) == 3
