"""Which experts of a layer become one: similarity, number, routing groups, and who must stay alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_compress.calib.similarity import CoActivation, LogitSimilarity, WeightSimilarity
from moe_compress.calib.statistics import OutputSimilarity, Statistic
from moe_compress.errors import RecipeError

from .bounded import bounded_linkage
from .cluster import grabbed, hierarchical, joined
from .kmeans import kmeans_layers
from .options import MergeOptions


@dataclass(frozen=True)
class Group:
    """Experts that become one.

    Attributes:
        members: ascending.
        dominant: the member whose neuron order counts, and whose router row may.
        placed: members that came from a group which was broken up, as its like were full (see `bounded_linkage`).
    """

    members: list[int]
    dominant: int
    placed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """A layer to be grouped.

    Attributes:
        similarity_EE: cosines between experts.
        count: number of groups.
        usage_E: weights of members: the weightiest of a cluster is its dominant member.
        saliency_E: who stays where some absorb the others; the highest first.
        routing_groups: experts are merged inside these consecutive runs only, and as many in each.
        alone: experts that are groups of one.
    """

    similarity_EE: Tensor
    count: int
    usage_E: Tensor
    saliency_E: Tensor
    routing_groups: int = 1
    alone: Sequence[int] = ()


@dataclass(frozen=True)
class _Run:
    """The experts of one routing group that are to form so many groups, of the layer of that number."""

    number: int
    experts: list[int]
    count: int


def similarity_statistic(options: MergeOptions) -> Statistic:
    """What measures how alike experts are; its result's `similarity` is [E, E], cosines."""
    if options.grouping == "router":
        return LogitSimilarity()
    if options.grouping == "weights":
        return WeightSimilarity()
    return CoActivation() if options.grouping == "coactivation" else OutputSimilarity(sample=options.sample)


def group_layers(asked: Sequence[Asked], options: MergeOptions, generator: torch.Generator) -> list[list[Group]]:
    """Of every layer its groups, ordered by their dominant members.

    Args:
        asked: the layers.
        options: `cluster` says how, `bound` how large a group may be.
        generator: for k-means, which takes all runs of a size at once.

    Raises:
        RecipeError: more experts are to stay alone than leave a group for the others, or room for them.
    """
    groups: list[list[Group]] = [[] for _ in asked]
    runs: list[_Run] = []
    for number, layer in enumerate(asked):
        runs += _runs(number, layer, options.bound)
        groups[number] += [Group([e], e) for e in layer.alone]
    for run, found in zip(runs, _clustered(runs, asked, options, generator), strict=True):
        own = run.experts
        groups[run.number] += [
            Group([own[i] for i in g.members], own[g.dominant], [own[i] for i in g.placed]) for g in found
        ]
    return [sorted(found, key=lambda g: g.dominant) for found in groups]


def too_many(experts: int, count: int, bound: int | None) -> str:
    """Why so many groups can't hold the experts, or ""."""
    if bound is None or count * bound >= experts:
        return ""
    least = -(-experts // count)
    return f"{count} groups of at most {bound} don't hold {experts} experts: `max_group` must be {least} or more"


def _runs(number: int, layer: Asked, bound: int | None) -> list[_Run]:
    experts, allowed = len(layer.similarity_EE), layer.count // layer.routing_groups
    size, runs = experts // layer.routing_groups, []
    for first in range(0, experts, size):
        single = [e for e in range(first, first + size) if e in layer.alone]
        rest = [e for e in range(first, first + size) if e not in layer.alone]
        if len(single) >= allowed:
            raise RecipeError(f"{len(single)} experts are to stay by themselves, and only {allowed} groups are allowed")
        if problem := too_many(len(rest), allowed - len(single), bound):
            raise RecipeError(f"{len(single)} experts are to stay by themselves, and the others' {problem}")
        runs.append(_Run(number, rest, allowed - len(single)))
    return runs


def _clustered(
    runs: Sequence[_Run], asked: Sequence[Asked], options: MergeOptions, generator: torch.Generator
) -> list[list[Group]]:
    """Groups of every run, in the numbers of its experts."""
    inside = [asked[r.number].similarity_EE[r.experts][:, r.experts] for r in runs]
    if options.cluster in ("dominant", "absorb", "ream"):
        found = []
        for run, similarity in zip(runs, inside, strict=True):
            saliency = asked[run.number].saliency_E[run.experts]
            kept = saliency.argsort(descending=True, stable=True)[: run.count].tolist()
            if options.cluster == "ream":
                taken = grabbed(similarity, kept, options.bound or len(similarity))
            else:
                taken = joined(similarity, kept, options.bound)
            found.append([Group(members, keeper) for keeper, members in taken.items()])
        return found
    placed: list[list[int]] = [[] for _ in runs]
    clusters: list[list[list[int]]] = [[] for _ in runs]
    if options.cluster == "kmeans":
        for size, count in sorted({(len(r.experts), r.count) for r in runs}):
            same = [at for at, r in enumerate(runs) if (len(r.experts), r.count) == (size, count)]
            stacked = torch.stack([inside[at] for at in same])
            for at, own in zip(same, kmeans_layers(stacked, count, generator, most=options.bound), strict=True):
                clusters[at] = own
    else:
        for at, (run, similarity) in enumerate(zip(runs, inside, strict=True)):
            if options.bound is None:
                clusters[at] = hierarchical(similarity, run.count, options.cluster)
            else:
                clusters[at], placed[at] = bounded_linkage(similarity, run.count, options.cluster, options.bound)
    return [
        [_with_dominant(c, asked[run.number].usage_E[run.experts], own) for c in found]
        for run, found, own in zip(runs, clusters, placed, strict=True)
    ]


def _with_dominant(members: list[int], usage: Tensor, placed: Sequence[int]) -> Group:
    dominant = max(members, key=lambda e: (float(usage[e]), -e))
    return Group(members, dominant, [e for e in members if e in placed])
