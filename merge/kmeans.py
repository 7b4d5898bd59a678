"""k-means on inner products alone, of many layers and starts at once, groups bounded or not.

Mean cosine between outputs, S_ij = mean_t cos(f_i(x_t), f_j(x_t)), is the inner product of the experts' normalised
outputs over all tokens, put end to end. So k-means with k-means++ on those outputs (Sub-MoE, arXiv 2506.23266, section
3.1) needs nothing but S: ‖u_i − mean(c)‖² = S_ii − 2·mean_j S_ij + mean_jk S_jk over members j, k of c.

Letters: B layers, R starts of each, S starts of all, E experts, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bounded import assigned

_ITERATIONS = 100
_AT_ONCE = 1 << 28  # bytes of one [S, E, max(E, C)] in float64


def kmeans(
    similarity_EE: Tensor, clusters: int, generator: torch.Generator, restarts: int = 8, most: int | None = None
) -> list[list[int]]:
    """`kmeans_layers` of one layer."""
    return kmeans_layers(similarity_EE.unsqueeze(0), clusters, generator, restarts, most)[0]


def kmeans_layers(
    similarity_BEE: Tensor, clusters: int, generator: torch.Generator, restarts: int = 8, most: int | None = None
) -> list[list[list[int]]]:
    """Partition every layer's experts into non-empty groups with the least sum of squared distances to their means.

    What a layer gets doesn't depend on the others but through what they have drawn from the generator before it.

    Args:
        similarity_BEE: each symmetric, positive semidefinite (inner products).
        clusters: number of groups, 1 … E.
        generator: for the k-means++ starts.
        restarts: starts; the best result is returned.
        most: members that a group has at the most; the assignment to means is then the best one within that bound.

    Returns:
        Of every layer its groups, members ascending, ordered by their first member.

    Raises:
        ValueError: so many groups can't be formed, or not within the bound.
    """
    layers, experts = similarity_BEE.shape[:2]
    if not 1 <= clusters <= experts:
        raise ValueError(f"{experts} experts can't form {clusters} groups")
    if most is not None and most * clusters < experts:
        raise ValueError(f"{experts} experts can't form {clusters} groups of at most {most}")
    draw_BRC = torch.rand(layers, restarts, clusters, generator=generator).double()
    found: list[list[list[int]]] = []
    size = max(1, _AT_ONCE // (8 * restarts * experts * max(experts, clusters)))
    for similarity, draw in zip(similarity_BEE.split(size), draw_BRC.split(size), strict=True):
        label_SE, cost_S = _lloyd(similarity.double(), draw.flatten(0, 1).to(similarity.device), most)
        cost_BR = cost_S.view(-1, restarts)
        first_B = (cost_BR <= cost_BR.min(1, keepdim=True).values + 1e-12).int().argmax(1)
        best_BE = label_SE.view(-1, restarts, experts)[torch.arange(len(first_B)), first_B]
        found += [_groups(label_E, clusters) for label_E in best_BE.cpu()]
    return found


def _groups(label_E: Tensor, clusters: int) -> list[list[int]]:
    return sorted((label_E == c).nonzero().flatten().tolist() for c in range(clusters))


def _lloyd(similarity_BEE: Tensor, draw_SC: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Alternate means and nearest means, of every start until nothing moves: labels [S, E], costs [S]."""
    clusters = draw_SC.shape[1]
    layer_S = torch.arange(len(similarity_BEE), device=draw_SC.device).repeat_interleave(
        len(draw_SC) // len(similarity_BEE)
    )
    label_SE = _plus_plus(similarity_BEE, layer_S, draw_SC, most)
    moving = torch.arange(len(label_SE), device=draw_SC.device)
    for _ in range(_ITERATIONS):
        own = label_SE[moving]
        member_SEC, distance_SEC = _distances(similarity_BEE[layer_S[moving]], own, clusters)
        moved = _moved(member_SEC, distance_SEC, own, most)
        label_SE[moving] = moved
        moving = moving[(moved != own).any(1)]
        if not len(moving):
            break
    member_SEC = torch.nn.functional.one_hot(label_SE, clusters).double()
    within = (member_SEC * (similarity_BEE[layer_S] @ member_SEC)).sum(1) / member_SEC.sum(1)
    return label_SE, similarity_BEE.diagonal(dim1=1, dim2=2).sum(1)[layer_S] - within.sum(1)


