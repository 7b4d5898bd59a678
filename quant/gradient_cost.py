"""What it costs the loss to quantize an expert: its error at the block's output, weighted by the loss's gradient there.

Letters: E experts, M matrices of an expert (gate, up, down, as many as there are), B candidate widths, T tokens,
R rows (token, expert), H hidden size of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.calib.statistics import Accumulator, Result
from moe_compress.model import ExpertWeights, FusedExperts, GradientTap, Tap
from moe_compress.model.dispatch import Dispatch

from .at_widths import AtWidths
from .rotation import Rotations

# Bytes of rows and re-quantized weights at a time.
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class GradientError(AtWidths):
    """Error at the block's output when one expert alone is quantized, by what it does to the next token's loss.

    With δ_t the change of the experts module's output at token t (as everything else is exact, the expert's own change
    times its routing weight), and g_t the gradient there of the loss summed over the text:

    `gradient` [E, B] Σ_t Σ_i g_ti² δ_ti² / T (GEMQ, coefficient c of its program): a diagonal empirical Fisher, which
    takes the channels' errors for independent. `fisher` [E, B] Σ_t (g_t · δ_t)² / T: the empirical Fisher along the
    very error that is made, with all its correlations between channels; half of it estimates the nats per token that
    are lost. `per_matrix`: one matrix of an expert alone is quantized instead of all its matrices, and results are
    [E, M, B], M in the order gate (where there is one), up, down.

    GEMQ takes the gradient at the decoder layer's output. Where the layer adds the block's output to the hidden state
    it's the same; where it first scales, norms or projects it, or mixes it into several streams, the gradient at the
    experts' output is what the chain rule makes of it, and the one that belongs to δ. Sums over tokens are float64.
    Quantizer: round-to-nearest on the grid that will be used.
    """

    name: ClassVar[str] = "gradient_error"
    gradients: ClassVar[bool] = True
    per_matrix: bool = False

    def accumulator(self, experts: FusedExperts, rotations: Rotations) -> Accumulator:
        """See AtWidths."""
        return _Errors(self, experts, rotations)


class _Errors(Accumulator):
    """Keeps inputs and gradients; errors are computed at the end, so that each expert is quantized once per width."""

    def __init__(self, settings: GradientError, experts: FusedExperts, rotations: Rotations):
        self.settings, self.experts, self.rotations = settings, experts, rotations
        self.inputs = BlockInputs()
        self.gradients: list[Tensor] = []

    def update(self, tap: Tap) -> None:
        assert isinstance(tap, GradientTap)
        self.inputs.observe(tap)
        self.gradients.append(tap.gradient_TH)

    def result(self) -> Result:
        weights = self.experts.weights()
        count, names = self.experts.num_experts, [name for name, _ in weights.matrices()]
        tokens = self.inputs.tokens
        # The sweep's loss is a mean: times T it is a sum over the text, of the size of one token's.
        gradient_TH = torch.cat(self.gradients).float() * tokens
        changes = [[name] for name in names] if self.settings.per_matrix else [names]
        shape = (count, len(changes), len(self.settings.bits))
        diagonal, directional = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        dispatch = Dispatch.of(self.inputs.index_TK, self.inputs.weight_TK, count)
        width = weights.parameters // count
        row = 5 * self.experts.hidden_size + 4 * weights.up.shape[1]
        for chunk in chunks([12 * width + 4 * rows * row for rows in dispatch.counts], _CHUNK_BYTES):
            _, part = dispatch.part(chunk)
            if not len(part.row_R):
                continue
            own = weights.part(chunk)
            input_RH = self.inputs.hidden_TH[part.token_R]
            exact_RH = self.experts.with_weights(own, input_RH, part)[1]
            weighted_RH = gradient_TH[part.token_R] * part.weight_R.float().unsqueeze(-1)
            for column, bits in enumerate(self.settings.bits):
                rounded = self.settings.rounded(own, bits, self.rotations)
                for place, changed in enumerate(changes):
                    mixed = ExpertWeights(**{n: getattr(rounded if n in changed else own, n) for n, _ in own.items()})
                    change_RH = exact_RH - self.experts.with_weights(mixed, input_RH, part)[1]
                    effect_RH = change_RH.float() * weighted_RH
                    for sums, values_R in (
                        (diagonal, effect_RH.square().sum(-1, dtype=torch.float64)),
                        (directional, effect_RH.sum(-1, dtype=torch.float64).square()),
                    ):
                        target = sums[chunk.start : chunk.stop, place, column]
                        target.index_add_(0, part.expert_R.cpu(), values_R.cpu() / tokens)
        found = {"gradient": diagonal, "fisher": directional}
        return {n: (v if self.settings.per_matrix else v[:, 0]).contiguous() for n, v in found.items()}
