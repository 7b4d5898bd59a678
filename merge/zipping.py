"""Neurons of several experts into as many as one has: the most alike are joined, whoever's they are.

ZipIt (arXiv 2305.03053) joins features whose activations correlate, also two of the same model: what one has twice
needs no partner in the other. Averaging after alignment can't do that: each neuron gets exactly one of every expert.

Letters: G groups of experts, N members of one, I neurons of an expert, S sample tokens, U = N·I neurons of all members.
"""

from __future__ import annotations

import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from moe_compress.model.experts import ExpertWeights

from .align import standardized
from .cluster import cut


def zipped_neurons(activation_NSI: Tensor) -> Tensor:
    """Which of the I merged neurons each member's neuron goes to: [N, I] int64.

    The two neurons, or sets of joined ones, with the largest mean correlation are joined until I are left. On the CPU;
    N·I neurons take (N·I)² · 12 bytes and O((N·I)²) steps.

    Args:
        activation_NSI: what the members' neurons are on the same tokens.
    """
    members, _, neurons = activation_NSI.shape
    unit = standardized(activation_NSI).transpose(0, 1).flatten(1)  # [S, U]
    distance = (1 - (unit.T @ unit).double()).clamp_min(0).cpu()
    distance.fill_diagonal_(0)
    distance = (distance + distance.T) / 2
    steps = linkage(squareform(distance.numpy(), checks=False), "average")
    label = torch.empty(members * neurons, dtype=torch.int64)
    for place, joined in enumerate(cut(steps, members * neurons, neurons)):
        label[torch.tensor(joined)] = place
    return label.view(members, neurons)


def zip_experts(members: ExpertWeights, weight_GN: Tensor, place_GNI: Tensor) -> ExpertWeights:
    """Groups' merged experts [G, …] from their members' [G, N, …], summed in float64.

    A merged neuron's rows of gate and up, and biases, are the means of those that it stands for, by their experts'
    weights. Its column of down is the sum of theirs, each times its expert's share: where the joined neurons are equal,
    the merged expert puts out exactly the weighted mean of what its members do.

    Args:
        members: of each group.
        weight_GN: weights of members, not all zero in a group.
        place_GNI: as `zipped_neurons` gives it.
    """
    groups, count, neurons = place_GNI.shape
    share_GN = (weight_GN / weight_GN.sum(-1, keepdim=True)).double().to(members.up.device)
    place_GU = place_GNI.reshape(groups, -1).to(members.up.device)
    # Where all that a neuron stands for belongs to experts of weight 0, they count alike.
    share_GU = share_GN.clamp_min(1e-12).repeat_interleave(neurons, dim=1)
    total_GI = share_GU.new_zeros(groups, neurons).scatter_add_(1, place_GU, share_GU)
    within_GU = share_GU / total_GI.gather(1, place_GU)
    values: dict[str, Tensor] = {}
    for name, tensor in members.items():
        wide = tensor.double()
        if name == "down_bias":
            values[name] = torch.einsum("gn,gnh->gh", share_GN, wide)
            continue
        rows = wide.transpose(2, 3) if name == "down" else wide.unsqueeze(-1) if wide.dim() == 3 else wide
        rows = rows.reshape(groups, count * neurons, -1)
        factor = share_GN.repeat_interleave(neurons, dim=1) if name == "down" else within_GU
        rows = rows * factor.unsqueeze(-1)
        summed = rows.new_zeros(groups, neurons, rows.shape[2])
        summed.scatter_add_(1, place_GU.unsqueeze(-1).expand_as(rows), rows)
        values[name] = summed.transpose(1, 2) if name == "down" else summed.squeeze(-1) if wide.dim() == 3 else summed
    return ExpertWeights(**values)
