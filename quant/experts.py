"""Quantizing the experts of one layer at given widths, and putting packed ones in their place.

Contract: `quantize_experts` changes one block and says of every expert what it took and what error is left. Experts
that get the same width are solved in one batched call, gate and up on the one Hessian of what both read.

Letters: E experts, C experts of a chunk, H hidden, I neurons, O and K output and input features of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.errors import InputError
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock

from .compensation import compensated
from .gptq import GptqResult, gptq, shrink_hessians, shrinkage_of
from .grid import Quantized, dequantize
from .hqq import half_quadratic
from .layer_rows import LayerRows, Rows
from .low_rank import Pair, SharedSums, correction
from .packed import pack_experts
from .rotation import NO_ROTATIONS, Rotations
from .rtn import output_error, round_to_nearest
from .run_low_rank import LowRank
from .smoothing import smooth_neurons
from .solver import SolverOptions
from .stack import Stack

# Dense weights (float32) and solver workspace made at a time.
CHUNK_BYTES = 512 << 20

# Projection → the width of every expert's matrix.
Widths = dict[str, list[float]]
# Projection → the rank of what is added to every expert's matrix.
Ranks = Mapping[str, Sequence[int]]
Choices = dict[str, list[tuple[float, int]]]  # both
NO_RANKS: Ranks = MappingProxyType({})


def quantize_experts(
    block: MoEBlock,
    widths: Widths,
    options: SolverOptions,
    inputs: BlockInputs | None,
    ranks: Ranks = NO_RANKS,
    shared_rank: int = 0,
) -> list[dict[str, Any]]:
    """Quantize and pack a block's experts by the method of `options`; GPTQ and smoothing need `inputs`.

    With `ranks` (GPTQ), each matrix gets a pair of that rank which makes up for what quantizing lost; a pair of
    `shared_rank`, that all experts of a projection have in common, for what the others leave.
    Returns for every expert its `bits` by projection, what the solver says (tokens, errors, damping), and with `smooth`
    the power that was best, or why there is none.
    """
    experts = FusedExperts(block.experts_module)
    matrices: dict[str, list[tuple[list[int], Stack]]] = {}
    names = [name for name, _ in experts.weights().matrices()]
    moved = _smoothed(experts, widths, options, inputs)
    report: list[dict[str, Any]] = [{"bits": {n: widths[n][e] for n in names}} for e in range(experts.num_experts)]
    rotations = options.rotations(block.layer, experts.hidden_size, experts.intermediate_size)
    pairs: dict[str, list[tuple[list[int], Pair]]] = {}
    sums: dict[str, SharedSums] = {name: SharedSums() for name in names} if shared_rank else {}
    for solved in solve_experts(experts, widths, options, inputs, rotations, ranks, sums):
        matrices.setdefault(solved.projection, []).append((solved.experts, Stack.holding(solved.quantized)))
        if solved.pair is not None:
            pairs.setdefault(solved.projection, []).append((solved.experts, solved.pair))
        for expert, values in solved.report.items():
            report[expert].update(values)
    shared = {name: own.pair(shared_rank).stored() for name, own in sums.items()}
    added = {
        name: low_rank_of(experts.num_experts, pairs.get(name, []), shared.get(name)) for name in {**pairs, **shared}
    }
    pack_experts(block, matrices, rotations, added)
    if moved is not None:
        for expert, values in enumerate(report):
            values["smoothing"] = moved if isinstance(moved, str) else moved[expert]
    return report


def _smoothed(
    experts: FusedExperts, widths: Widths, options: SolverOptions, inputs: BlockInputs | None
) -> list[float] | str | None:
    """Move factors between projections: see smooth_neurons; None where it isn't asked for."""
    if not options.smooths_neurons:
        return None
    if inputs is None:
        raise InputError("smoothing needs what the experts read")
    return smooth_neurons(experts, widths["down"], options, inputs, CHUNK_BYTES)


def low_rank_of(experts: int, pairs: list[tuple[list[int], Pair]], shared: Pair | None) -> LowRank:
    """The module with the pairs of some experts of a projection, each with those of the same rank."""
    found = {e: (pair.left[i], pair.right[i]) for members, pair in pairs for i, e in enumerate(members)}
    ranks = [found[e][0].shape[-1] if e in found else 0 for e in range(experts)]
    routed = {}
    for rank in sorted(set(ranks) - {0}):
        lefts, rights = zip(*(found[e] for e in range(experts) if ranks[e] == rank), strict=True)
        routed[rank] = Pair(torch.stack(lefts), torch.stack(rights))
    return LowRank(ranks, routed, shared)


