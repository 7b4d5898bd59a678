"""Quantizing the experts of one layer at given widths, and putting packed ones in their place.

Contract: `quantize_experts` changes one block and says of every expert what it took and what error is left. Experts
that get the same width are solved in one batched call, gate and up on the one Hessian of what both read.

Letters: E experts, C experts of a chunk, H hidden, I neurons, O and K output and input features of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, Moments, chunks
from moe_compress.errors import InputError
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock

from .gptq import gptq, shrink_hessians
from .grid import Grid, Quantized
from .hqq import half_quadratic
from .packed import Stack, pack_experts
from .rtn import round_to_nearest
from .solver import SolverOptions

# Dense weights (float32) and solver workspace made at a time.
CHUNK_BYTES = 512 << 20

# Projection → the width of every expert's matrix.
Widths = dict[str, list[float]]


def quantize_experts(
    block: MoEBlock, widths: Widths, options: SolverOptions, inputs: BlockInputs | None
) -> list[dict[str, Any]]:
    """Quantize and pack a block's experts by the method of `options`; GPTQ needs the block's `inputs`.

    Returns for every expert its `bits` by projection, and what the solver says (tokens, errors, damping).
    """
    experts = FusedExperts(block.experts_module)
    matrices: dict[str, list[tuple[list[int], Stack]]] = {}
    names = [name for name, _ in experts.weights().matrices()]
    report: list[dict[str, Any]] = [{"bits": {n: widths[n][e] for n in names}} for e in range(experts.num_experts)]
    for solved in solve_experts(experts, widths, options, inputs):
        matrices.setdefault(solved.projection, []).append((solved.experts, Stack.holding(solved.quantized)))
        for expert, values in solved.report.items():
            report[expert].update(values)
    pack_experts(block, matrices)
    return report


@dataclass(frozen=True)
class Solved:
    """One projection of some experts, quantized; what to say of each expert."""

    projection: str
    experts: list[int]
    quantized: Quantized
    report: dict[int, dict[str, Any]]


def solve_experts(
    experts: FusedExperts, widths: Widths, options: SolverOptions, inputs: BlockInputs | None
) -> Iterator[Solved]:
    """Every projection of every expert by the method of `options`, some experts at a time; nothing is changed."""
    if options.method != "gptq":
        return _without_data(experts, widths, options)
    if inputs is None:
        raise InputError("GPTQ needs what the experts read")
    return _by_gptq(experts, widths, options, inputs)


def _without_data(experts: FusedExperts, widths: Widths, options: SolverOptions) -> Iterator[Solved]:
    weights, quantize = experts.weights(), round_to_nearest if options.method == "rtn" else half_quadratic
    sizes = [16 * weights.parameters // experts.num_experts] * experts.num_experts
    for name, stacked in weights.matrices():
        for chunk in chunks(sizes, CHUNK_BYTES):
            for (width,), members in _alike([widths[name]], chunk).items():
                grid = options.grid(width)
                yield Solved(name, members, quantize(stacked[members], grid, search=options.search), {})


def _by_gptq(experts: FusedExperts, widths: Widths, options: SolverOptions, inputs: BlockInputs) -> Iterator[Solved]:
    weights = experts.weights()
    means = _layer_means(experts, inputs)
    inward = [name for name, _ in weights.matrices() if name != "down"]
    for part in inputs.moments(experts, CHUNK_BYTES):
        for names, moment, mean in ((inward, part.input_CHH, means[0]), (["down"], part.activation_CII, means[1])):
            for alike, members in _alike([widths[n] for n in names], part.experts).items():
                local = [e - part.experts.start for e in members]
                hessian = shrink_hessians(moment[local], part.rows_C[local], options.shrinkage, mean_KK=mean)
                # Matrices that read the same and get the same width are one matrix with more rows.
                together = [names] if len(set(alike)) == 1 else [[name] for name in names]
                for own in together:
                    grid = options.grid(widths[own[0]][members[0]])
                    yield from _solve(weights, own, members, grid, hessian, part, options)


def _solve(
    weights: ExpertWeights,
    names: Sequence[str],
    members: list[int],
    grid: Grid,
    hessian_EKK: Tensor,
    part: Moments,
    options: SolverOptions,
) -> Iterator[Solved]:
    stacked = torch.cat([getattr(weights, name)[members] for name in names], dim=1)
    solved = gptq(stacked, hessian_EKK, grid, damping=options.damping, sweeps=options.sweeps, search=options.search)
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
        yield Solved(name, members, _rows(solved.quantized, own), report if position == 0 else {})


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
