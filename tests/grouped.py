"""Random tensors, and groups by brute force, for the tests of merging."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def spread(vectors, groups):
    """Sum of squared distances to the means of the groups, from the vectors themselves."""
    return sum(float((vectors[g] - vectors[g].mean(0)).square().sum()) for g in groups)


def partitions(count, clusters):
    """All partitions of range(count) into non-empty groups: each next one goes into a group there is, or a new one."""
    found = [[]]
    for e in range(count):
        grown = [[[*g, e] if g is mine else g for g in p] for p in found for mine in p]
        found = grown + [[*p, [e]] for p in found if len(p) < clusters]
    return [p for p in found if len(p) == clusters]
