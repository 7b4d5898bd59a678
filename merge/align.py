"""Neurons in the same order before experts are averaged.

An expert computes the same whatever the order of its neurons (rows of gate and up, columns of down, biases), so the
mean of two experts means something only where neuron i of one is neuron i of the other. Experts trained from scratch
share no order; each member of a group is therefore reordered like its dominant member first: M-SMoE (arXiv 2310.01334,
section 3.1) by weights, REAM (arXiv 2604.04356) by activations.

Letters: P pairs (reference expert, expert to reorder), I neurons, H hidden, S sample tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe_compress.calib.inputs import chunks
from moe_compress.model import FusedExperts
from moe_compress.model.dispatch import Dispatch
from moe_compress.model.experts import ExpertWeights

_CHUNK_BYTES = 512 << 20
_EXCHANGES = 200


def weight_similarity(reference: ExpertWeights, other: ExpertWeights) -> Tensor:
    """Inner products of neurons' weights, [P, I, I] float32: of gate and up rows, down columns and biases, added.

    The assignment that maximises their sum minimises the squared distance between the two experts' weights (M-SMoE,
    arXiv 2310.01334, section 3.1).

    Args:
        reference, other: experts of each pair, stacked.
    """
    total = torch.zeros(())
    for (name, left), (_, right) in zip(reference.items(), other.items(), strict=True):
        if name == "down_bias":  # belongs to no neuron
            continue
        if name == "down":
            left, right = left.transpose(1, 2), right.transpose(1, 2)
        if name.endswith("_bias"):
            left, right = left.unsqueeze(-1), right.unsqueeze(-1)
        total = total.to(left.device) + left.float() @ right.float().transpose(1, 2)
    return total


def activation_similarity(reference_PSI: Tensor, other_PSI: Tensor) -> Tensor:
    """Correlation of neurons' activations over the same tokens, [P, I, I] float32; 0 for one that never changes."""
    left, right = (standardized(a) for a in (reference_PSI, other_PSI))
    return left.transpose(1, 2) @ right


def exact_assignment(similarity_PII: Tensor) -> Tensor:
    """The permutations with the largest sum of similarities, [P, I] int64 (Jonker-Volgenant, O(I³) each, on the CPU).

    Entry i of a permutation is the neuron of the other expert that comes to place i. Raises ValueError for similarities
    that are not numbers.
    """
    found = [linear_sum_assignment(s.numpy(), maximize=True)[1] for s in similarity_PII.float().cpu()]
    order = torch.stack([torch.from_numpy(f) for f in found]) if found else torch.empty(0, similarity_PII.shape[-1])
    return order.to(similarity_PII.device, torch.int64)


def approximate_assignment(similarity_PII: Tensor) -> Tensor:
    """Permutations with nearly the largest sum of similarities, [P, I] int64, all pairs at once.

    First every two neurons that are each other's best among those left are matched, until none is left; then places
    are exchanged two by two while that adds to the sum, so that no exchange of two improves what is found. As
    benchmarks/neuron_assignment.py measures it: copies of 768 neurons under noise three times their size are matched
    exactly; of the best sum it misses 1.8 % where similarities are noise, 3.2 % for experts of the demo model. On one
    CPU core `exact_assignment` is as fast or faster: this one is for devices that do many pairs at once.
    """
    similarity = similarity_PII.float()
    return _exchanged(similarity, _mutual_best(similarity))


def permuted(weights: ExpertWeights, order_PI: Tensor) -> ExpertWeights:
    """The same experts with their neurons in another order: neuron order[p, i] comes to place i."""
    values: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == "down_bias":
            values[name] = tensor
        elif name == "down":
            values[name] = tensor.gather(2, order_PI.unsqueeze(1).expand(tensor.shape))
        elif name.endswith("_bias"):
            values[name] = tensor.gather(1, order_PI)
        else:
            values[name] = tensor.gather(1, order_PI.unsqueeze(-1).expand(tensor.shape))
    return ExpertWeights(**values)


