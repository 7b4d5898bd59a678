"""Ranks for a budget: what each costs, in bytes and in error left, and the one program that gives them out.

A unit is a matrix of an expert, or of a layer where its factor is shared. It gets a rank on a grid of `step`, 0
included, or stays dense where that is smaller (rank −1). Costs are the error left at the expert's output, relative to
the hidden state that it is added to, as `relative` in quantize.mixed: energies of a spectrum fall, so their sums are
convex in the rank, and the program's relaxation over them is tight but for the last step.

Letters: E experts, M matrices of an expert, U units, C choices, D directions, O/K output and input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.budget.integer import Floats, Ints
from moe_compress.budget.knapsack import solve_arrays
from moe_compress.calib.statistics import Result
from moe_compress.errors import BudgetError
from moe_compress.model.shape import LayerShape
from moe_compress.quant.allocate import Choices
from moe_compress.quant.packed import PROJECTIONS

from .spectra import shares
from .splits import Method, kept_neurons

DENSE = -1


@dataclass(frozen=True)
class Sizes:
    """Bytes of a layer's factors.

    Attributes:
        method: what is factorised how.
        layer: its shape.
        item: bytes of a stored weight.
        step: of the ranks.
        sparse: share of neurons kept whole, where the method keeps any.
    """

    method: Method
    layer: LayerShape
    item: int
    step: int
    sparse: float

    @property
    def names(self) -> tuple[str, ...]:
        """Projections, as the M are ordered."""
        return PROJECTIONS[-self.layer.matrices :]

    def sides(self, name: str) -> tuple[int, int]:
        """O and K of a projection."""
        hidden, neurons = self.layer.hidden, self.layer.intermediate
        return (hidden, neurons) if name == "down" else (neurons, hidden)

    @property
    def fixed(self) -> int:
        """Bytes that the layer takes whatever the ranks: biases, bases, neurons kept whole."""
        layer = self.layer
        total = layer.num_experts * layer.biases * layer.weight_bytes
        for name in self.names:
            rows, columns = self.sides(name)
            if self.method.base is not None:
                total += self.item * rows * columns
            if self.method.whole:
                kept = kept_neurons(layer.intermediate, self.sparse)
                total += layer.num_experts * kept * (4 + self.item * layer.hidden)
        return total

    def of(self, name: str, rank: int) -> int:
        """Bytes of a unit at a rank: of one expert's matrix, or of the whole projection where a factor is shared."""
        rows, columns = self.sides(name)
        count = self.layer.num_experts
        if self.method.form == "own":
            return self.item * (rows * columns if rank == DENSE else rank * (rows + columns))
        if rank == DENSE:
            return self.item * count * rows * columns
        shared, own = (rows, columns) if name == "down" else (columns, rows)
        return self.item * rank * (shared + count * own)

    def ranks(self, name: str) -> list[int]:
        """What a unit may get, by rising size: dense last, and no rank that takes as much."""
        most = self.sides(name)[name != "down"] if self.method.form == "shared" else min(self.sides(name))
        # Neurons kept whole are part of every expert: beside them nothing is dense.
        dense = [] if self.method.whole else [DENSE]
        limit = self.of(name, DENSE) if dense else float("inf")
        grid = [*range(0, most, self.step), most]
        return [rank for rank in dict.fromkeys(grid) if self.of(name, rank) < limit] + dense

    def total(self, ranks: dict[str, list[int]]) -> int:
        """Bytes of the layer with these ranks of every expert."""
        total = self.fixed
        for name, own in ranks.items():
            units = own if self.method.form == "own" else own[:1]
            total += sum(self.of(name, rank) for rank in units)
        return total

    def choices(self, measured: Result) -> Choices:
        """Units of the layer for the program: unit u's choice c is `ranks(its projection)[c]`."""
        experts, matrices = measured["energy"].shape
        left = remaining(measured)
        per = experts if self.method.form == "own" else 1
        width = max(len(self.ranks(name)) for name in self.names)
        cost_UB, size_UB = np.zeros((per * matrices, width)), np.zeros((per * matrices, width), np.int64)
        mask_UB = np.zeros((per * matrices, width), np.bool_)
        for m, name in enumerate(self.names):
            ranks = self.ranks(name)
            # The last entry of `left`, nothing, is what dense costs.
            cost_EC = left[:, m, torch.tensor([r if r != DENSE else left.shape[2] - 1 for r in ranks])]
            cost: Floats = (cost_EC if per > 1 else cost_EC.sum(0, keepdim=True)).numpy()
            here = slice(m, None, matrices)
            cost_UB[here, : len(ranks)] = cost
            size_UB[here, : len(ranks)] = [self.of(name, rank) for rank in ranks]
            mask_UB[here, : len(ranks)] = True
        unit_EM: Ints = np.arange(per * matrices, dtype=np.int64).reshape(per, matrices)
        return Choices(unit_EM, cost_UB, size_UB, mask_UB)

    def chosen(self, column_U: Ints) -> dict[str, list[int]]:
        """Projection → rank of every expert, from the program's answer."""
        found = {}
        for m, name in enumerate(self.names):
            ranks = [self.ranks(name)[c] for c in column_U[m :: len(self.names)].tolist()]
            found[name] = ranks if self.method.form == "own" else ranks * self.layer.num_experts
        return found


