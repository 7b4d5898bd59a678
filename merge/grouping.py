"""Which experts of a layer become one: similarity, number, routing groups, and who must stay alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.calib.similarity import CoActivation, LogitSimilarity, WeightSimilarity
from moe_compress.calib.statistics import OutputSimilarity, Statistic
from moe_compress.errors import RecipeError

from .cluster import grabbed, hierarchical, joined, kmeans
from .options import MergeOptions

# Most experts that one absorbs by `cluster: ream` (its default group size).
REAM_SIZE = 16


@dataclass(frozen=True)
class Group:
    """Experts that become one.

    Attributes:
        members: ascending.
        dominant: the member whose neuron order counts, and whose router row may.
    """

    members: list[int]
    dominant: int


def similarity_statistic(options: MergeOptions) -> Statistic:
    """What measures how alike experts are; its result's `similarity` is [E, E], cosines."""
    if options.grouping == "router":
        return LogitSimilarity()
    if options.grouping == "weights":
        return WeightSimilarity()
    return CoActivation() if options.grouping == "coactivation" else OutputSimilarity(sample=options.sample)


def group_experts(
    similarity_EE: Tensor,
    count: int,
    options: MergeOptions,
    usage_E: Tensor,
    saliency_E: Tensor,
    routing_groups: int,
    alone: Sequence[int],
    generator: torch.Generator,
) -> list[Group]:
    """`count` groups of a layer's experts, ordered by their dominant members.

    Args:
        similarity_EE: cosines between experts.
        count: number of groups.
        options: `cluster` says how.
        usage_E: weights of members: the weightiest of a cluster is its dominant member.
        saliency_E: who stays where some absorb the others; the highest first.
        routing_groups: experts are merged inside these consecutive runs only, and as many in each.
        alone: experts that are groups of one.
        generator: for k-means.

    Raises:
        RecipeError: more experts are to stay alone than leave a group for the others.
    """
    experts = len(similarity_EE)
    size = experts // routing_groups
    groups: list[Group] = []
    for first in range(0, experts, size):
        single = [e for e in range(first, first + size) if e in alone]
        rest = [e for e in range(first, first + size) if e not in alone]
        allowed = count // routing_groups
        if len(single) >= allowed:
            raise RecipeError(f"{len(single)} experts are to stay by themselves, and only {allowed} groups are allowed")
        inside = similarity_EE[rest][:, rest]
        found = _clustered(inside, allowed - len(single), options, usage_E[rest], saliency_E[rest], generator)
        groups += [Group([e], e) for e in single]
        groups += [Group([rest[i] for i in g.members], rest[g.dominant]) for g in found]
    return sorted(groups, key=lambda g: g.dominant)


def _clustered(
    similarity: Tensor, count: int, options: MergeOptions, usage: Tensor, saliency: Tensor, generator: torch.Generator
) -> list[Group]:
    if options.cluster in ("dominant", "absorb", "ream"):
        kept = saliency.argsort(descending=True, stable=True)[:count].tolist()
        taken = grabbed(similarity, kept, REAM_SIZE) if options.cluster == "ream" else joined(similarity, kept)
        return [Group(members, keeper) for keeper, members in taken.items()]
    if options.cluster == "kmeans":
        clusters = kmeans(similarity, count, generator)
    else:
        clusters = hierarchical(similarity, count, options.cluster)
    return [Group(c, max(c, key=lambda e: (float(usage[e]), -e))) for c in clusters]
