"""Quantizing the experts of one layer at given widths, and putting packed ones in their place.

Contract: `quantize_experts` changes one block and says of every expert what it took and what error is left. Experts
that get the same width are solved in one batched call, gate and up on the one Hessian of what both read.

Letters: E experts, C experts of a chunk, H hidden, I neurons, O and K output and input features of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, Moments, chunks
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock

from .gptq import gptq, shrink_hessians
from .grid import Grid, Quantized, Search
from .packed import Stack, pack_experts
from .rtn import round_to_nearest

# Dense weights (float32) and solver workspace made at a time.
CHUNK_BYTES = 512 << 20

# Projection → the width of every expert's matrix.
Widths = dict[str, list[float]]


class Solving(Protocol):
    """How matrices are quantized: the part of a pass's options that is the same for all."""

    @property
    def search(self) -> Search:
        """How scales are found."""

    @property
    def damping(self) -> float:
        """GPTQ: added to the Hessian's diagonal, times its mean."""

    @property
    def shrinkage(self) -> float | None:
        """GPTQ: tokens that the layer's mean Hessian counts for."""

    def grid(self, bits: float) -> Grid:
        """The grid of a width."""


def quantize_experts(
    block: MoEBlock, widths: Widths, solving: Solving, inputs: BlockInputs | None
) -> list[dict[str, Any]]:
    """Quantize and pack a block's experts: by GPTQ on `inputs`, by round-to-nearest without.

    Returns for every expert its `bits` by projection, and what the solver says (tokens, errors, damping).
    """
    experts = FusedExperts(block.experts_module)
    matrices: dict[str, list[tuple[list[int], Stack]]] = {}
    names = [name for name, _ in experts.weights().matrices()]
    report: list[dict[str, Any]] = [{"bits": {n: widths[n][e] for n in names}} for e in range(experts.num_experts)]
    for solved in _by_rtn(experts, widths, solving) if inputs is None else _by_gptq(experts, widths, solving, inputs):
        matrices.setdefault(solved.projection, []).append((solved.experts, Stack.holding(solved.quantized)))
        for expert, values in solved.report.items():
            report[expert].update(values)
    pack_experts(block, matrices)
    return report


@dataclass(frozen=True)
class _Solved:
    """One projection of some experts, quantized; what to say of each expert."""

    projection: str
    experts: list[int]
    quantized: Quantized
    report: dict[int, dict[str, Any]]


def _by_rtn(experts: FusedExperts, widths: Widths, solving: Solving) -> Iterator[_Solved]:
    weights = experts.weights()
    sizes = [16 * weights.parameters // experts.num_experts] * experts.num_experts
    for name, stacked in weights.matrices():
        for chunk in chunks(sizes, CHUNK_BYTES):
            for (width,), members in _alike([widths[name]], chunk).items():
                grid = solving.grid(width)
                yield _Solved(name, members, round_to_nearest(stacked[members], grid, search=solving.search), {})


def _by_gptq(experts: FusedExperts, widths: Widths, solving: Solving, inputs: BlockInputs) -> Iterator[_Solved]:
    weights = experts.weights()
    means = _layer_means(experts, inputs)
    inward = [name for name, _ in weights.matrices() if name != "down"]
    for part in inputs.moments(experts, CHUNK_BYTES):
        for names, moment, mean in ((inward, part.input_CHH, means[0]), (["down"], part.activation_CII, means[1])):
            for alike, members in _alike([widths[n] for n in names], part.experts).items():
                local = [e - part.experts.start for e in members]
                hessian = shrink_hessians(moment[local], part.rows_C[local], solving.shrinkage, mean_KK=mean)
                # Matrices that read the same and get the same width are one matrix with more rows.
                together = [names] if len(set(alike)) == 1 else [[name] for name in names]
                for own in together:
                    grid = solving.grid(widths[own[0]][members[0]])
                    yield from _solve(weights, own, members, grid, hessian, part, solving)


def _solve(
    weights: ExpertWeights,
    names: Sequence[str],
    members: list[int],
    grid: Grid,
    hessian_EKK: Tensor,
    part: Moments,
    solving: Solving,
) -> Iterator[_Solved]:
    stacked = torch.cat([getattr(weights, name)[members] for name in names], dim=1)
    solved = gptq(stacked, hessian_EKK, grid, damping=solving.damping, search=solving.search)
    what = "_".join(names)
    report = {
        expert: {
            "tokens": int(part.rows_C[expert - part.experts.start]),
            f"{what}_error": float(solved.error_E[i]),
            f"{what}_rtn_error": float(solved.rtn_error_E[i]),
            f"{what}_damping": float(solved.damping_E[i]),
        }
        for i, expert in enumerate(members)
    }
    height = stacked.shape[1] // len(names)
    for position, name in enumerate(names):
        own = slice(position * height, (position + 1) * height)
        yield _Solved(name, members, _rows(solved.quantized, own), report if position == 0 else {})


def _layer_means(experts: FusedExperts, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
    """Mean second moments over all experts' rows, [H, H] and [I, I], float64."""
    rows = torch.zeros((), dtype=torch.float64)
    sums: list[Tensor] = []
    for part in inputs.moments(experts, CHUNK_BYTES):
        own = (part.input_CHH.sum(0), part.activation_CII.sum(0))
        sums = [s + o for s, o in zip(sums, own, strict=True)] if sums else list(own)
        rows += part.rows_C.sum()
    read, activated = (s / float(rows.clamp_min(1)) for s in sums)
    return read, activated


def _alike(widths: Sequence[Sequence[float]], experts: range) -> dict[tuple[float, ...], list[int]]:
    """The widths of some projections → those of `experts` that have just these."""
    found: dict[tuple[float, ...], list[int]] = {}
    for expert in experts:
        found.setdefault(tuple(own[expert] for own in widths), []).append(expert)
    return dict(sorted(found.items()))


def _rows(quantized: Quantized, rows: slice) -> Quantized:
    zero = None if quantized.zero is None else quantized.zero[:, rows]
    return Quantized(quantized.codes[:, rows], quantized.scale[:, rows], zero, quantized.grid)
