"""Which experts belong together, from a Gram matrix alone, without the vectors that it is the Gram matrix of.

Mean cosine between outputs, S_ij = mean_t cos(f_i(x_t), f_j(x_t)), is the inner product of the experts' normalised
outputs over all tokens, put end to end. So k-means with k-means++ on those outputs (Sub-MoE, arXiv 2506.23266, section
3.1) needs nothing but S: ‖u_i − mean(c)‖² = S_ii − 2·mean_j S_ij + mean_jk S_jk over members j, k of c.
The same distances serve hierarchical clustering. Where some experts are to stay and take the others in, similarity
decides who joins whom.

Letters: E experts, C clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
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


def hierarchical(similarity_EE: Tensor, clusters: int, method: str) -> list[list[int]]:
    """Agglomerative clustering down to `clusters` groups, by distance (HC-SMoE, arXiv 2410.08589, section 3.2).

    Args:
        similarity_EE: symmetric, positive semidefinite (inner products).
        clusters: number of groups, 1 … E.
        method: scipy's name of the linkage: average, complete, ward.

    Returns:
        As `kmeans`: exactly `clusters` groups, also where distances tie.
    """
    similarity = similarity_EE.double().cpu()
    count = len(similarity)
    if not 1 <= clusters <= count:
        raise ValueError(f"{count} experts can't form {clusters} groups")
    if clusters == count:
        return [[e] for e in range(count)]
    squared = similarity.diagonal()
    distance = (squared.unsqueeze(0) + squared.unsqueeze(1) - 2 * similarity).clamp_min(0).sqrt()
    distance.fill_diagonal_(0)
    distance = (distance + distance.T) / 2
    return cut(linkage(squareform(distance.numpy(), checks=False), method), count, clusters)


def cut(steps: Any, count: int, clusters: int) -> list[list[int]]:
    """The first steps of an agglomeration (scipy's `linkage`), so many that `clusters` groups are left.

    Groups, members ascending, ordered by their first member.
    """
    groups = {e: [e] for e in range(count)}
    for number, (left, right) in enumerate(steps[: count - clusters, :2].astype(int)):
        groups[count + number] = groups.pop(left) + groups.pop(right)
    return sorted(sorted(g) for g in groups.values())


def joined(similarity_EE: Tensor, kept: Sequence[int]) -> dict[int, list[int]]:
    """Each other expert joins the kept one most like it: kept expert → its group, members ascending.

    Source: M-SMoE (arXiv 2310.01334, section 3.1), whose kept experts are the most used.
    """
    groups = {k: [k] for k in kept}
    rest = [e for e in range(len(similarity_EE)) if e not in groups]
    nearest = similarity_EE[rest][:, list(kept)].argmax(dim=1).tolist()
    for expert, at in zip(rest, nearest, strict=True):
        groups[kept[at]].append(expert)
    return {k: sorted(g) for k, g in groups.items()}


def grabbed(similarity_EE: Tensor, kept: Sequence[int], size: int) -> dict[int, list[int]]:
    """Kept experts in the order given take the others most like them, up to `size` each, until none is left.

    Few experts change, all others stay what they are: REAM (arXiv 2604.04356, section 3). Result as of `joined`; where
    all kept experts together can't take the rest, those that are left join the one most like them.
    """
    groups = {k: [k] for k in kept}
    rest = [e for e in range(len(similarity_EE)) if e not in groups]
    for keeper in kept:
        like = sorted(rest, key=lambda e: (-float(similarity_EE[keeper, e]), e))[:size]
        groups[keeper] += like
        rest = [e for e in rest if e not in like]
    for expert in rest:
        groups[max(kept, key=lambda k: float(similarity_EE[expert, k]))].append(expert)
    return {k: sorted(g) for k, g in groups.items()}


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
