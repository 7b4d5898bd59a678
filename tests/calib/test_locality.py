"""SRP and SCH against their definitions, written as loops over segments, tokens and experts."""

import itertools

import pytest
import torch

from moe_compress.calib.locality import by_sequence, sch, segment_counts, srp

EXPERTS = 6


def random_sequences(seed, lengths=(17, 9, 3), top_k=2, sticky=0.6):
    """Choices that repeat the token's before with some probability; now and then a slot is empty."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        rows = [torch.randperm(EXPERTS, generator=generator)[:top_k]]
        for _ in range(length - 1):
            again = torch.rand((), generator=generator) < sticky
            rows.append(rows[-1] if again else torch.randperm(EXPERTS, generator=generator)[:top_k])
        index = torch.stack(rows).clone()
        index[torch.rand(index.shape, generator=generator) < 0.05] = -1
        found.append(index)
    return found


def best_f1(sequences, segment):
    """For every p: predicted experts against what the tokens of each segment chose, one by one."""
    best = (0.0, 0)
    for p in range(1, segment + 1):
        matches = predicted = actual = 0
        for sequence in sequences:
            for start in range(len(sequence) - segment + 1):
                tokens = [set(row.tolist()) - {-1} for row in sequence[start : start + segment]]
                for expert in range(EXPERTS):
                    times = sum(expert in chosen for chosen in tokens)
                    actual += times
                    if times >= p:
                        matches += times
                        predicted += segment
        f1 = 2 * matches / (predicted + actual) if predicted + actual else 0.0
        if f1 > best[0] + 1e-12:
            best = (f1, p)
    return best


@pytest.mark.parametrize("segment", [1, 2, 4, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_srp_is_the_best_f1_over_thresholds(seed, segment):
    sequences = random_sequences(seed)
    found = srp(segment_counts(sequences, EXPERTS, segment))
    expected, threshold = best_f1(sequences, segment)
    assert found["srp"] == pytest.approx(expected, abs=1e-12)
    assert found["threshold"] == threshold


def test_srp_of_constant_routing_is_1_and_of_alternating_routing_is_not():
    constant = [torch.tensor([[0, 1]] * 12)]
    alternating = [torch.tensor([[0, 1], [2, 3], [4, 5]] * 4)]
    assert srp(segment_counts(constant, EXPERTS, 3))["srp"] == 1
    # All six are predicted for every segment, and each is right once in three.
    assert srp(segment_counts(alternating, EXPERTS, 3))["srp"] == pytest.approx(2 * 6 / (18 + 6))
    assert not segment_counts(constant, EXPERTS, 13).any()


def simulated(sequence, capacity, horizon):
    """One sequence, its cache as a list."""
    cache, last, hits, requests = [], {}, 0, 0
    rows = [sorted(set(row.tolist()) - {-1}) for row in sequence]
    for token, wanted in enumerate(rows):
        requests += len(wanted)
        hits += sum(expert in cache for expert in wanted)
        last |= dict.fromkeys(wanted, token)
        ahead = list(itertools.chain(*rows[token + 1 : token + 1 + horizon]))
        there = sorted({*cache, *wanted}, key=lambda e: (-ahead.count(e), -last[e], e))
        cache = there[:capacity]
    return hits, requests


@pytest.mark.parametrize(("capacity", "horizon"), [(1, 4), (2, 4), (3, 2), (3, 0), (4, 50), (6, 4)])
def test_sch_equals_a_simulation(capacity, horizon):
    sequences = random_sequences(2)
    each = [simulated(sequence, capacity, horizon) for sequence in sequences]
    assert sch(sequences, EXPERTS, capacity, horizon) == (sum(h for h, _ in each), sum(r for _, r in each))


def test_looking_ahead_beats_the_least_recently_used():
    sequences = random_sequences(3, lengths=(200,))
    assert sch(sequences, EXPERTS, 3, 8)[0] > sch(sequences, EXPERTS, 3, 0)[0]
    assert sch([], EXPERTS, 3, 8) == (0, 0)


def test_sequences_come_apart_in_their_order():
    index = torch.arange(12, dtype=torch.int16).view(6, 2)
    parts = by_sequence(index, torch.tensor([1, 0, -1, 1, 0, 1], dtype=torch.int32))
    assert [part.tolist() for part in parts] == [[[2, 3], [8, 9]], [[0, 1], [6, 7], [10, 11]]]
