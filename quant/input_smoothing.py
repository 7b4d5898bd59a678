"""Factors moved from the norm before a block to what reads it, so that gate and up lose less when they are quantized.

Contract: all that reads the norm's output (router, experts, shared experts) shares one factor s > 0 per channel: the
norm's output is divided by s, their columns are multiplied with it, and the model computes what it did
(compress/model/reading.py finds the norm and who reads it, and moves). Channels that are read strongly then have larger
columns, on which the same rounding loses less, and activations have fewer outliers. Everything is folded into ordinary
tensors: any format has it.

Source: EAQuant (arXiv 2506.13329), whose rule is SmoothQuant's (arXiv 2211.10438, Eq. 4) for every branch b (an expert,
the router, another reader): s_b = max|x|^a / max|W|^(1-a), over the rows that b reads and over b's output features.
Merged over branches: the largest. Here s_b is divided by its geometric mean over channels first (branches then differ
by their channels, not by their sizes), a is searched for each layer, with s = 1 among what is tried, and the geometric
mean over branches takes the place of the largest: it left a little less on the demo checkpoint (docs/allocation.md).

Letters: E experts, C experts of a chunk, R rows by expert, B branches, P factors tried, H hidden, I neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.errors import RecipeError
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.dispatch import grouped_linear
from moe_compress.model.reading import Reads, movable, move_factors
from moe_compress.model.shape import ModelShape

from .gptq import shrink_hessians
from .layer_rows import LayerRows
from .smoothing import foreseen_costs, quantization_error
from .solver import InputSmoothing, SolverOptions

# Values of a. Of those that leave the same the first is taken, and before them s = 1.
EXPONENTS = (0.2, 0.35, 0.5, 0.65, 0.8)
# Rules between router and experts that don't look at what experts read.
_BLIND_RULES = frozenset({"top_k", "top_p", "capacity", "remap"})

Merge = Literal["max", "mean"]


def unreachable(shape: ModelShape) -> dict[int, str]:
    """Layer → why factors can't move into the norm before its block; none of those where they can."""
    why = {i: _obstacle(layer.rules, shape.reads[i]) for i, layer in shape.layers.items()}
    return {index: reason for index, reason in why.items() if reason is not None}


def unmovable(block: MoEBlock) -> str | None:
    """Why factors can't move into the norm before a block, or None."""
    return _obstacle([rule.kind for rule in block.rules], block.reads)


def _obstacle(rules: Iterable[str], reads: Reads | str) -> str | None:
    """Why factors can't move out of the norm before a block with rules of these kinds, or None."""
    if seeing := sorted(set(rules) - _BLIND_RULES):
        return f"its rule {seeing[0]} reads what its experts read"
    return reads if isinstance(reads, str) else None


def check_reachable(step: str, shape: ModelShape) -> None:
    """Raise RecipeError where no layer's factors can move."""
    why = unreachable(shape)
    if len(why) == len(shape.layers):
        index, reason = next(iter(why.items()))
        raise RecipeError(
            f"{step}: `smooth` can't change what experts of this model read: layer {index}: {reason}; set "
            "`smooth: none` or `smooth: neurons`"
        )


def left_out(shape: ModelShape) -> list[str]:
    """A note for every reason why layers stay as they are."""
    layers: dict[str, list[int]] = {}
    for index, reason in unreachable(shape).items():
        layers.setdefault(reason, []).append(index)
    return [f"what experts of layers {own} read isn't smoothed: {reason}" for reason, own in layers.items()]


