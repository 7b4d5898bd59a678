"""k-means on similarities: against all partitions, and against plain k-means on the vectors."""

import itertools
import json

import pytest
import torch
from grouped import generator, partitions, randn, spread

from moe_compress.merge.cluster import inertia
from moe_compress.merge.kmeans import kmeans


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
