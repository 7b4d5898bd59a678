"""Which experts are kept, given their scores: in a layer and over all layers, against brute force."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from test_prune import kept, layer_shape, profile_of, prune

from moe_compress.counts import chosen, kept_count
from moe_compress.errors import RecipeError
from moe_compress.model.shape import ModelShape
from moe_compress.prune.experts import PruneOptions

# How many and which: the same number in every layer


@pytest.mark.parametrize("groups", [None, (2, 1), (4, 2)])
@pytest.mark.parametrize("protected", [(), (3,), (0, 9)])
def test_uniform_choice_against_brute_force(groups, protected):
    """Of all admissible sets the one with the largest sum of scores."""
    number = groups[0] if groups else 1
    for seed in range(5):
        scores = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for count in range(2 * number, 13, number):
            found = chosen(scores, count, layer_shape(12, 2, groups), protected)
            admissible = [
                s
                for s in itertools.combinations(range(12), count)
                if set(protected) <= set(s)
                and len({sum(e // (12 // number) == g for e in s) for g in range(number)}) == 1
            ]
            assert found == list(max(admissible, key=lambda s: float(scores[list(s)].sum())))


def test_equal_scores_keep_the_first():
    assert chosen(torch.ones(8), 4, layer_shape(8), []) == [0, 1, 2, 3]
    assert chosen(torch.ones(8), 4, layer_shape(8, groups=(2, 1)), []) == [0, 1, 4, 5]


@pytest.mark.parametrize(("count", "groups"), [(2, None), (4, (2, 1))])
def test_protected_experts_are_kept_or_the_plan_is_refused(count, groups):
    try:
        found = chosen(torch.arange(8.0), count, layer_shape(8, 2, groups), [0, 1, 2])
    except RecipeError:
        return
    assert {0, 1, 2} <= set(found)


@pytest.mark.parametrize(
    ("options", "groups", "count"),
    [
        ({"keep": 0.5}, None, 8),
        ({"keep": 1.0}, None, 16),
        ({"keep": 0.7}, None, 11),
        ({"experts": 5}, None, 5),
        ({"keep": 0.7}, (4, 2), 12),
        ({"keep": 0.6}, (4, 2), 8),
        ({"experts": 12}, (4, 2), 12),
    ],
)
def test_kept_count(options, groups, count):
    layer = layer_shape(16, 2, groups)
    assert kept_count("prune.experts", 3, layer, PruneOptions(**options)) == count
    step = prune(**options)
    forecast = step.forecast(ModelShape({3: layer}, 100))
    assert forecast.layers[3].num_experts == count
    assert forecast.layers[3].bytes == count * layer.dense_bytes_per_expert
    assert forecast.other_bytes == 100


@pytest.mark.parametrize(
    ("options", "groups", "complaint"),
    [
        ({"experts": 17}, None, "prune.experts: layer 3 has 16 experts, 17 can't be kept"),
        ({"experts": 1}, None, "prune.experts: layer 3 routes each token to 2 experts, and 1 would be left"),
        ({"keep": 0.01}, None, "layer 3 routes each token to 2 experts, and 0 would be left"),
        ({"experts": 10}, (4, 2), "layer 3 routes in 4 groups of equal size, and 10 experts don't divide"),
        ({"experts": 4}, (4, 2), "scores each of its 4 routing groups by two experts"),
    ],
)
def test_counts_that_routing_can_not_do(options, groups, complaint):
    with pytest.raises(RecipeError, match=complaint):
        prune(**options).forecast(ModelShape({3: layer_shape(16, 2, groups)}, 0))


@pytest.mark.parametrize(
    "options", [{}, {"keep": 0.5, "experts": 4}, {"keep": 0}, {"keep": 1.1}, {"experts": 0}, {"keep": 0.5, "kept": 1}]
)
def test_options_that_are_refused(options):
    with pytest.raises(ValidationError):
        PruneOptions(**options)


# How many and which: over all layers


def best_global(scores, total, floors, step, top_k_groups=None, protected=()):
    """The largest sum of shares over all admissible numbers per layer, by trying them all."""
    shapes = {i: layer_shape(len(s), 2, top_k_groups) for i, s in scores.items()}
    shares = {i: torch.tensor(s, dtype=torch.float64) / sum(s) for i, s in scores.items()}

    def value(layer, count):
        number = top_k_groups[0] if top_k_groups else 1
        size, mine = len(scores[layer]) // number, [e for i, e in protected if i == layer]
        total = 0.0
        for g in range(number):
            inside = list(range(g * size, (g + 1) * size))
            fixed = [e for e in inside if e in mine]
            if len(fixed) > count // number:
                return -1e9
            rest = sorted((float(shares[layer][e]) for e in inside if e not in mine), reverse=True)
            total += sum(float(shares[layer][e]) for e in fixed) + sum(rest[: count // number - len(fixed)])
        return total

    counts = [range(floors, shapes[i].num_experts + 1, step) for i in scores]
    fitting = [c for c in itertools.product(*counts) if sum(c) == total]
    return max(sum(value(i, n) for i, n in zip(scores, c, strict=True)) for c in fitting)


def value_of(keep, scores):
    return sum(scores[i][e] / sum(scores[i]) for i, experts in keep.items() for e in experts)


def random_scores(layers, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    return {2 * i + 1: (torch.rand(experts, generator=generator) ** 3 * 10**i).tolist() for i in range(layers)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("keep", "minimum"), [(0.5, 2), (0.75, 3), (0.625, None), (1.0, 2)])
def test_global_choice_against_brute_force(seed, keep, minimum):
    scores = random_scores(4, 8, seed)
    plan = prune(criterion="ean", scope="global", keep=keep, minimum=minimum).plan(profile_of(scores))
    total = 4 * round(8 * keep)
    counts = [len(k) for k in kept(plan).values()]
    assert sum(counts) == total == plan.summary["kept"]
    assert min(counts) >= (minimum or 4)
    assert value_of(kept(plan), scores) == pytest.approx(best_global(scores, total, minimum or 4, 1))
    for layer, decision in plan.layers.items():
        assert sorted(decision["keep"] + decision["remove"]) == list(range(8))
        assert decision["keep"] == sorted(sorted(range(8), key=lambda e: -scores[layer][e])[: len(decision["keep"])])


def test_global_choice_in_groups():
    """Whole steps only: one expert of each routing group at a time."""
    for seed in range(8):
        scores = random_scores(4, 12, seed)
        plan = prune(criterion="ean", scope="global", keep=0.66, minimum=6).plan(profile_of(scores, groups=(3, 2)))
        assert sum(len(k) for k in kept(plan).values()) == 4 * 9
        for keep in kept(plan).values():
            assert len(keep) >= 6
            assert [sum(e // 4 == g for e in keep) for g in range(3)] == [len(keep) // 3] * 3


def test_global_choice_in_groups_against_brute_force():
    for seed in range(8):
        scores = random_scores(4, 12, seed)
        plan = prune(criterion="ean", scope="global", keep=0.66, minimum=6).plan(profile_of(scores, groups=(3, 2)))
        assert value_of(kept(plan), scores) == pytest.approx(best_global(scores, 36, 6, 3, (3, 2))), seed


PROTECTED = {2: 7}  # the least of its layer by any criterion


def profile_with_protected(seed):
    scores = {i: sorted(random_scores(1, 8, 10 * seed + i)[1], reverse=True) for i in range(5)}
    return scores, profile_of(scores, maxima={i: [1.0] * 7 + [1e4 if i in PROTECTED else 1.0] for i in scores})


def test_global_choice_keeps_protected_experts():
    for seed in range(8):
        _, profile = profile_with_protected(seed)
        plan = prune(criterion="ean", scope="global", keep=0.5, minimum=2).plan(profile)
        assert {i: d["protected"] for i, d in plan.layers.items() if d["protected"]} == {2: [7]}
        assert 7 in plan.layers[2]["keep"]
        assert sum(len(k) for k in kept(plan).values()) == 5 * 4
        assert plan.notes == ["layer 2: super experts [7] are protected"]


def test_global_choice_with_protected_experts_against_brute_force():
    for seed in range(8):
        scores, profile = profile_with_protected(seed)
        plan = prune(criterion="ean", scope="global", keep=0.5, minimum=2).plan(profile)
        best = best_global(scores, 20, 2, 1, None, tuple(PROTECTED.items()))
        assert value_of(kept(plan), scores) == pytest.approx(best), seed


def test_global_choice_keeps_protected_experts_of_one_group():
    """Twelve experts in three groups, of which one holds three super experts: the layer must keep three of each."""
    scores = {i: [1.0] * 12 for i in range(60)}
    scores[2] = [0.001, 0.002, 0.003, 9, 9, 9, 0.001, 0.001, 9, 9, 0.001, 0.001]  # six experts are enough
    maxima = {i: [1e4 if i == 2 and e < 3 else 1.0 for e in range(12)] for i in range(60)}
    profile = profile_of(scores, groups=(3, 2), maxima=maxima, decoder_layers=60)
    plan = prune(criterion="ean", scope="global", keep=0.75, minimum=6).plan(profile)
    assert plan.layers[2]["protected"] == [0, 1, 2]
    assert {0, 1, 2} <= set(plan.layers[2]["keep"])


def test_global_limits():
    scores = random_scores(3, 8, 0)
    with pytest.raises(RecipeError, match=r"12 experts are to be kept, but each layer keeps a minimum .* sum to 15"):
        prune(criterion="ean", scope="global", keep=0.5, minimum=5).plan(profile_of(scores))
    three = ModelShape({i: layer_shape(8) for i in range(3)}, 0)
    with pytest.raises(RecipeError, match="sum to 15"):  # known before anything is measured
        prune("native", scope="global", keep=0.5, minimum=5).forecast(three)
    plan = prune(criterion="ean", scope="global", keep=0.5).plan(profile_of(scores))  # default: twice the top-k
    assert [len(k) for k in kept(plan).values()] == [4, 4, 4]
    shape = ModelShape({0: layer_shape(8)}, 0)
    for target, refused in (("native", False), ("transformers", True), ("vllm", True)):
        step = prune(target, scope="global", keep=0.5)
        if refused:
            with pytest.raises(RecipeError, match=f"the target '{target}' can't load"):
                step.forecast(shape)
        else:
            assert step.forecast(shape).layers[0].num_experts == 4
