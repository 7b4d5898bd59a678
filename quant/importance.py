"""How much each input channel of each expert matters: the mean square of what it carries, as an imatrix has it.

Letters: E experts, T tokens, R rows by expert, H hidden size, I neurons, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.model import FusedExperts
from moe_compress.model.dispatch import Dispatch

# Bytes of rows at a time.
_CHUNK_BYTES = 512 << 20
# Rows of the layer's mean that join an expert's own: with fewer of its own it is more the layer's than its own.
SHRINKAGE = 32.0


@dataclass(frozen=True)
class ChannelSquares:
    """Sums of squares over each expert's rows, each counted as its token weighs.

    Attributes:
        rows_E: rows seen by each, float64.
        input_EH, activation_EI: Σ x² of what gate and up read, and of what the down projection reads, float64.
    """

    rows_E: Tensor
    input_EH: Tensor
    activation_EI: Tensor

    def importance(self, projection: str, strength: float = SHRINKAGE) -> Tensor:
        """Mean squares [E, K], float32. An expert's few rows are joined by `strength` rows of the layer's mean."""
        sums_EK = self.activation_EI if projection == "down" else self.input_EH
        mean_K = sums_EK.sum(0) / self.rows_E.sum().clamp_min(1e-300)
        return ((sums_EK + strength * mean_K) / (self.rows_E + strength).unsqueeze(-1)).float()


def channel_squares(inputs: BlockInputs, experts: FusedExperts) -> ChannelSquares:
    """What a block's experts read, from what the block read."""
    weights = experts.weights()
    dispatch = Dispatch.of(inputs.index_TK, inputs.weight_TK, experts.num_experts)
    count, hidden, neurons = experts.num_experts, experts.hidden_size, weights.up.shape[1]
    rows_E = torch.zeros(count, dtype=torch.float64, device=weights.up.device)
    squares = [rows_E.new_zeros(count, width) for width in (hidden, neurons)]
    sizes = [4 * rows * (2 * hidden + 4 * neurons) for rows in dispatch.counts]
    for chunk in chunks(sizes, _CHUNK_BYTES):
        _, part = dispatch.part(chunk)
        if not len(part.row_R):
            continue
        input_RH = inputs.hidden_TH[part.token_R]
        activation_RI, _ = experts.with_weights(weights.part(chunk), input_RH, part)
        own, counted_R = slice(chunk.start, chunk.stop), inputs.counted(part)
        rows_E[own].index_add_(0, part.expert_R, counted_R)
        for total_EK, rows_RK in zip(squares, (input_RH, activation_RI), strict=True):
            total_EK[own].index_add_(0, part.expert_R, rows_RK.double().square() * counted_R[:, None])
    return ChannelSquares(rows_E, squares[0], squares[1])
