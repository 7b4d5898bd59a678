"""What it costs the loss to quantize an expert: its error at the block's output, weighted by the loss's gradient there.

Letters: E experts, M matrices of an expert (gate, up, down, as many as there are), B candidate widths, T tokens,
R rows (token, expert), H hidden size of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import KeepsInputs
from moe_compress.calib.statistics import Accumulator, Result
from moe_compress.model import GradientTap, MoEBlock, Tap

from .at_widths import OutputChanges


@dataclass(frozen=True)
class GradientError(OutputChanges):
    """Error at the block's output when one expert alone is quantized, by what it does to the next token's loss.

    With δ_t the change of the experts module's output at token t (as everything else is exact, the expert's own change
    times its routing weight), and g_t the gradient there of the loss summed over the text:

    `gradient` [E, B] Σ_t Σ_i g_ti² δ_ti² / T (GEMQ, coefficient c of its program): a diagonal empirical Fisher, which
    takes the channels' errors for independent. `fisher` [E, B] Σ_t (g_t · δ_t)² / T: the empirical Fisher along the
    very error that is made, with all its correlations between channels; half of it estimates the nats per token that
    are lost. `per_matrix`: see OutputChanges.

    GEMQ takes the gradient at the decoder layer's output. Where the layer adds the block's output to the hidden state
    it's the same; where it first scales, norms or projects it, or mixes it into several streams, the gradient at the
    experts' output is what the chain rule makes of it, and the one that belongs to δ. Sums over tokens are float64.
    Quantizer: round-to-nearest on the grid that will be used.
    """

    name: ClassVar[str] = "gradient_error"
    gradients: ClassVar[bool] = True

    def accumulator(self, block: MoEBlock) -> Accumulator:
        """See AtWidths."""
        return _Errors(self, block)


class _Errors(KeepsInputs):
    """Keeps inputs and gradients; errors are computed at the end, so that each expert is quantized once per width."""

    def __init__(self, settings: GradientError, block: MoEBlock):
        super().__init__()
        self.settings, self.block = settings, block
        self.gradients: list[Tensor] = []

    def update(self, tap: Tap) -> None:
        assert isinstance(tap, GradientTap)
        self.inputs.observe(tap)
        self.gradients.append(tap.gradient_TH)

    def result(self) -> Result:
        own, tokens = self.settings, self.inputs.tokens
        # The sweep's loss is a mean: times T it is a sum over the text, of the size of one token's.
        gradient_TH = torch.cat(self.gradients).float() * tokens
        sums = {"gradient": own.zeros(self.block), "fisher": own.zeros(self.block)}
        for experts, part, place, column, change_RH in own.changes(self.block, self.inputs):
            effect_RH = change_RH * (gradient_TH[part.token_R] * part.weight_R.float().unsqueeze(-1))
            found = {
                "gradient": effect_RH.square().sum(-1, dtype=torch.float64),
                "fisher": effect_RH.sum(-1, dtype=torch.float64).square(),
            }
            for name, value_R in found.items():
                sums[name][experts, place, column].index_add_(0, part.expert_R.cpu(), value_R.cpu() / tokens)
        return {name: own.shaped(value).contiguous() for name, value in sums.items()}
