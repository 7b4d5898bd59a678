"""Quantizing the experts of one layer at given widths, and putting packed ones in their place.

Contract: `quantize_experts` changes one block and says of every expert what it took and what error is left. Experts
that get the same width are solved in one batched call, gate and up on the one Hessian of what both read.

Letters: E experts, C experts of a chunk, H hidden, I neurons, O and K output and input features of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.errors import InputError
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock

from .compensation import compensated
from .gptq import gptq, shrink_hessians, shrinkage_of
from .grid import Quantized, dequantize
from .hqq import half_quadratic
from .layer_rows import LayerRows, Rows
from .packed import Stack, pack_experts
from .rotation import Rotation
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
    rotation = options.rotation(block.layer, experts.intermediate_size)
    for solved in solve_experts(experts, widths, options, inputs, rotation):
        matrices.setdefault(solved.projection, []).append((solved.experts, Stack.holding(solved.quantized)))
        for expert, values in solved.report.items():
            report[expert].update(values)
    pack_experts(block, matrices, rotation)
    return report


@dataclass(frozen=True)
class Solved:
    """One projection of some experts, quantized; what to say of each expert."""

    projection: str
    experts: list[int]
    quantized: Quantized
    report: dict[int, dict[str, Any]]


def solve_experts(
    experts: FusedExperts,
    widths: Widths,
    options: SolverOptions,
    inputs: BlockInputs | None,
    rotation: Rotation | None = None,
) -> Iterator[Solved]:
    """Every projection of every expert by the method of `options`, some experts at a time; nothing is changed.

    With a `rotation`, down projections are those to be multiplied with rotated activations.
    """
    if options.method != "gptq":
        return _without_data(experts, widths, options, rotation)
    if inputs is None:
        raise InputError("GPTQ needs what the experts read")
    return _by_gptq(experts, widths, options, rotation, inputs)


def _without_data(
    experts: FusedExperts, widths: Widths, options: SolverOptions, rotation: Rotation | None
) -> Iterator[Solved]:
    weights, quantize = experts.weights(), round_to_nearest if options.method == "rtn" else half_quadratic
    sizes = [16 * weights.parameters // experts.num_experts] * experts.num_experts
    for name, stacked in weights.matrices():
        for chunk in chunks(sizes, CHUNK_BYTES):
            for (width,), members in _alike([widths[name]], chunk).items():
                value = stacked[members]
                if name == "down" and rotation is not None:
                    value = rotation(value.float())
                grid = options.grid(width)
                yield Solved(name, members, quantize(value, grid, search=options.search), {})


def _by_gptq(
    experts: FusedExperts, widths: Widths, options: SolverOptions, rotation: Rotation | None, inputs: BlockInputs
) -> Iterator[Solved]:
    weights, layer = experts.weights(), LayerRows(experts, inputs, options.hessian)
    mean_HH, mean_II = layer.means()
    if rotation is not None:
        mean_II = rotation.both_sides(mean_II)
    inward = [name for name, _ in weights.matrices() if name != "down"]
    for rows in layer.parts(CHUNK_BYTES):
        exact = weights.part(rows.experts)
        hessian_CHH = shrink_hessians(rows.moment(rows.input_RH), rows.evidence_C, options.shrinkage, mean_KK=mean_HH)
        coarse = dict(exact.items())
        for solved in _solve(inward, exact, hessian_CHH, rows, widths, options):
            if options.compensate:
                value = coarse[solved.projection].clone()
                value[[e - rows.experts.start for e in solved.experts]] = dequantize(solved.quantized, value.dtype)
                coarse[solved.projection] = value
            yield solved
        del hessian_CHH
        exact_RI = experts.activations_with(exact, rows.input_RH, rows.dispatch)
        read_RI = exact_RI
        if options.compensate:
            read_RI = experts.activations_with(ExpertWeights(**coarse), rows.input_RH, rows.dispatch)
        if rotation is not None:
            exact_RI, read_RI = rotation(exact_RI.float()), rotation(read_RI.float())
            exact = replace(exact, down=rotation(exact.down.float()))
        hessian_CII = shrink_hessians(rows.moment(read_RI), rows.evidence_C, options.shrinkage, mean_KK=mean_II)
        if options.compensate:
            # Over the same number of tokens as the shrunk Hessian.
            cross_CII = rows.moment(exact_RI - read_RI, read_RI)
            counted_C = rows.evidence_C + shrinkage_of(options.shrinkage, cross_CII.shape[-1])
            cross_CII /= counted_C.clamp_min(1e-9).to(cross_CII)[:, None, None]
            exact = replace(exact, down=compensated(exact.down, hessian_CII, cross_CII, options.damping))
            del cross_CII
        yield from _solve(["down"], exact, hessian_CII, rows, widths, options)


def _solve(
    names: Sequence[str],
    weights: ExpertWeights,
    hessian_CKK: Tensor,
    rows: Rows,
    widths: Widths,
    options: SolverOptions,
) -> Iterator[Solved]:
    """Projections of a chunk of experts, all of which read what `hessian_CKK` is of."""
    for alike, members in _alike([widths[n] for n in names], rows.experts).items():
        local = [e - rows.experts.start for e in members]
        # Matrices that read the same and get the same width are one matrix with more rows.
        for own in [names] if len(set(alike)) == 1 else [[name] for name in names]:
            stacked = torch.cat([getattr(weights, name)[local] for name in own], dim=1)
            solved = gptq(
                stacked,
                hessian_CKK[local],
                options.grid(widths[own[0]][members[0]]),
                damping=options.damping,
                sweeps=options.sweeps,
                search=options.search,
            )
            what = "_".join(own)
            report = {
                expert: {
                    "tokens": int(rows.seen_C[place]),
                    f"{what}_error": float(solved.error_E[i]),
                    f"{what}_rtn_error": float(solved.rtn_error_E[i]),
                    f"{what}_damping": float(solved.damping_E[i]),
                }
                for i, (expert, place) in enumerate(zip(members, local, strict=True))
            }
            height = stacked.shape[1] // len(own)
            for position, name in enumerate(own):
                part = slice(position * height, (position + 1) * height)
                yield Solved(name, members, _rows(solved.quantized, part), report if position == 0 else {})


def _alike(widths: Sequence[Sequence[float]], experts: range) -> dict[tuple[float, ...], list[int]]:
    """The widths of some projections → those of `experts` that have just these."""
    found: dict[tuple[float, ...], list[int]] = {}
    for expert in experts:
        found.setdefault(tuple(own[expert] for own in widths), []).append(expert)
    return dict(sorted(found.items()))


def _rows(quantized: Quantized, rows: slice) -> Quantized:
    zero = None if quantized.zero is None else quantized.zero[:, rows]
    return Quantized(quantized.codes[:, rows], quantized.scale[:, rows], zero, quantized.grid)
