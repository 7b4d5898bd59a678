"""Factors moved from experts' up projections to their down projections, so that the latter lose less when quantized.

Contract: where activations are proportional to what the up projection gives, a factor c > 0 per neuron can move:
(up / c, down · c) computes what (up, down) did. Scales are per row, so what quantizing up loses doesn't change; columns
of down that read strong neurons get larger, so their grid is finer for what they are. Everything is folded into the
weights: any format has it.

Whether activations are proportional is measured on the class's own arithmetic; where they aren't, nothing is done and
the reason is returned.

Source: AWQ (Lin et al. 2023, arXiv 2306.00978), Eq. 4 and 5: c = s^α with s the neuron's mean magnitude, α by grid
search. Here s is the root mean square, which the second moments have, α is each expert's own, and what is searched is
the error that the solver itself leaves in the metric of these moments. On the demo checkpoint, one α for all was best
at 1/8 of {1/8, 1/4, 3/8, 1/2, 3/4}: 1 to 3 % off that error with GPTQ at 2 and 3 bits, where 1/2 added 13 to 55 %.
Factors rounded to powers of two gained nothing.

Letters: E experts, C experts of a chunk, H hidden, I neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.model import FusedExperts

from .gptq import column_costs, gptq, shrink_hessians
from .grid import dequantize
from .hqq import half_quadratic
from .layer_rows import LayerRows
from .rtn import output_error, round_to_nearest
from .solver import SolverOptions

# Values of α. Of those that leave the same the first is taken, so nothing is done for nothing.
POWERS = (0.0, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)


def smooth_neurons(
    experts: FusedExperts,
    width_E: Sequence[float],
    options: SolverOptions,
    inputs: BlockInputs,
    memory_limit: int,
) -> list[float] | str:
    """Change up and down projections of a layer in place, for down projections at these widths.

    Returns α of every expert, or why nothing was changed.
    """
    if reason := obstacle(experts):
        return reason
    weights = experts.weights()
    ((power_E, factor_EI),) = neuron_factors(experts, [width_E], options, inputs, memory_limit)
    for expert, factor_I in enumerate(factor_EI):
        up, down = weights.up[expert], weights.down[expert]
        up.copy_(up.float() / factor_I.unsqueeze(1))
        down.copy_(scaled(down, factor_I))
        if weights.up_bias is not None:
            weights.up_bias[expert].copy_(weights.up_bias[expert].float() / factor_I)
    return power_E


def neuron_factors(
    experts: FusedExperts,
    width_WE: Sequence[Sequence[float]],
    options: SolverOptions,
    inputs: BlockInputs,
    memory_limit: int,
    *,
    foreseen: bool = False,
) -> list[tuple[list[float], Tensor]]:
    """For each assignment of widths to down projections: α of every expert, its neurons' factors [E, I], float32.

    `foreseen`: by what GPTQ is foreseen to leave, which takes far less than running it.
    """
    weights, layer = experts.weights(), LayerRows(experts, inputs, options.hessian)
    _, mean_II = layer.means()
    ones_EI = torch.ones(weights.down.shape[::2], device=weights.down.device)
    found = [([0.0] * experts.num_experts, ones_EI.clone()) for _ in width_WE]
    for rows in layer.parts(memory_limit):
        exact = weights.part(rows.experts)
        activation_RI = experts.activations_with(exact, rows.input_RH, rows.dispatch)
        moment_CII = shrink_hessians(rows.moment(activation_RI), rows.evidence_C, options.shrinkage, mean_KK=mean_II)
        costs_CI = foreseen_costs(moment_CII, options) if foreseen else None
        for width_E, (power_E, factor_EI) in zip(width_WE, found, strict=True):
            for width in sorted({width_E[e] for e in rows.experts}):
                local = [c for c, e in enumerate(rows.experts) if width_E[e] == width]
                own_CI = None if costs_CI is None else costs_CI[local]
                power_C, factor_CI = factors(exact.down[local], moment_CII[local], width, options, own_CI)
                for place, power, factor_I in zip(local, power_C.tolist(), factor_CI, strict=True):
                    power_E[rows.experts.start + place] = power
                    factor_EI[rows.experts.start + place] = factor_I
    return found


def obstacle(experts: FusedExperts) -> str | None:
    """Why factors can't move in experts of this class, or None: measured on what up may give in seven magnitudes."""
    weight = experts.weights().up
    generator = torch.Generator().manual_seed(0)
    gate_RI, up_RI = torch.randn(2, 56, experts.intermediate_size, generator=generator)
    up_RI *= torch.logspace(-3, 3, 7).repeat(8)[:, None]
    gate_RI, up_RI = gate_RI.to(weight), up_RI.to(weight)

    def activation(factor: float) -> Tensor:
        scaled = factor * up_RI
        return experts.activate(experts.interleave(gate_RI, scaled) if experts.has_gate else scaled).double()

    once = activation(1)
    for factor in (0.25, 4.0):
        apart_R = (activation(factor) / factor - once).abs().amax(1) / once.abs().amax(1)  # each of one magnitude
        if not apart_R.max() < 1e-3:
            return (
                f"activations of {type(experts.module).__name__} aren't proportional to what up projections give: "
                f"from {factor:g} times that, divided by {factor:g}, they come out up to {apart_R.max():.2g} of their "
                "size apart"
            )
    return None