def smooth_inputs(
    block: MoEBlock, options: InputSmoothing, inputs: BlockInputs, errors: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Move the best factors of those tried into a layer, in place: what `Pass.prepare` does and returns.

    Args:
        block: router and experts, dense, with the decoder layer live.
        options: how factors are found.
        inputs: what the block reads.
        errors: factors [P, H], the first all 1 → what quantizing the block with each leaves, [P].

    Returns `input_smoothing`: the `exponent` (None: factors of 1 were best), `factors`: the smallest and the largest,
    `error_before` and `error_after`; or why nothing was done.
    """
    reads, why = block.reads, unmovable(block)
    if isinstance(reads, str) or why is not None:
        return {"input_smoothing": why}
    factor_PH = tried_factors(block, options, inputs)
    error_P = errors(factor_PH)
    best = best_factors(error_P, options)
    report = {"error_before": float(error_P[0]), "error_after": float(error_P[best])}
    if best == 0:
        return {"input_smoothing": {"exponent": None, "factors": [1.0, 1.0], **report}}
    moved_H = move_factors(block, reads, factor_PH[best], inputs.stored)
    factors = [float(moved_H.min()), float(moved_H.max())]
    return {"input_smoothing": {"exponent": _exponents(options)[best - 1], "factors": factors, **report}}


def tried_factors(block: MoEBlock, options: InputSmoothing, inputs: BlockInputs) -> Tensor:
    """All 1, and what each exponent gives, as the norm will be rounded: [P, H] float64; `unmovable` must be None."""
    reads = block.reads
    assert not isinstance(reads, str)
    read_BH, weight_BH = magnitudes(block, reads, inputs)
    tried = [merged(read_BH, weight_BH, a, options.smooth_merge) for a in _exponents(options)]
    rounded = [movable(block, reads, factor_H, inputs.stored).to(factor_H) for factor_H in tried]
    return torch.stack([torch.ones_like(tried[0]), *rounded])


def best_factors(error_P: Tensor, options: InputSmoothing) -> int:
    """Which of `tried_factors` to take, by what quantizing leaves with each."""
    return int(error_P.argmin()) if options.smooth_exponent is None else 1


def _exponents(options: InputSmoothing) -> tuple[float, ...]:
    return EXPONENTS if options.smooth_exponent is None else (options.smooth_exponent,)


def merged(read_BH: Tensor, weight_BH: Tensor, exponent: float, merge: Merge) -> Tensor:
    """One factor per channel [H] of all branches that read anything; 1 for channels that are silent or unread."""
    alive_B = read_BH.amax(1) > 0
    read_BH, weight_BH = read_BH[alive_B].double(), weight_BH[alive_B].double()
    if not alive_B.any():
        return read_BH.new_ones(read_BH.shape[1])
    used_BH = (read_BH > 0) & (weight_BH > 0)
    log_BH = exponent * read_BH.clamp_min(1e-30).log2() - (1 - exponent) * weight_BH.clamp_min(1e-30).log2()
    count_B1 = used_BH.sum(1, keepdim=True).clamp_min(1)
    log_BH = log_BH - torch.where(used_BH, log_BH, 0).sum(1, keepdim=True) / count_B1
    used_H = used_BH.any(0)
    if merge == "max":
        log_H = torch.where(used_BH, log_BH, -torch.inf).amax(0)
    else:
        log_H = torch.where(used_BH, log_BH, 0).sum(0) / used_BH.sum(0).clamp_min(1)
    log_H = torch.where(used_H, log_H, 0)
    log_H = torch.where(used_H, log_H - log_H.sum() / used_H.sum().clamp_min(1), 0)
    return log_H.clamp(-12, 12).exp2()


def magnitudes(block: MoEBlock, reads: Reads, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
    """Largest magnitude of what each branch reads, and of its weights, by channel: [B, H] both, experts first.

    An expert reads its tokens, everybody else all, but for tokens that weigh nothing. A matrix with fewer outputs than
    there are experts is no branch: it gates, and the largest of one or two weights says nothing.
    """
    experts = FusedExperts(block.experts_module)
    hidden_TH, counted_T = inputs.hidden_TH.abs(), inputs.token_weight_T
    if counted_T is not None:
        hidden_TH = torch.where(counted_T.to(hidden_TH.device).unsqueeze(1) > 0, hidden_TH, 0)
    read_EH = hidden_TH.new_zeros(experts.num_experts, hidden_TH.shape[1])
    served_TK = (inputs.weight_TK != 0) & (inputs.index_TK < experts.num_experts)
    for slot in range(inputs.index_TK.shape[1]):
        served_T = served_TK[:, slot]
        where_TH = inputs.index_TK[served_T, slot].unsqueeze(1).expand(-1, hidden_TH.shape[1])
        read_EH.scatter_reduce_(0, where_TH, hidden_TH[served_T], "amax")
    inward = [value for name, value in experts.weights().matrices() if name != "down"]
    weight_EH = torch.stack([value.abs().amax(1).float() for value in inward]).amax(0)
    others = []
    for name, dim in reads.readers.items():
        weight_OH = block.module.get_parameter(name).detach().movedim(dim, -1).flatten(0, -2)
        if len(weight_OH) >= experts.num_experts:
            others.append(weight_OH.abs().amax(0).float())
    every_H = hidden_TH.amax(0)
    read_BH = torch.stack([*read_EH.float(), *([every_H.float()] * len(others))])
    return read_BH, torch.stack([value.to(read_BH.device) for value in (*weight_EH, *others)])


def input_errors(
    block: MoEBlock,
    factor_PH: Tensor,
    widths: Sequence[Mapping[str, Sequence[float]]],
    options: SolverOptions,
    inputs: BlockInputs,
    memory_limit: int,
    *,
    foreseen: bool = False,
) -> Tensor:
    """What quantizing gate and up of all experts leaves with each of these factors, for each of some assignments of
    widths, [W, P] float64.

    Per expert it is what the solver minimises (its shrunk Hessian, GPTQ without its last sweeps), times the weight
    that all of its rows have together. `foreseen`: what GPTQ is foreseen to leave, far less work than running it.
    """
    experts = FusedExperts(block.experts_module)
    weights, layer = experts.weights(), LayerRows(experts, inputs, options.hessian)
    mean_HH, _ = layer.means()
    mass_E = torch.zeros(experts.num_experts, dtype=torch.float64, device=layer.weight_R.device)
    mass_E.index_add_(0, layer.dispatch.expert_R, layer.weight_R)
    error_WP = torch.zeros(len(widths), len(factor_PH), dtype=torch.float64)
    inward = [name for name, _ in weights.matrices() if name != "down"]
    for rows in layer.parts(memory_limit):
        exact = weights.part(rows.experts)
        moment_CHH = shrink_hessians(rows.moment(rows.input_RH), rows.evidence_C, options.shrinkage, mean_KK=mean_HH)
        costs_CH = foreseen_costs(moment_CHH, options) if foreseen else None
        mass_C = mass_E[rows.experts.start : rows.experts.stop]
        for error_P, own_widths in zip(error_WP, widths, strict=True):
            assigned = [tuple(own_widths[name][e] for name in inward) for e in rows.experts]
            for chosen in sorted(set(assigned)):
                local = [c for c, own in enumerate(assigned) if own == chosen]
                own_CH = None if costs_CH is None else costs_CH[local]
                # Matrices that read the same and get the same width are one matrix with more rows.
                for own in [inward] if len(set(chosen)) == 1 else [[name] for name in inward]:
                    width = chosen[inward.index(own[0])]
                    value_CIH = torch.cat([getattr(exact, name)[local] for name in own], dim=1)
                    for number, factor_H in enumerate(factor_PH):
                        factor_CH = factor_H.to(value_CIH.device, torch.float32).expand(len(local), -1)
                        error_C = quantization_error(value_CIH, moment_CHH[local], factor_CH, width, options, own_CH)
                        error_P[number] += float((error_C * mass_C[local]).sum())
    return error_WP


def scheme_errors(
    block: MoEBlock,
    factor_PH: Tensor,
    inputs: BlockInputs,
    stored: Callable[[Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    memory_limit: int,
) -> Tensor:
    """What is left of the products of gate and up where weights and what they read are quantized, [P] float64.

    Σ over rows of g² ‖Ŵ x̂ − W x‖², g the row's routing weight relative to their mean.

    Args:
        block: router and experts.
        factor_PH: see `input_errors`.
        inputs: what the block reads.
        stored: matrices [C, I, H] → what is stored of them, dequantized.
        read: rows [R, H] → what a server makes of them, dequantized.
        memory_limit: bytes that a chunk of experts may take.
    """
    experts = FusedExperts(block.experts_module)
    weights, layer = experts.weights(), LayerRows(experts, inputs, "gate_squared")
    error_P = torch.zeros(len(factor_PH), dtype=torch.float64)
    for rows in layer.parts(memory_limit):
        part, input_RH = weights.part(rows.experts), rows.input_RH.float()
        weight_R = layer.weight_R[layer.dispatch.part(rows.experts)[0]]
        for name, value_CIH in part.matrices():
            if name == "down":
                continue
            exact_RI = grouped_linear(input_RH, value_CIH.float(), rows.dispatch.offsets_E)
            for number, factor_H in enumerate(factor_PH.to(input_RH)):
                matrices_CIH = stored(value_CIH.float() * factor_H)
                product_RI = grouped_linear(read(input_RH / factor_H), matrices_CIH, rows.dispatch.offsets_E)
                error_P[number] += float(((product_RI - exact_RI).square().sum(1) * weight_R).sum())
    return error_P
