"""What it costs to quantize an expert: measured on the calibration text, before anything is quantized.

Letters: E experts, M matrices of an expert, B candidate widths, T tokens, R rows (token, expert), Q sequences of the
text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import KeepsInputs
from moe_compress.calib.statistics import Accumulator, Result
from moe_compress.model import MoEBlock, Tap

from .at_widths import OutputChanges


@dataclass(frozen=True)
class QuantizationError(OutputChanges):
    """Error at the block's output when one expert alone is quantized, all others and the router exact.

    Result: `error` [E, B] ε_eb = Σ over sequences of ‖Z − Z_{e←b bits}‖_F, Z the block's output on a sequence (PMQ,
    arXiv 2410.06270, Eq. 3): as everything else is exact, Z − Z' is the expert's own weighted change on its tokens.
    `squared` [E, B] Σ over tokens of ‖z_t − z'_t‖². `relative` [E, B] Σ over tokens of ‖z_t − z'_t‖² / ‖h_t‖², h the
    hidden state behind the decoder layer; absent where the layer returns none. Quantizer: round-to-nearest on the grid
    that will be used. `per_matrix`: see OutputChanges. Each token's squared error counts as much as it weighs.
    """

    name: ClassVar[str] = "quantization_error"
    weighs_tokens: ClassVar[bool] = True

    def accumulator(self, block: MoEBlock) -> Accumulator:
        """See AtWidths."""
        return _Errors(self, block)


class _Errors(KeepsInputs):
    """Keeps the block's inputs; errors are computed at the end, so that each expert is quantized once per width."""

    def __init__(self, settings: QuantizationError, block: MoEBlock):
        super().__init__()
        self.settings, self.block = settings, block
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
        own = self.settings
        sequence_T = torch.cat(self.sequences)
        number = int(sequence_T.max()) + 1
        scale_T = None if self.scales is None else torch.cat(self.scales)
        squared_EMBQ, relative_EMB = own.zeros(self.block, number), own.zeros(self.block)
        for experts, part, place, column, change_RH in own.changes(self.block, self.inputs):
            squared_R = change_RH.square().sum(-1).double() * part.weight_R.double().square()
            squared_R = squared_R * self.inputs.counted(part)
            squared_R, token_R, expert_R = squared_R.cpu(), part.token_R.cpu(), part.expert_R.cpu()
            index = (expert_R, sequence_T[token_R])
            squared_EMBQ[experts, place, column].index_put_(index, squared_R, accumulate=True)
            if scale_T is not None:
                relative_EMB[experts, place, column].index_add_(0, expert_R, squared_R * scale_T[token_R])
        sums = {"error": squared_EMBQ.sqrt().sum(-1), "squared": squared_EMBQ.sum(-1)}
        if scale_T is not None:
            sums["relative"] = relative_EMB
        return {name: own.shaped(value).contiguous() for name, value in sums.items()}
