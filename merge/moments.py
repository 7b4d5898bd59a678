"""Second moments of what groups of experts put out: where a joint subspace is found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.model import FusedExperts
from moe_compress.model.dispatch import Dispatch, grouped_linear, grouped_squares

_CHUNK_BYTES = 512 << 20


def output_moments(experts: FusedExperts, groups: Sequence[Sequence[int]], inputs: BlockInputs) -> dict[str, Tensor]:
    """Projection → Σ over each group's members and their tokens of z zᵀ, z what the member's projection puts out.

    Equal to Σ_i W_i M_i W_iᵀ with M_i the second moment of member i's inputs, without the memory of the M_i.

    Returns:
        "gate" (if there is one), "up", "down" → [G, O, O] float32; groups of one get zeros.
    """
    weights = experts.weights()
    group_E = torch.full((experts.num_experts,), -1)
    for number, members in enumerate(groups):
        group_E[torch.tensor(list(members))] = number if len(members) > 1 else -1
    dispatch = Dispatch.of(inputs.index_TK, inputs.weight_TK, experts.num_experts)
    shapes = {name: matrix.shape[1] for name, matrix in weights.matrices()}
    grams = {n: torch.zeros(len(groups), o, o, device=weights.down.device) for n, o in shapes.items()}
    width = sum(o * o for o in shapes.values())
    row = 3 * experts.hidden_size + 4 * weights.up.shape[1]
    for chunk in chunks([4 * (width + rows * row) for rows in dispatch.counts], _CHUNK_BYTES):
        _, part = dispatch.part(chunk)
        own = weights.part(chunk)
        input_RH = inputs.hidden_TH[part.token_R]
        activation_RI, _ = experts.with_weights(own, input_RH, part)
        group_C = group_E[chunk.start : chunk.stop]
        merged = (group_C >= 0).nonzero().flatten()
        for name, matrix in own.matrices():
            output = grouped_linear(activation_RI if name == "down" else input_RH, matrix, part.offsets_E).float()
            gram = grouped_squares(output, part.offsets_E)
            grams[name].index_add_(0, group_C[merged].to(gram.device), gram[merged.to(gram.device)])
    return grams
