"""Where matrices are rounded: with the factors and rotations that they will have by then.

Contract: for invertible A, W x = (W A)(A⁻¹ x), and what is rounded is W A. With A = D Q, D factors of what a projection
reads (smoothing.py, input_smoothing.py) and Q a rotation (rotation.py), rounding W to nearest is round(W D Q) Qᵀ D⁻¹,
and the second moment of what is read is Qᵀ D⁻¹ M D⁻¹ Q. That up projections have their rows divided by the factors of
down projections changes nothing in what rounding does to the block's output: scales are per row.

Factors depend on widths, so there is a space for each width: the factors that are best if all matrices of the layer
have it, on what the layer reads in the model as it is, by what GPTQ is foreseen to leave where that is the method.
Later, when matrices have several widths and the layer reads what quantized layers before it put out, the pass chooses
factors anew, by running the method: about the same, not the very same.

Letters: E experts (where a space is a part's, of the part), I neurons, O and K output and input features of a
projection, P factors tried, W widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.model import FusedExperts, MoEBlock

from .input_smoothing import best_factors, input_errors, tried_factors, unmovable
from .rotation import Rotation, Rotations
from .smoothing import neuron_factors, obstacle, scaled
from .solver import SolverOptions

# Moments, rows and solver workspace made at a time.
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True, eq=False)
class Space:
    """Where a projection's matrices are rounded.

    Attributes:
        rotation: Q. factor_EK: D of each expert, or of all (one row). None: the identity.
    """

    rotation: Rotation | None = None
    factor_EK: Tensor | None = None

    def part(self, experts: range | slice) -> Space:
        """That of some of the experts."""
        if self.factor_EK is None or len(self.factor_EK) == 1:
            return self
        return replace(self, factor_EK=self.factor_EK[experts.start : experts.stop])

    def turned(self, matrix_EOK: Tensor) -> Tensor:
        """W → W D Q, float32 unless both are the identity."""
        if self.factor_EK is not None:
            matrix_EOK = scaled(matrix_EOK, self.factor_EK).float()
        return matrix_EOK if self.rotation is None else self.rotation(matrix_EOK.float())

    def back(self, matrix_EOK: Tensor) -> Tensor:
        """Undo `turned`."""
        if self.rotation is not None:
            matrix_EOK = self.rotation.back(matrix_EOK)
        return matrix_EOK if self.factor_EK is None else matrix_EOK / self.factor_EK.unsqueeze(1)

    def read(self, value: Tensor) -> Tensor:
        """What a projection reads → A⁻¹ x, in its own dtype, where all experts have the same factors."""
        if self.factor_EK is not None:
            value = (value / self.factor_EK[0]).to(value.dtype)
        return value if self.rotation is None else self.rotation(value)

    def of_moment(self, moment_EKK: Tensor) -> Tensor:
        """Second moments of what a projection reads → Qᵀ D⁻¹ M D⁻¹ Q."""
        if self.factor_EK is not None:
            moment_EKK = moment_EKK / (self.factor_EK.unsqueeze(1) * self.factor_EK.unsqueeze(2))
        return moment_EKK if self.rotation is None else self.rotation.both_sides(moment_EKK)


def spaces_of(
    block: MoEBlock, widths: Sequence[float], rotations: Rotations, options: SolverOptions, inputs: BlockInputs
) -> dict[str, list[Space]]:
    """Projection → where its matrices are rounded at each width: the same space where nothing tells widths apart."""
    experts = FusedExperts(block.experts_module)
    names = [name for name, _ in experts.weights().matrices()]
    inward_W, down_W = ([Space(turn)] * len(widths) for turn in (rotations.inward, rotations.down))
    if options.smooths_input and unmovable(block) is None:
        assigned = [{name: [width] * experts.num_experts for name in names} for width in widths]
        factor_PH = tried_factors(block, options, inputs)
        error_WP = input_errors(block, factor_PH, assigned, options, inputs, _CHUNK_BYTES, foreseen=True)
        factor_P1H = factor_PH.unsqueeze(1).to(experts.weights().down.device, torch.float32)
        tried = [inward_W[0], *(replace(inward_W[0], factor_EK=factor_1H) for factor_1H in factor_P1H[1:])]
        inward_W = [tried[best_factors(error_P, options)] for error_P in error_WP]
    if options.smooths_neurons and obstacle(experts) is None:
        assigned_WE = [[width] * experts.num_experts for width in widths]
        factors_W = neuron_factors(experts, assigned_WE, options, inputs, _CHUNK_BYTES, foreseen=True)
        down_W = [replace(down_W[0], factor_EK=factor_EI) for _, factor_EI in factors_W]
    return {name: down_W if name == "down" else inward_W for name in names}
