"""Groups that have at most so many members: the best assignment within bounds, and linkage that heeds one.

Letters: E experts, C groups to be joined, G groups there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assigned(cost_EC: Tensor, room_C: Sequence[int], filled: bool = False) -> list[int]:
    """A group for every expert, the sum of costs least, with at most `room_C` experts in the groups.

    Exact: an assignment to places, as many of each group as it has room (scipy's `linear_sum_assignment`).

    Args:
        cost_EC: finite.
        room_C: places of each group.
        filled: every group gets one expert at least; each must have room, and there must be as many experts.

    Raises:
        ValueError: there are fewer places than experts, or fewer experts than groups to be filled.
    """
    experts, groups = cost_EC.shape
    if sum(room_C) < experts or (filled and (groups > experts or min(room_C) < 1)):
        raise ValueError(f"{experts} experts don't fit into {groups} groups with room for {list(room_C)}")
    cost = cost_EC.double().cpu().numpy()
    place = np.repeat(np.arange(groups), np.minimum(room_C, experts))
    cost_EP = cost[:, place]
    if filled:
        # The first place of each group is worth more than all else can differ by.
        first = np.diff(place, prepend=-1) > 0
        cost_EP = cost_EP - first * (1.0 + experts * float(np.ptp(cost)))
    return place[linear_sum_assignment(cost_EP)[1]].tolist()  # type: ignore[no-any-return]


def bounded_linkage(similarity_EE: Tensor, clusters: int, method: str, most: int) -> tuple[list[list[int]], list[int]]:
    """Agglomerative clustering that skips merges which would make a group of more than `most`.

    While more than `clusters` groups are left and no two may be joined, the smallest of them (the first of those) is
    broken up: its members go where they are nearest to within what room there is, all of them together at the least
    sum of distances; then joining goes on. There is room: the others are at least `clusters`.

    Args:
        similarity_EE: symmetric, positive semidefinite (inner products).
        clusters: number of groups, with clusters · most at least E.
        method: linkage: average, complete, ward.
        most: members that a group may have.

    Returns:
        Groups, members ascending, ordered by their first member; and the experts that were in groups broken up.
    """
    similarity = similarity_EE.double().cpu()
    experts = len(similarity)
    if not 1 <= clusters <= experts or clusters * most < experts:
        raise ValueError(f"{experts} experts can't form {clusters} groups of at most {most}")
    groups = [[e] for e in range(experts)]
    apart_GG = torch.stack([_apart(similarity, g, groups, method) for g in groups])
    broken: set[int] = set()
    while len(groups) > clusters:
        size_G = torch.tensor([len(g) for g in groups])
        allowed_GG = (size_G + size_G.unsqueeze(1) <= most).triu(1)
        if bool(allowed_GG.any()):
            nearest = torch.where(allowed_GG, apart_GG, float("inf")).argmin()
            one, other = divmod(int(nearest), len(groups))
            groups[one] = groups[one] + groups.pop(other)
            changed = [one]
        else:
            other = int(size_G.argmin())
            loose = groups.pop(other)
            broken |= set(loose)
            cost_EC = torch.stack([_apart(similarity, [e], groups, method) for e in loose])
            target = assigned(cost_EC, [most - len(g) for g in groups])
            for expert, group in zip(loose, target, strict=True):
                groups[group] = [*groups[group], expert]
            changed = sorted(set(target))
        left = torch.arange(len(apart_GG)) != other
        apart_GG = apart_GG[left][:, left]
        for group in changed:
            apart_GG[group] = apart_GG[:, group] = _apart(similarity, groups[group], groups, method)
    return sorted(sorted(g) for g in groups), sorted(broken)


def _apart(similarity: Tensor, members: list[int], groups: list[list[int]], method: str) -> Tensor:
    """Distance of a group to each of the others, by linkage, [G]."""
    label = torch.empty(len(similarity), dtype=torch.int64).fill_(len(groups))
    for number, group in enumerate(groups):
        label[torch.tensor(group)] = number
    member_EG = torch.nn.functional.one_hot(label, len(groups) + 1)[:, :-1].double()
    size_G = member_EG.sum(0)
    squared = similarity.diagonal()
    if method == "ward":
        share_EG = member_EG / size_G
        own = similarity[members].mean(0)
        gap_G = own[members].mean() - 2 * own @ share_EG + (share_EG * (similarity @ share_EG)).sum(0)
        return (2 * gap_G.clamp_min(0) * size_G * len(members) / (size_G + len(members))).sqrt()
    distance = (squared[members].unsqueeze(1) + squared - 2 * similarity[members]).clamp_min(0).sqrt()
    if method == "average":
        return distance.mean(0) @ member_EG / size_G
    farthest = distance.max(0).values
    return torch.where(member_EG > 0, farthest.unsqueeze(1), 0).max(0).values