def align_experts(
    experts: FusedExperts,
    pairs: Sequence[tuple[int, int]],
    hidden_SH: Tensor | None,
    approximate: bool = False,
) -> Tensor:
    """Reorder experts' neurons in place, each like those of another. What every expert computes stays the same.

    Returns the order of every expert's neurons, [E, I] int64: neuron order[e, i] has come to place i.

    Args:
        experts: a layer's.
        pairs: (reference, expert to reorder); no expert is reordered twice or is also a reference.
        hidden_SH: tokens on which activations are compared; None: weights are.
        approximate: match by `approximate_assignment` instead of `exact_assignment`.
    """
    assign = approximate_assignment if approximate else exact_assignment
    weights = experts.weights()
    neurons, hidden = weights.up.shape[1:]
    samples = 0 if hidden_SH is None else len(hidden_SH)
    size = 4 * (6 * neurons * hidden + 3 * neurons**2 + samples * (2 * hidden + 6 * neurons))
    order_EI = torch.arange(neurons).repeat(experts.num_experts, 1)
    for chunk in chunks([size] * len(pairs), _CHUNK_BYTES):
        part = torch.tensor(pairs[chunk.start : chunk.stop])
        reference, other = (weights.map(lambda w, e=e: w[e.to(w.device)]) for e in part.T)  # type: ignore[misc]
        if hidden_SH is None:
            similarity = weight_similarity(reference, other)
        else:
            similarity = activation_similarity(*(activations_on(experts, w, hidden_SH) for w in (reference, other)))
        order_PI = assign(similarity)
        order_EI[part[:, 1]] = order_PI.cpu()
        moved = permuted(other, order_PI.to(other.up.device))
        for (_, target), (_, value) in zip(weights.items(), moved.items(), strict=True):
            target[part[:, 1].to(target.device)] = value
    return order_EI


def activations_on(experts: FusedExperts, weights: ExpertWeights, hidden_SH: Tensor) -> Tensor:
    """Neuron activations of every given expert on every token, [P, S, I]."""
    count, tokens = weights.up.shape[0], len(hidden_SH)
    index = torch.arange(count, device=hidden_SH.device).expand(tokens, count)
    dispatch = Dispatch.of(index, torch.ones_like(index), count)
    activation, _ = experts.with_weights(weights, hidden_SH[dispatch.token_R], dispatch)
    return activation.view(count, tokens, -1)


def standardized(activation_PSI: Tensor) -> Tensor:
    """Every neuron's activations around their mean, of length one over the tokens, float32; 0 if it never changes."""
    values = activation_PSI.float()
    return torch.nn.functional.normalize(values - values.mean(dim=1, keepdim=True), dim=1)


def _mutual_best(similarity: Tensor) -> Tensor:
    """Match pairs that are each other's best among those left, again and again: [P, I]."""
    left = similarity.clone()
    pairs, count, _ = left.shape
    order = torch.full((pairs, count), -1, device=left.device)
    rows = torch.arange(count, device=left.device).expand(pairs, -1)
    while bool((order < 0).any()):
        best = left.argmax(dim=2)
        best_of = left.argmax(dim=1)
        # Never without a match: of the largest entries that are left, the first of the first column is one.
        matched = (best_of.gather(1, best) == rows) & (order < 0)
        order = torch.where(matched, best, order)
        pair, row = matched.nonzero(as_tuple=True)
        left[pair, row] = -torch.inf
        left[pair, :, best[pair, row]] = -torch.inf
    return order


def _exchanged(similarity: Tensor, order: Tensor) -> Tensor:
    """Exchange columns of two rows where both would choose that exchange, until none adds to the sum."""
    rows = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    for _ in range(_EXCHANGES):
        taken = similarity.gather(2, order.unsqueeze(1).expand_as(similarity))  # [p, i, j]: i in the place of j
        now = taken.diagonal(dim1=1, dim2=2)
        gain = taken + taken.transpose(1, 2) - now.unsqueeze(1) - now.unsqueeze(2)
        gain.diagonal(dim1=1, dim2=2).fill_(0)
        best, partner = gain.max(dim=2)
        mutual = (partner.gather(1, partner) == rows) & (best > 1e-6 * now.abs().mean().clamp_min(1e-30))
        if not bool(mutual.any()):
            break
        order = torch.where(mutual, order.gather(1, partner), order)
    return order
