"""What it costs to quantize an expert: measured on the calibration text, before anything is quantized.

Letters: E experts, M matrices of an expert, B candidate widths, R rows (token, expert), Q sequences of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.calib.statistics import Accumulator, Result
from moe_compress.model import ExpertWeights, FusedExperts, Tap
from moe_compress.model.dispatch import Dispatch

from .at_widths import AtWidths
from .rotation import Rotations

# Bytes of rows and re-quantized weights at a time.
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class QuantizationError(AtWidths):
    """Error at the block's output when one expert alone is quantized, all others and the router exact.

    Result: `error` [E, B] ε_eb = Σ over sequences of ‖Z − Z_{e←b bits}‖_F, Z the block's output on a sequence (PMQ,
    arXiv 2410.06270, Eq. 3): as everything else is exact, Z − Z' is the expert's own weighted change on its tokens.
    `squared` [E, B] Σ over tokens of ‖z_t − z'_t‖². `relative` [E, B] Σ over tokens of ‖z_t − z'_t‖² / ‖h_t‖², h the
    hidden state behind the decoder layer; absent where the layer returns none. Quantizer: round-to-nearest on the grid
    that will be used. `per_matrix`: one matrix of an expert alone is quantized instead of all its matrices, and results
    are [E, M, B], M in the order gate (where there is one), up, down. Each token's squared error counts as much as it
    weighs.
    """

    name: ClassVar[str] = "quantization_error"
    weighs_tokens: ClassVar[bool] = True
    per_matrix: bool = False

    def accumulator(self, experts: FusedExperts, rotations: Rotations) -> Accumulator:
        """See AtWidths."""
        return _Errors(self, experts, rotations)


class _Errors(Accumulator):
    """Keeps the block's inputs; errors are computed at the end, so that each expert is quantized once per width."""

    def __init__(self, settings: QuantizationError, experts: FusedExperts, rotations: Rotations):
        self.settings, self.experts, self.rotations = settings, experts, rotations
        self.inputs = BlockInputs()
        self.sequences: list[Tensor] = []
        self.scales: list[Tensor] | None = []
        self.seen = 0

    def update(self, tap: Tap) -> None:
        self.inputs.observe(tap)
        count = tap.hidden_TH.shape[0]
        # Without sequence numbers (input of another shape than the text) a batch counts as one sequence.
        own = tap.sequence_T if tap.sequence_T is not None else torch.full((count,), self.seen)
        self.sequences.append(own)
        self.seen += 1
        if tap.inverse_residual_T is None:
            self.scales = None
        elif self.scales is not None:
            self.scales.append(tap.inverse_residual_T)

    def result(self) -> Result:
        sequence_T = torch.cat(self.sequences)
        number = int(sequence_T.max()) + 1
        weights = self.experts.weights()
        count, bits = self.experts.num_experts, self.settings.bits
        names = [name for name, _ in weights.matrices()]
        changed = [[name] for name in names] if self.settings.per_matrix else [names]
        dispatch = Dispatch.of(self.inputs.index_TK, self.inputs.weight_TK, count)
        squared_MBEQ = torch.zeros(len(changed), len(bits), count, number, dtype=torch.float64)
        relative_MBE = torch.zeros(len(changed), len(bits), count, dtype=torch.float64)
        scale_T = None if self.scales is None else torch.cat(self.scales)
        dense = weights.parameters // count
        row = 3 * self.experts.hidden_size + 4 * weights.up.shape[1]
        sizes = [8 * dense + 4 * rows * row for rows in dispatch.counts]
        for chunk in chunks(sizes, _CHUNK_BYTES):
            _, part = dispatch.part(chunk)
            if not len(part.row_R):
                continue
            own = weights.part(chunk)
            input_RH = self.inputs.hidden_TH[part.token_R]
            exact = self.experts.with_weights(own, input_RH, part)[1]
            sequence_R = sequence_T.to(part.token_R.device)[part.token_R]
            for column, width in enumerate(bits):
                rounded = self.settings.rounded(own, width, self.rotations)
                for m, together in enumerate(changed):
                    candidate = ExpertWeights(
                        **(dict(own.items()) | {name: getattr(rounded, name) for name in together})
                    )
                    output = self.experts.with_weights(candidate, input_RH, part)[1]
                    change = (exact - output).float().square().sum(-1).double() * part.weight_R.double().square()
                    if self.inputs.token_weight_T is not None:
                        change = change * self.inputs.token_weight_T[part.token_R].double()
                    change_R = change.cpu()
                    target_C = squared_MBEQ[m, column, chunk.start : chunk.stop].view(-1)
                    target_C.index_add_(0, (part.expert_R * number + sequence_R).cpu(), change_R)
                    if scale_T is not None:
                        own_C = relative_MBE[m, column, chunk.start : chunk.stop]
                        own_C.index_add_(0, part.expert_R.cpu(), change_R * scale_T[part.token_R.cpu()])
        sums = {"error": squared_MBEQ.sqrt().sum(-1), "squared": squared_MBEQ.sum(-1)}
        if scale_T is not None:
            sums["relative"] = relative_MBE
        # [M, B, E] → [E, M, B], or [E, B] of whole experts.
        ordered = {name: value.permute(2, 0, 1) for name, value in sums.items()}
        return {n: (v if self.settings.per_matrix else v[:, 0]).contiguous() for n, v in ordered.items()}