def _distances(similarity_SEE: Tensor, label_SE: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Who is a member of what, and squared distances to means; [S, E, C] each."""
    member_SEC = torch.nn.functional.one_hot(label_SE, clusters).double()
    share_SEC = member_SEC / member_SEC.sum(1, keepdim=True)
    cross_SEC = similarity_SEE @ share_SEC
    squared_SE = similarity_SEE.diagonal(dim1=1, dim2=2)
    return member_SEC, squared_SE.unsqueeze(2) + (share_SEC * cross_SEC).sum(1, keepdim=True) - 2 * cross_SEC


def _moved(member_SEC: Tensor, distance_SEC: Tensor, own_SE: Tensor, most: int | None) -> Tensor:
    """Everyone's nearest mean, or the best assignment within the bound; a group never loses its last member."""
    moved_SE = distance_SEC.argmin(2)
    if most is None:
        # The member nearest to a group's mean stays with it: no group runs empty.
        anchor_SC = torch.where(member_SEC > 0, distance_SEC, float("inf")).argmin(1)
        return moved_SE.scatter(1, anchor_SC, torch.arange(distance_SEC.shape[2]).to(anchor_SC).expand_as(anchor_SC))
    moved_SE = _within(distance_SEC, moved_SE, most)
    # Only where that is better: assignments as good as each other would change places for ever.
    cost_S, before_S = (distance_SEC.gather(2, at.unsqueeze(2)).sum((1, 2)) for at in (moved_SE, own_SE))
    return torch.where((cost_S < before_S - 1e-12).unsqueeze(1), moved_SE, own_SE)


def _within(distance_SEC: Tensor, nearest_SE: Tensor, most: int) -> Tensor:
    """The best assignment to means with 1 … `most` members each, of every start."""
    size_SC = torch.nn.functional.one_hot(nearest_SE, distance_SEC.shape[2]).sum(1)
    found_SE = nearest_SE.clone()
    for start in ((size_SC > most) | (size_SC == 0)).any(1).nonzero().flatten().tolist():
        rooms = [most] * distance_SEC.shape[2]
        found_SE[start] = torch.tensor(assigned(distance_SEC[start], rooms, filled=True)).to(found_SE)
    return found_SE


def _plus_plus(similarity_BEE: Tensor, layer_S: Tensor, draw_SC: Tensor, most: int | None) -> Tensor:
    """Labels from k-means++ seeds: the next with probability proportional to its squared distance to the nearest."""
    squared_SE = similarity_BEE.diagonal(dim1=1, dim2=2)[layer_S]
    start_S = torch.arange(len(layer_S), device=layer_S.device)
    taken_SE = torch.zeros_like(squared_SE, dtype=torch.bool)
    nearest_SE = torch.full_like(squared_SE, float("inf"))
    seeds: list[Tensor] = []
    for draw_S in draw_SC.T:
        weight_SE = torch.where(taken_SE, 0, nearest_SE) if seeds else torch.ones_like(nearest_SE)
        # Where all that is left coincides with a seed, any of it.
        weight_SE = torch.where(weight_SE.sum(1, keepdim=True) > 0, weight_SE, (~taken_SE).double())
        sum_SE = weight_SE.cumsum(1)
        seed_S = (sum_SE <= draw_S.unsqueeze(1) * sum_SE[:, -1:]).sum(1)
        taken_SE[start_S, seed_S] = True
        far_SE = squared_SE + squared_SE[start_S, seed_S].unsqueeze(1) - 2 * similarity_BEE[layer_S, seed_S]
        nearest_SE = torch.minimum(nearest_SE, far_SE.clamp_min(0))
        seeds.append(seed_S)
    at_SC = torch.stack(seeds, dim=1)
    reach_SEC = similarity_BEE[layer_S.unsqueeze(1), at_SC].transpose(1, 2)
    distance_SEC = squared_SE.gather(1, at_SC).unsqueeze(1) - 2 * reach_SEC
    # A seed is its own group's, also where it coincides with another.
    own_SC = torch.arange(draw_SC.shape[1], device=at_SC.device).expand_as(at_SC)
    label_SE = distance_SEC.argmin(2).scatter(1, at_SC, own_SC)
    return label_SE if most is None else _within(distance_SEC, label_SE, most)