def give_out(choices: dict[int, Choices], budget: int, exact: int = 64) -> tuple[dict[int, Ints], dict[str, Any], str]:
    """Layer → the choice of every unit, least total cost within the budget; what is known of it, and a note or "".

    Spectra fall, so all their points lie on the hull and the relaxation misses the best plan by less than one step of
    one unit. Only up to `exact` units is that worth an integer program. Raises BudgetError where nothing fits.
    """
    width = max(c.cost_UB.shape[1] for c in choices.values())
    padded = [
        [np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (c.cost_UB, c.size_UB, c.mask_UB)]
        for c in choices.values()
    ]
    cost, size, mask = (np.concatenate(column) for column in zip(*padded, strict=True))
    found = solve_arrays(cost, size, budget, mask, solver="auto" if len(cost) <= exact else "lagrange")
    ends = np.cumsum([len(c.cost_UB) for c in choices.values()])[:-1]
    columns = dict(zip(choices, np.split(found.choice, ends), strict=True))
    return columns, {"solver": found.solver, "gap": float(found.gap), "cost": float(found.cost)}, found.note


def remaining(measured: Result) -> Tensor:
    """Error at the output that every rank leaves, [E, M, D + 2] float64; the last entry is 0, of a dense matrix."""
    squares, share = measured["squares"], shares(measured)
    taken = torch.cat([torch.zeros_like(squares[..., :1]), squares.cumsum(2)], dim=2)
    left = (measured["rest"].unsqueeze(2) - taken).clamp_min(0) * share.unsqueeze(2)
    return torch.cat([left, torch.zeros_like(left[..., :1])], dim=2)


def bases_rank(name: str, sizes: Sizes, bases: int, share: float) -> int:
    """The largest rank on the grid of gate's and up's bases, for a share of the layer's dense bytes.

    Raises BudgetError where not even the first fits.
    """
    layer = sizes.layer
    rank = 0
    while sizes_of_bases(sizes, bases, rank + sizes.step) <= share * layer.num_experts * layer.dense_bytes_per_expert:
        rank += sizes.step
        if rank >= min(layer.hidden, layer.intermediate):
            break
    if rank == 0:
        least = sizes_of_bases(sizes, bases, sizes.step) / (layer.num_experts * layer.dense_bytes_per_expert)
        raise BudgetError(
            f"{name}: mobe leaves down projections dense and takes {least:.0%} of a layer's experts at least (rank "
            f"{sizes.step}, {bases} bases), the budget is {share:.0%}: allow more, or take another method"
        )
    return min(rank, layer.hidden, layer.intermediate)


def sizes_of_bases(sizes: Sizes, bases: int, rank: int) -> int:
    """Bytes of a layer whose gate and up are mixtures of bases, down dense."""
    layer = sizes.layer
    rank = min(rank, layer.hidden, layer.intermediate)
    own = layer.num_experts * (rank * layer.intermediate + bases) + bases * rank * layer.hidden
    down = layer.num_experts * layer.hidden * layer.intermediate
    return sizes.fixed + sizes.item * ((layer.matrices - 1) * own + down)
