"""Which experts belong together, from a Gram matrix alone, without the vectors that it is the Gram matrix of.

The distances of k-means (kmeans.py) serve hierarchical clustering too. Where some experts are to stay and take the
others in, similarity decides who joins whom. Groups may be bounded (bounded.py).

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from .bounded import assigned


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


def joined(similarity_EE: Tensor, kept: Sequence[int], most: int | None = None) -> dict[int, list[int]]:
    """Each other expert joins the kept one most like it: kept expert → its group, members ascending.

    With groups of at most `most` members they join so that the sum of their similarities is greatest within that.
    Raises ValueError where they don't fit. Source: M-SMoE (arXiv 2310.01334, section 3.1), whose kept experts are the
    most used.
    """
    groups = {k: [k] for k in kept}
    rest = [e for e in range(len(similarity_EE)) if e not in groups]
    alike = similarity_EE[rest][:, list(kept)]
    nearest = alike.argmax(dim=1).tolist() if most is None else assigned(-alike, [most - 1] * len(kept))
    for expert, at in zip(rest, nearest, strict=True):
        groups[kept[at]].append(expert)
    return {k: sorted(g) for k, g in groups.items()}


def grabbed(similarity_EE: Tensor, kept: Sequence[int], most: int) -> dict[int, list[int]]:
    """Kept experts in the order given take the others most like them, into groups of up to `most`, until none is left.

    Few experts change, all others stay what they are: REAM (arXiv 2604.04356, section 3). Result as of `joined`.
    Raises ValueError where they don't fit.
    """
    if len(kept) * most < len(similarity_EE):
        raise ValueError(f"{len(similarity_EE)} experts don't fit into {len(kept)} groups of at most {most}")
    groups = {k: [k] for k in kept}
    rest = [e for e in range(len(similarity_EE)) if e not in groups]
    for keeper in kept:
        like = sorted(rest, key=lambda e: (-float(similarity_EE[keeper, e]), e))[: most - 1]
        groups[keeper] += like
        rest = [e for e in rest if e not in like]
    return {k: sorted(g) for k, g in groups.items()}


def inertia(similarity_EE: Tensor, groups: list[list[int]]) -> float:
    """Sum of squared distances of all experts to the mean of their group."""
    total = float(similarity_EE.double().diagonal().sum())
    for members in groups:
        inside = similarity_EE.double()[members][:, members]
        total -= float(inside.sum()) / len(members)
    return total
