"""How much of a layer's output each direction of a factorisation holds: what ranks are given out by.

Letters: E experts, M matrices of an expert (gate where there is one, up, down), D directions, O/K output and input
features of a matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import KeepsInputs
from moe_compress.calib.statistics import Accumulator, Result, Statistic
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock, Tap
from moe_compress.model.tap import GradientTap

from .align import permuted
from .combine import joint_subspace
from .low_rank import output_sum, own_left, shared_right, spectrum
from .reading import Reading
from .splits import Asked, BaseRule, Split, barycentre_order, find_method


@dataclass(frozen=True)
class FactorSpectrum(Statistic):
    """Energy of every direction in which a method factorises, on what the experts read.

    Rows (token t, expert e) count with g_te² / ‖h_t‖², g the routing weight, h the hidden state behind the decoder
    layer, so that experts and layers compare. Experts that saw few tokens are drawn towards the layer's mean, and each
    counts one average row besides its own.

    Result: `squares` [E, M, D] energy that direction j takes off the error, by rank (the σ_j² of the whitened rest;
    zeros behind its last direction); `rest` [E, M] the error at rank 0; `energy` [E, M] tr(W H Wᵀ) of the whole matrix;
    `output` [E] energy of what the down projection puts out, times the rows' weights.
    Raises UnsupportedModelError, while measuring, where the layer returns no hidden state per token.
    """

    name: ClassVar[str] = "factor_spectrum"
    weighs_tokens: ClassVar[bool] = True
    method: str = "svd"
    base: BaseRule = "mean"
    sparse: float = 0.1
    damping: float = 0.01
    shrinkage: float | None = None

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic. Raises UnsupportedModelError for experts that aren't dense."""
        if block.kind != "fused":
            raise UnsupportedModelError(f"layer {block.layer}: its experts are {block.kind} already")
        return _Spectra(self, block)


@dataclass(frozen=True)
class FisherSpectrum(FactorSpectrum):
    """The same around a base by the weights' Fisher information, which takes gradients.

    Result: also `base_gate`, `base_up`, `base_down` [O, K]. F_e is the mean over batches of the squared gradient of the
    loss (D2-MoE takes sequences one by one: batches of one are that).
    """

    name: ClassVar[str] = "fisher_spectrum"
    gradients: ClassVar[bool] = True

    def parameters(self, block: MoEBlock) -> Sequence[str]:
        """The experts' matrices."""
        return [f"{block.path}.{n}" for n in block.experts_module._parameters if n.endswith("_proj")]


class _Spectra(KeepsInputs):
    def __init__(self, settings: FactorSpectrum, block: MoEBlock):
        super().__init__()
        self.settings, self.layer, self.path = settings, block.layer, block.path
        self.experts = FusedExperts(block.experts_module)
        self.scales: list[Tensor] = []
        self.fisher: dict[str, Tensor] = {}

    def update(self, tap: Tap) -> None:
        if tap.inverse_residual_T is None:
            raise UnsupportedModelError(
                f"layer {tap.layer} returns no hidden state per token that errors could be compared with: "
                "merge.factorise can't give out ranks here (method: mobe needs none)"
            )
        self.inputs.observe(tap)
        self.scales.append(tap.inverse_residual_T)
        if isinstance(tap, GradientTap):
            for name, value in self._canonical(tap.parameters).matrices():
                square = value.float().square()
                self.fisher[name] = self.fisher[name] + square if name in self.fisher else square

    def result(self) -> Result:
        settings, how = self.settings, find_method(self.settings.method)
        weights = self.experts.weights().map(lambda w: w.float())
        order = None
        if how.aligned:
            order = barycentre_order(weights)
            weights = permuted(weights, order)
        scale_T = torch.cat(self.scales)
        reading = Reading(self.experts, self.inputs, settings.damping, settings.shrinkage, scale_T, order)
        asked = Asked(reading, reading.rows.dispatch.counts_E, settings.base, self.fisher, settings.sparse)
        split = how.divide(weights, asked)
        found = energies(weights, reading)
        if how.form == "shared":
            squares = shared_squares(split, shared_directions(split, reading, shares(found)), reading)
        else:
            squares = own_squares(split, reading)
        bases = {f"base_{n}": v.cpu() for n, v in split.base.items()} if self.fisher else {}
        rest = rests(split, reading) if split.base or split.index else found["energy"].clone()
        return {**found, "squares": squares, "rest": rest, **bases}

    def _canonical(self, gradients: dict[str, Tensor]) -> ExpertWeights:
        """Gradients in the orientation of `ExpertWeights`: the module's own layout, holding these."""
        shell = copy.copy(self.experts.module)
        own = {n.removeprefix(f"{self.path}."): v for n, v in gradients.items()}
        shell.__dict__["_parameters"] = {**shell._parameters, **own}
        return FusedExperts(shell).weights()