@dataclass(frozen=True)
class Solved:
    """One projection of some experts, quantized; what is added to it, as stored; what to say of each expert."""

    projection: str
    experts: list[int]
    quantized: Quantized
    report: dict[int, dict[str, Any]]
    pair: Pair | None = None

    def value(self, dtype: torch.dtype) -> Tensor:
        """The matrices that this stands for, but for a shared pair."""
        if self.pair is None:
            return dequantize(self.quantized, dtype)
        return (dequantize(self.quantized) + self.pair.product).to(dtype)


def solve_experts(
    experts: FusedExperts,
    widths: Widths,
    options: SolverOptions,
    inputs: BlockInputs | None,
    rotations: Rotations = NO_ROTATIONS,
    ranks: Ranks = NO_RANKS,
    sums: Mapping[str, SharedSums] = MappingProxyType({}),
) -> Iterator[Solved]:
    """Every projection of every expert by the method of `options`, some experts at a time; nothing is changed.

    With `rotations`, matrices are those to be multiplied with what is rotated so. `ranks`: see quantize_experts;
    `sums` (projection → what a shared pair follows from) take in what is left. Both need GPTQ.
    """
    if options.method != "gptq":
        return _without_data(experts, widths, options, rotations)
    if inputs is None:
        raise InputError("GPTQ needs what the experts read")
    names = [name for name, _ in experts.weights().matrices()]
    everyone = {name: ranks.get(name, [0] * experts.num_experts) for name in names}
    choices = {name: list(zip(widths[name], everyone[name], strict=True)) for name in names}
    return _by_gptq(experts, choices, options, rotations, inputs, sums)


