"""Settings of rules that skip: thresholds against what they promise, the program over layers against brute force."""

import itertools

import pytest
import torch

from moe_compress.model.rules import Ratio, TopP
from moe_compress.prune.skip import experts_left
from moe_compress.prune.thresholds import allocate_k, cut, median_threshold, ratio_threshold, share_threshold


def weights(tokens=500, slots=6, seed=0, scale=1.0, unserved=0.1):
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.rand(tokens, slots, generator=generator).sort(-1, descending=True).values
    gone = torch.rand(tokens, slots, generator=generator) < unserved
    weight = weight.masked_fill(gone, 0).sort(-1, descending=True).values
    return weight, 10 * torch.rand(tokens, generator=generator)


# Thresholds


@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_a_cut_has_as_many_beneath_as_asked(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(1))
    for below in range(-1, count + 2):
        assert int((values < cut(values, below)).sum()) == min(max(below, 0), count)


def test_a_cut_leaves_ties_together():
    """On the side that is nearer to what was asked; numbers next to each other are told apart."""
    values = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.5, 0.9])
    assert [int((values < cut(values, n)).sum()) for n in range(7)] == [0, 1, 1, 1, 5, 5, 6]
    one = torch.tensor([0.3])
    near = torch.cat([one, torch.nextafter(one, torch.ones(1))])
    assert int((near < cut(near, 1)).sum()) == 1


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("wanted", [1.0, 1.5, 2.0, 3.3, 5.0, 6.0])
def test_calibrated_thresholds_reach_the_average(wanted, scale):
    """To one choice of one token, on the routing that they were calibrated on; never more than there is."""
    weight, norm = weights(scale=scale)
    nobody = torch.zeros(len(weight), dtype=torch.bool)
    before = float((weight > 0).sum()) / len(weight)
    least = float((weight[:, 0] > 0).sum()) / len(weight)
    expected = min(max(wanted, least), before)
    for rule in (Ratio(ratio_threshold(weight, nobody, wanted)), TopP(share_threshold(weight, wanted))):
        assert experts_left(weight, norm, rule) == pytest.approx((before, expected), abs=1.01 / len(weight))


def test_protected_tokens_count():
    """Tokens of a large norm keep all, the others the fewer, the average stays."""
    weight, norm = weights(unserved=0)
    safe = norm >= 9.0
    rule = Ratio(ratio_threshold(weight, safe, 3.0), 9.0)
    assert experts_left(weight, norm, rule)[1] == pytest.approx(3.0, abs=1.01 / len(weight))
    assert experts_left(weight[safe], norm[safe], rule)[1] == 6.0
    assert experts_left(weight[~safe], norm[~safe], rule)[1] < 3.0


def test_attention_protects_beside_the_norm():
    """The same, by the product of both."""
    weight, norm = weights(unserved=0)
    received = torch.rand(len(weight), generator=torch.Generator().manual_seed(5))
    safe = norm * received >= 8.0
    assert 0 < int(safe.sum()) < int((norm >= 8.0).sum())
    rule = Ratio(ratio_threshold(weight, safe, 3.0), 8.0, True, "attention")
    assert experts_left(weight, norm, rule, received)[1] == pytest.approx(3.0, abs=1.01 / len(weight))
    assert experts_left(weight[safe], norm[safe], rule, received[safe])[1] == 6.0
    assert experts_left(weight[~safe], norm[~safe], rule, received[~safe])[1] < 3.0


def test_the_median_skips_half_of_second_experts():
    weight, norm = weights(tokens=501, slots=2, unserved=0)
    ratios = sorted((row[1] / row[0]) for row in weight.tolist())
    threshold = median_threshold(weight)
    assert threshold == pytest.approx(ratios[250])
    assert experts_left(weight, norm, Ratio(threshold))[1] == pytest.approx(1.5, abs=0.01)


# The program


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("wanted", "minimum"), [(1.0, 1), (1.8, 1), (2.5, 1), (2.5, 2), (4.0, 1)])
def test_the_allocation_is_the_best_there_is(wanted, minimum, seed):
    """Against every allocation of five layers of four experts, costs of any shape."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(5, 4, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-2, 3).unsqueeze(1)
    if seed % 2:
        cost = cost.sort(-1, descending=True).values
    found = allocate_k({3 * i: row.tolist() for i, row in enumerate(cost)}, wanted, minimum)

    def total(ks):
        return sum(float(cost[i, k - 1]) for i, k in enumerate(ks))

    admissible = [ks for ks in itertools.product(range(minimum, 5), repeat=5) if sum(ks) <= wanted * 5 + 1e-9]
    assert list(found) == [0, 3, 6, 9, 12]
    assert tuple(found.values()) in admissible
    assert total(found.values()) == pytest.approx(min(map(total, admissible)), rel=1e-9)
