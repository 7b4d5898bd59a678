"""What quantizing a matrix costs, from second moments of what it reads: no candidate is ever run.

Letters: E experts, C experts of a chunk, M matrices of an expert, B candidate widths, R rows (token, expert), H hidden,
I neurons, K input features of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import KeepsInputs, chunks
from moe_compress.calib.statistics import Accumulator, Result
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEBlock, Tap
from moe_compress.model.dispatch import Dispatch, grouped_squares

from .at_widths import AtWidths
from .rtn import output_error
from .scores import experts_of

# Moments, rows and re-quantized weights made at a time.
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class GramError(AtWidths):
    """Error of each matrix' own output when it is rounded to nearest: tr(ΔW·H·ΔWᵀ), H the second moment of its input.

    Every row (token t, expert e) counts with s_te = g_te² / ‖h_t‖², g the routing weight, h the hidden state behind the
    decoder layer: then an error at the down projection counts as `QuantizationError.relative` does. H = Σ_t s_te x xᵀ.
    A token that weighs something has s_te as much larger.

    Result: `error` [E, M, B] tr(ΔW·H·ΔWᵀ); `energy` [E, M] tr(W·H·Wᵀ); `output` [E] Σ_t s_te ‖f_e(x_t)‖². M in the
    order gate (where there is one), up, down. Raises UnsupportedModelError, while measuring, where the layer returns no
    hidden state per token.
    """

    name: ClassVar[str] = "gram_error"
    weighs_tokens: ClassVar[bool] = True

    def accumulator(self, block: MoEBlock) -> Accumulator:
        """See AtWidths."""
        return _Traces(self, block)


class _Traces(KeepsInputs):
    """Keeps the block's inputs, as a moment per expert takes far more; moments are made at the end, in chunks."""

    def __init__(self, settings: GramError, block: MoEBlock):
        super().__init__()
        self.settings, self.block = settings, block
        self.scales: list[Tensor] = []

    def update(self, tap: Tap) -> None:
        if tap.inverse_residual_T is None:
            raise UnsupportedModelError(
                f"layer {tap.layer} returns no hidden state per token that errors could be compared with: set "
                "`cost: pmq` in quantize.mixed"
            )
        self.inputs.observe(tap)
        self.scales.append(tap.inverse_residual_T * tap.counted_T.cpu())

    def result(self) -> Result:
        experts, spaces = experts_of(self.block), self.settings.spaces(self.block, self.inputs)
        weights, count = experts.weights(), experts.num_experts
        names = [name for name, _ in weights.matrices()]
        hidden, neurons = experts.hidden_size, weights.up.shape[1]
        dispatch = Dispatch.of(self.inputs.index_TK, self.inputs.weight_TK, count)
        scale_T = torch.cat(self.scales)
        error = torch.zeros(count, len(names), len(self.settings.bits), dtype=torch.float64)
        energy, output = torch.zeros(count, len(names), dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        fixed = hidden**2 + neurons**2 + 3 * len(names) * hidden * neurons
        sizes = [4 * (fixed + rows * (2 * hidden + 4 * neurons)) for rows in dispatch.counts]
        for chunk in chunks(sizes, _CHUNK_BYTES):
            _, part = dispatch.part(chunk)
            if not len(part.row_R):
                continue
            own, here = weights.part(chunk), slice(chunk.start, chunk.stop)
            input_RH = self.inputs.hidden_TH[part.token_R]
            activation_RI, output_RH = experts.with_weights(own, input_RH, part)
            scale_R = part.weight_R.double().square() * scale_T.to(part.weight_R.device)[part.token_R]
            weigh_R1 = scale_R.sqrt().float().unsqueeze(1)
            added_R = output_RH.float().mul(weigh_R1).square().sum(dim=1).double()
            output[here].index_add_(0, part.expert_R.cpu(), added_R.cpu())
            read = input_RH.float() * weigh_R1
            moments = {False: grouped_squares(read, part.offsets_E)}
            read = activation_RI.float() * weigh_R1
            moments[True] = grouped_squares(read, part.offsets_E)
            for m, (name, matrix) in enumerate(own.matrices()):
                hessian, matrix = moments[name == "down"], matrix.float()
                energy[here, m] = output_error(matrix, hessian).sum(1).cpu()
                for column, (bits, space) in enumerate(zip(self.settings.bits, spaces[name], strict=True)):
                    rounded = self.settings.rounded(matrix, bits, space.part(chunk))
                    error[here, m, column] = output_error(matrix - rounded, hessian).sum(1).cpu()
        return {"error": error, "energy": energy, "output": output}