def energies(weights: ExpertWeights, reading: Reading) -> Result:
    """`energy` and `output`, see FactorSpectrum."""
    energy = torch.zeros(len(weights.up), len(weights.matrices()), dtype=torch.float64)
    for here, roots in reading:
        for m, (name, matrix) in enumerate(weights.matrices()):
            energy[here, m] = (matrix[here].double() @ roots[name]).square().sum((1, 2)).cpu()
    return {"energy": energy, "output": reading.weight_E * energy[:, -1]}


def rests(split: Split, reading: Reading) -> Tensor:
    """Energy of what is left for factors, [E, M]."""
    matrices = list(split.rest.items())
    found = torch.zeros(len(matrices[0][1]), len(matrices), dtype=torch.float64)
    for here, roots in reading:
        for m, (name, matrix) in enumerate(matrices):
            found[here, m] = (matrix[here].double() @ roots[name]).square().sum((1, 2)).cpu()
    return found


def shares(found: Result) -> Tensor:
    """What each matrix's own error counts at the output, [E, M]: relative errors add up there, to first order."""
    energy = found["energy"]
    return torch.where(energy > 0, found["output"].unsqueeze(1) / energy, 0.0)


def own_squares(split: Split, reading: Reading) -> Tensor:
    """σ² of every expert's own rest, [E, M, D]."""
    matrices = list(split.rest.items())
    directions = max(min(m.shape[1:]) for _, m in matrices)
    squares = torch.zeros(len(matrices[0][1]), len(matrices), directions, dtype=torch.float64)
    for here, roots in reading:
        for m, (name, matrix) in enumerate(matrices):
            own = spectrum(matrix[here], roots[name])
            squares[here, m, : own.shape[1]] = own.cpu()
    return squares


def shared_directions(split: Split, reading: Reading, share_EM: Tensor) -> dict[str, Tensor]:
    """The factor that all experts have in common, all directions of it: V [K, K] of gate and up, U [O, O] of down."""
    found = {
        name: shared_right(matrix, reading.mean_root, share_EM[:, m])
        for m, (name, matrix) in enumerate(split.rest.items())
        if name != "down"
    }
    down = split.rest["down"]
    total = torch.zeros(down.shape[1], down.shape[1], dtype=torch.float64, device=down.device)
    for here, roots in reading:
        total += output_sum(down[here], roots["down"], share_EM[here, -1])
    return {**found, "down": joint_subspace(total, len(total))}


def shared_squares(split: Split, directions: dict[str, Tensor], reading: Reading) -> Tensor:
    """What each shared direction takes off every expert's error, [E, M, D]."""
    matrices = list(split.rest.items())
    count = max(len(v) for v in directions.values())
    squares = torch.zeros(len(matrices[0][1]), len(matrices), count, dtype=torch.float64)
    for here, roots in reading:
        for m, (name, matrix) in enumerate(matrices):
            if name == "down":
                own = (directions[name].T @ matrix[here].double() @ roots[name]).square().sum(2)
            else:
                own = own_left(matrix[here], roots[name], directions[name])[0].square().sum(1)
            squares[here, m, : own.shape[1]] = own.cpu()
    return squares
