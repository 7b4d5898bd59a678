"""Which experts belong together: k-means on a Gram matrix, without the vectors that it is the Gram matrix of.

Mean cosine between outputs, S_ij = mean_t cos(f_i(x_t), f_j(x_t)), is the inner product of the experts' normalised
outputs over all tokens, put end to end. So k-means with k-means++ on those outputs (Sub-MoE, arXiv 2506.23266, section
3.1) needs nothing but S: ‖u_i − mean(c)‖² = S_ii − 2·mean_j S_ij + mean_jk S_jk over members j, k of c.

Letters: E experts, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 100


def kmeans(similarity_EE: Tensor, clusters: int, generator: torch.Generator, restarts: int = 8) -> list[list[int]]:
    """Partition experts into `clusters` non-empty groups with the least sum of squared distances to their means.

    Args:
        similarity_EE: symmetric, positive semidefinite (inner products).
        clusters: number of groups, 1 … E.
        generator: for the k-means++ starts.
        restarts: starts; the best result is returned.

    Returns:
        Groups, members ascending, ordered by their first member.
    """
    similarity = similarity_EE.double()
    if not 1 <= clusters <= len(similarity):
        raise ValueError(f"{len(similarity)} experts can't form {clusters} groups")
    best, best_cost = None, float("inf")
    for _ in range(restarts):
        label, cost = _lloyd(similarity, _plus_plus(similarity, clusters, generator), clusters)
        if cost < best_cost - 1e-12:
            best, best_cost = label, cost
    assert best is not None
    groups = [(best == c).nonzero().flatten().tolist() for c in range(clusters)]
    return sorted(groups)


def inertia(similarity_EE: Tensor, groups: list[list[int]]) -> float:
    """Sum of squared distances of all experts to the mean of their group."""
    total = float(similarity_EE.double().diagonal().sum())
    for members in groups:
        inside = similarity_EE.double()[members][:, members]
        total -= float(inside.sum()) / len(members)
    return total


def _plus_plus(similarity: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Labels from k-means++ seeds: the next with probability proportional to its squared distance to the nearest."""
    count = len(similarity)
    squared = similarity.diagonal()
    seeds = [int(torch.randint(count, (1,), generator=generator))]
    nearest = (squared + squared[seeds[0]] - 2 * similarity[seeds[0]]).clamp_min(0)
    while len(seeds) < clusters:
        weight = nearest.clone()
        weight[seeds] = 0
        if float(weight.sum()) <= 0:  # all that is left coincides with a seed
            weight = torch.ones_like(weight)
            weight[seeds] = 0
        seed = int(torch.multinomial(weight, 1, generator=generator))
        seeds.append(seed)
        nearest = torch.minimum(nearest, (squared + squared[seed] - 2 * similarity[seed]).clamp_min(0))
    at = torch.tensor(seeds)
    distance = squared[at].unsqueeze(0) - 2 * similarity[:, at]
    label = distance.argmin(dim=1)
    label[at] = torch.arange(clusters)
    return label


def _lloyd(similarity: Tensor, label: Tensor, clusters: int) -> tuple[Tensor, float]:
    """Alternate means and nearest means until nothing moves; a group never loses its last member."""
    for _ in range(_ITERATIONS):
        member_EC = torch.nn.functional.one_hot(label, clusters).double()
        share_EC = member_EC / member_EC.sum(dim=0)
        cross_EC = similarity @ share_EC
        distance_EC = (share_EC * cross_EC).sum(dim=0) - 2 * cross_EC
        moved = distance_EC.argmin(dim=1)
        # The member nearest to a group's mean stays with it: no group runs empty.
        anchor = torch.where(member_EC > 0, distance_EC, float("inf")).argmin(dim=0)
        moved[anchor] = torch.arange(clusters)
        if torch.equal(moved, label):
            break
        label = moved
    member_EC = torch.nn.functional.one_hot(label, clusters).double()
    within = (member_EC * (similarity @ member_EC)).sum(dim=0) / member_EC.sum(dim=0)
    return label, float(similarity.diagonal().sum() - within.sum())