def factors(
    down_EHI: Tensor, moment_EII: Tensor, width: float, options: SolverOptions, costs_EI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best α of each expert [E], and its neurons' factors [E, I], float32; `costs_EI`: see quantization_error."""
    strength_EI = moment_EII.diagonal(dim1=1, dim2=2).sqrt()
    log_EI = torch.where(strength_EI > 0, strength_EI, 1).log2()
    tried = []
    for power in POWERS:
        exponent_EI = (power * (log_EI - log_EI.mean(1, keepdim=True))).clamp(-12, 12)
        tried.append(torch.where(strength_EI > 0, exponent_EI, 0).exp2())
    error_PE = torch.stack(
        [quantization_error(down_EHI, moment_EII, factor_EI, width, options, costs_EI) for factor_EI in tried]
    )
    best_E = error_PE.argmin(0)  # of equal ones the first
    everyone_E = torch.arange(len(best_E), device=best_E.device)
    return torch.tensor(POWERS)[best_E.cpu()], torch.stack(tried)[best_E, everyone_E]


def scaled(weight_EOK: Tensor, factor_EK: Tensor) -> Tensor:
    """Matrices with factors, in their own dtype: what that rounds counts as error where factors are chosen."""
    return (weight_EOK.float() * factor_EK.unsqueeze(-2)).to(weight_EOK.dtype)


def foreseen_costs(moment_EKK: Tensor, options: SolverOptions) -> Tensor | None:
    """What an error in each column will cost where GPTQ makes up for it, R_jj² [E, K]; None for methods without it."""
    if options.method != "gptq":
        return None
    mean_E1 = moment_EKK.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    return column_costs(moment_EKK, options.damping)[1] * mean_E1


def quantization_error(
    weight_EOK: Tensor,
    moment_EKK: Tensor,
    factor_EK: Tensor,
    width: float,
    options: SolverOptions,
    costs_EK: Tensor | None = None,
) -> Tensor:
    """What quantizing leaves of matrices whose columns have these factors, Σ (ΔW x)², [E].

    `moment_EKK` is of what they read without the factors. GPTQ without its last sweeps; or what it is foreseen to
    leave, with `costs_EK` from `foreseen_costs`: Σ_j R_jj² ‖ΔW_j‖², ΔW of rounding to nearest with factors, divided by
    them again, for the Hessian with factors has R_jj divided by them.
    """
    value_EOK, grid = scaled(weight_EOK, factor_EK), options.grid(width)
    if costs_EK is not None:
        rounded_EOK = dequantize(round_to_nearest(value_EOK, grid, search=options.search))
        change_EOK = rounded_EOK / factor_EK.unsqueeze(1) - weight_EOK.float()
        return (change_EOK.square().sum(1) * costs_EK).sum(1, dtype=torch.float64)
    scaled_EKK = moment_EKK / (factor_EK.unsqueeze(1) * factor_EK.unsqueeze(2))
    if options.method == "gptq":
        quantized = gptq(value_EOK, scaled_EKK, grid, damping=options.damping, search=options.search).quantized
    else:
        quantize = round_to_nearest if options.method == "rtn" else half_quadratic
        quantized = quantize(value_EOK, grid, search=options.search)
    exact_EOK = weight_EOK.float() * factor_EK.unsqueeze(1)
    return output_error(exact_EOK - dequantize(quantized), scaled_EKK).sum(1)