def _without_data(
    experts: FusedExperts, widths: Widths, options: SolverOptions, rotations: Rotations
) -> Iterator[Solved]:
    weights, quantize = experts.weights(), round_to_nearest if options.method == "rtn" else half_quadratic
    sizes = [16 * weights.parameters // experts.num_experts] * experts.num_experts
    for name, stacked in weights.matrices():
        for chunk in chunks(sizes, CHUNK_BYTES):
            for (width,), members in _alike([widths[name]], chunk).items():
                value = rotations.turned(name, stacked[members])
                grid = options.grid(width)
                yield Solved(name, members, quantize(value, grid, search=options.search), {})


def _by_gptq(
    experts: FusedExperts,
    choices: Choices,
    options: SolverOptions,
    rotations: Rotations,
    inputs: BlockInputs,
    sums: Mapping[str, SharedSums],
) -> Iterator[Solved]:
    weights, layer = experts.weights(), LayerRows(experts, inputs, options.hessian)
    mean_HH, mean_II = (
        rotations.of_moment(name, mean) for name, mean in zip(("up", "down"), layer.means(), strict=True)
    )
    inward = [name for name, _ in weights.matrices() if name != "down"]
    for rows in layer.parts(CHUNK_BYTES):
        exact = weights.part(rows.experts)
        # Both sides of a product are rotated, so activations are what they were.
        input_RH = rotations.turned("up", rows.input_RH)
        exact = replace(exact, **{name: rotations.turned(name, getattr(exact, name)) for name in inward})
        hessian_CHH = shrink_hessians(rows.moment(input_RH), rows.evidence_C, options.shrinkage, mean_KK=mean_HH)
        coarse = {name: getattr(exact, name).clone() for name in inward} if options.compensate else {}
        for solved in _solve(inward, exact, hessian_CHH, rows, choices, options, sums):
            if options.compensate:
                value = coarse[solved.projection]
                value[[e - rows.experts.start for e in solved.experts]] = solved.value(value.dtype)
            yield solved
        del hessian_CHH
        exact_RI = experts.activations_with(exact, input_RH, rows.dispatch)
        read_RI = exact_RI
        if options.compensate:
            read_RI = experts.activations_with(replace(exact, **coarse), input_RH, rows.dispatch)
        exact_RI, read_RI = (rotations.turned("down", rows_RI) for rows_RI in (exact_RI, read_RI))
        exact = replace(exact, down=rotations.turned("down", exact.down))
        hessian_CII = shrink_hessians(rows.moment(read_RI), rows.evidence_C, options.shrinkage, mean_KK=mean_II)
        if options.compensate:
            # Over the same number of tokens as the shrunk Hessian.
            cross_CII = rows.moment(exact_RI - read_RI, read_RI)
            counted_C = rows.evidence_C + shrinkage_of(options.shrinkage, cross_CII.shape[-1])
            cross_CII /= counted_C.clamp_min(1e-9).to(cross_CII)[:, None, None]
            exact = replace(exact, down=compensated(exact.down, hessian_CII, cross_CII, options.damping))
            del cross_CII
        yield from _solve(["down"], exact, hessian_CII, rows, choices, options, sums)


def _solve(
    names: Sequence[str],
    weights: ExpertWeights,
    hessian_CKK: Tensor,
    rows: Rows,
    choices: Choices,
    options: SolverOptions,
    sums: Mapping[str, SharedSums],
) -> Iterator[Solved]:
    """Projections of a chunk of experts, all of which read what `hessian_CKK` is of."""
    for alike, members in _alike([choices[n] for n in names], rows.experts).items():
        local = [e - rows.experts.start for e in members]
        # Matrices that read the same and get the same width are one matrix with more rows.
        for own in [names] if len(set(alike)) == 1 else [[name] for name in names]:
            stacked = torch.cat([getattr(weights, name)[local] for name in own], dim=1)
            width, rank = choices[own[0]][members[0]]
            solved, pairs = _corrected(stacked, hessian_CKK[local], width, rank, len(own), options)
            what = "_".join(own)
            report = {
                expert: {
                    "tokens": int(rows.seen_C[place]),
                    f"{what}_error": float(solved.error_E[i]),
                    f"{what}_rtn_error": float(solved.rtn_error_E[i]),
                    f"{what}_damping": float(solved.damping_E[i]),
                    **({f"{what}_rank": rank} if rank else {}),
                }
                for i, (expert, place) in enumerate(zip(members, local, strict=True))
            }
            height = stacked.shape[1] // len(own)
            for position, name in enumerate(own):
                part = slice(position * height, (position + 1) * height)
                said = report if position == 0 else {}
                found = Solved(name, members, _rows(solved.quantized, part), said, pairs[position] if rank else None)
                if name in sums:
                    error = stacked[:, part].float() - found.value(torch.float32)
                    sums[name].add(error, hessian_CKK[local], rows.evidence_C[local])
                yield found


def _corrected(
    weight_EOK: Tensor, hessian_EKK: Tensor, width: float, rank: int, parts: int, options: SolverOptions
) -> tuple[GptqResult, list[Pair]]:
    """Matrices quantized, and the pair of each of the equal `parts` of their rows; errors are what both leave."""

    def quantized(target_EOK: Tensor) -> GptqResult:
        return gptq(
            target_EOK,
            hessian_EKK,
            options.grid(width),
            damping=options.damping,
            sweeps=options.sweeps,
            search=options.search,
        )

    solved = quantized(weight_EOK)
    if not rank:
        return solved, []
    for turn in range(options.low_rank_rounds):
        error_EOK = weight_EOK.float() - dequantize(solved.quantized)
        pairs = [correction(part, hessian_EKK, rank).stored() for part in error_EOK.chunk(parts, dim=1)]
        added_EOK = torch.cat([pair.product for pair in pairs], dim=1)
        if turn + 1 < options.low_rank_rounds:
            solved = quantized(weight_EOK - added_EOK)
    error_E = output_error(error_EOK - added_EOK, hessian_EKK).sum(1)
    return replace(solved, error_E=error_E), pairs


def _alike(choices: Sequence[Sequence[Any]], experts: range) -> dict[tuple[Any, ...], list[int]]:
    """The choices of some projections → those of `experts` that have just these."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for expert in experts:
        found.setdefault(tuple(own[expert] for own in choices), []).append(expert)
    return dict(sorted(found.items()))


def _rows(quantized: Quantized, rows: slice) -> Quantized:
    zero = None if quantized.zero is None else quantized.zero[:, rows]
    return Quantized(quantized.codes[:, rows], quantized.scale[:, rows], zero, quantized.grid)
