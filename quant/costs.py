"""What a width costs: functions of statistics, registered by name, each with its source.

Every cost returns one number per width of each expert [E, B], or of each matrix [E, M, B], float64: the program spends
bytes where they take most off the sum. So costs of different experts, layers and widths compare. Adding one: a function
here, or in any file, under `@cost`.

Letters: E experts, M matrices of an expert (gate, up, down; a family without gates has the last two), B widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_compress.calib.statistics import Result, Routing, Statistic
from moe_compress.errors import UnsupportedModelError
from moe_compress.model.shape import LayerShape
from moe_compress.registry import Registry

from .cost import QuantizationError
from .gain import SolverGain
from .gradient_cost import GradientError
from .gram import GramError
from .scores import BlockTurn, WeightOutliers, WeightSpectrum

if TYPE_CHECKING:
    from .options import MixedOptions

Measured = dict[str, Result]


@dataclass(frozen=True)
class Asked:
    """What is asked of a cost in one layer.

    Attributes:
        options: of the pass.
        per_matrix: whether units are smaller than an expert, so that the answer must be [E, M, B].
        index, layer: the decoder layer and its shape.
    """

    options: MixedOptions
    per_matrix: bool
    index: int
    layer: LayerShape


Needs = Callable[["MixedOptions", bool], Statistic]  # options, per_matrix → what to measure
Evaluate = Callable[[Measured, Asked], Tensor]


@dataclass(frozen=True)
class Cost:
    """A way to say what a width costs.

    Attributes:
        name, source: how recipes call it, and where it is from.
        needs: the statistics that it is computed from.
        evaluate: results by statistic name, what is asked → [E, B], or [E, M, B].
        per_matrix: whether it can say what a width costs each matrix.
        rounding: whether it is proportional to the squared error of rounding to nearest, so that what GPTQ leaves of
            that error scales it (see gain.py).
    """

    name: str
    source: str
    needs: tuple[Statistic | Needs, ...]
    evaluate: Evaluate
    per_matrix: bool = False
    rounding: bool = False

    def statistics(self, options: MixedOptions, per_matrix: bool) -> list[Statistic]:
        """What it needs under these options, first of all the solver's gain where it is scaled by it."""
        gain = [solver_gain(options)] if self.scaled(options) else []
        own = [
            s if isinstance(s, Statistic) else s(options, self.asked_per_matrix(options, per_matrix))
            for s in self.needs
        ]
        return [*gain, *own]

    def scaled(self, options: MixedOptions) -> bool:
        """Whether GPTQ's gain scales it."""
        return self.rounding and self.per_matrix and options.method == "gptq" and options.solver_gain != "none"

    def asked_per_matrix(self, options: MixedOptions, per_matrix: bool) -> bool:
        """Whether it is computed per matrix: GPTQ's gain is known so, then experts are sums over their matrices."""
        return per_matrix or self.scaled(options)

    def of(self, measured: Measured, asked: Asked) -> Tensor:
        """[E, B] or [E, M, B], scaled by what GPTQ leaves where that is known; with ranks, B are `options.choices`."""
        found = self.evaluate(measured, asked)
        if not self.scaled(asked.options):
            return found
        gain = measured["solver_gain"]
        found = found * gain["share"]
        return found if "left" not in gain else (found.unsqueeze(-1) * gain["left"].flip(-1)).flatten(-2)


COSTS = Registry[Cost]("cost", "costs")
find_cost = COSTS.find


def cost(
    name: str, source: str, *needs: Statistic | Needs, per_matrix: bool = False, rounding: bool = False
) -> Callable[[Evaluate], Evaluate]:
    """Register a cost under a name; see Cost."""

    return COSTS.adding(lambda evaluate: Cost(name, source, needs, evaluate, per_matrix, rounding))


def solver_gain(options: MixedOptions) -> Statistic:
    """What GPTQ leaves of rounding's error, foreseen or found by running it."""
    return SolverGain.of(
        options,
        damping=options.damping,
        shrinkage=options.shrinkage,
        solve=options.solver_gain == "solved",
        ranks=() if options.low_rank is None else tuple(options.low_rank.ranks),
    )


# Measured at the block's output, round-to-nearest, one expert or matrix at a time.


def quantization_error(options: MixedOptions, per_matrix: bool) -> Statistic:
    """The error on the grids that will be used."""
    return QuantizationError.of(options, per_matrix=per_matrix)


@cost(
    "relative",
    "squared error on every token relative to the hidden state that it is added to, so that layers compare",
    quantization_error,
    per_matrix=True,
    rounding=True,
)
def relative(measured: Measured, asked: Asked) -> Tensor:
    """Σ_t ‖z_t − z'_t‖² / ‖h_t‖²."""
    errors = measured["quantization_error"]
    if "relative" not in errors:
        raise UnsupportedModelError(
            f"layer {asked.index} returns no hidden state per token that errors could be compared with: set "
            "`cost: pmq` in quantize.mixed"
        )
    return errors["relative"]


@cost("squared", "squared error at the block's output", quantization_error, per_matrix=True, rounding=True)
def squared(measured: Measured, _: Asked) -> Tensor:
    """Σ_t ‖z_t − z'_t‖²."""
    return measured["quantization_error"]["squared"]


@cost(
    "norm",
    "MxMoE (arXiv 2505.05799), Δ: norm of the error at the block's output, summed over sequences",
    quantization_error,
    per_matrix=True,
)
def norm(measured: Measured, _: Asked) -> Tensor:
    """Σ over sequences of ‖Z − Z'‖_F, as PMQ's ε."""
    return measured["quantization_error"]["error"]


@cost(
    "pmq",
    "PMQ (arXiv 2410.06270), Eq. 4: φ^alpha · ω^beta · ε^gamma; pmq_variant: code: ε^alpha, as in the authors' code",
    quantization_error,
    Routing(),
)
def pmq(measured: Measured, asked: Asked) -> Tensor:
    """Frequency φ and routing weight ω sum to 1 in a layer, ε is measured (Eq. 3)."""
    options, routing = asked.options, measured["routing"]
    frequency = routing["counts"] / routing["counts"].sum().clamp_min(1)
    weight = routing["gate"] / routing["gate"].sum().clamp_min(1e-300)
    factor = frequency**options.alpha * weight**options.beta
    exponent = options.gamma if options.pmq_variant == "paper" else options.alpha
    return factor.unsqueeze(1) * measured["quantization_error"]["error"] ** exponent


def gram_error(options: MixedOptions, _: bool) -> Statistic:
    """Traces on the grids that will be used."""
    return GramError.of(options)


@cost(
    "gram",
    "tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ) of each matrix, times the size of what the expert adds relative to the hidden state: an "
    "estimate of `relative` without running candidates",
    gram_error,
    per_matrix=True,
    rounding=True,
)
def gram(measured: Measured, _: Asked) -> Tensor:
    """Relative errors of an expert's matrices add up in its output, to first order: act(gate) · up is a product."""
    traces = measured["gram_error"]
    relative_EMB = traces["error"] / traces["energy"].clamp_min(1e-300).unsqueeze(-1)
    return traces["output"].view(-1, 1, 1) * relative_EMB


# The same error, weighted by the gradient of the loss there: takes a backward sweep.


def gradient_error(options: MixedOptions, per_matrix: bool) -> Statistic:
    """The gradient-weighted error on the grids that will be used."""
    return GradientError.of(options, per_matrix=per_matrix)


@cost(
    "gradient",
    "GEMQ: error times the loss's gradient, squared channel by channel",
    gradient_error,
    per_matrix=True,
    rounding=True,
)
def gradient(measured: Measured, _: Asked) -> Tensor:
    """Σ_t Σ_i g_ti² δ_ti² / T."""
    return measured["gradient_error"]["gradient"]


@cost(
    "fisher",
    "empirical Fisher along the error that is made: (gradient · error)²",
    gradient_error,
    per_matrix=True,
    rounding=True,
)
def fisher(measured: Measured, _: Asked) -> Tensor:
    """Σ_t (g_t · δ_t)² / T."""
    return measured["gradient_error"]["fisher"]


# Scores. None of these says by itself what a width costs: the score is multiplied with the noise of a uniform
# quantizer, which falls fourfold with every bit.


def noise(asked: Asked) -> Tensor:
    """4^−b of every width b, [B]."""
    return 4.0 ** -torch.tensor(asked.options.widths, dtype=torch.float64)


@cost("random", "control: what any cost has to beat. Random importance · 4^−b")
def random(_: Measured, asked: Asked) -> Tensor:
    """Uniform noise per expert."""
    generator = torch.Generator().manual_seed(asked.options.seed * 100_003 + asked.index)
    score_E = torch.rand(asked.layer.num_experts, generator=generator, dtype=torch.float64)
    return score_E.unsqueeze(1) * noise(asked)


@cost("frequency", "control: share of a layer's choices that fall on the expert · 4^−b", Routing())
def frequency(measured: Measured, asked: Asked) -> Tensor:
    """How often an expert is chosen."""
    counts_E = measured["routing"]["counts"]
    return (counts_E / counts_E.sum().clamp_min(1)).unsqueeze(1) * noise(asked)


@cost(
    "alphaq",
    "AlphaQ (arXiv 2606.04980): (1 / alpha)^alphaq_gamma · Var(W) · 4^−b of each matrix, alpha the exponent of its "
    "heavy tail; reads weights only",
    WeightSpectrum(),
    per_matrix=True,
)
def alphaq(measured: Measured, asked: Asked) -> Tensor:
    """The paper's median of alpha in the place of 1 is a factor of the whole program, and changes no plan."""
    spectra = measured["weight_spectrum"]
    sensitivity_EM = spectra["alpha"] ** -asked.options.alphaq_gamma * spectra["variance"]
    return sensitivity_EM.unsqueeze(-1) * noise(asked)


@cost(
    "outlier",
    "QuantMoE-Bench (arXiv 2406.08155), linear weight outlier scorer: max_j (max_i |W_ij| / mean_i |W_ij|) · 4^−b of "
    "each matrix; there the matrices with the highest scores get the larger of two widths; reads weights only",
    WeightOutliers(),
    per_matrix=True,
)
def outlier(measured: Measured, asked: Asked) -> Tensor:
    """How far single weights stand out of their input channel."""
    return measured["weight_outliers"]["score"].unsqueeze(-1) * noise(asked)


@cost(
    "block_importance",
    "QuantMoE-Bench (arXiv 2406.08155), block importance: 1 − mean cosine of the hidden state before and behind the "
    "experts, · 4^−b, the same for all experts of a layer; the cosine is measured, not predicted by a network",
    BlockTurn(),
)
def block_importance(measured: Measured, asked: Asked) -> Tensor:
    """How far the layer's experts turn the hidden state, an equal share to each."""
    share = measured["block_turn"]["importance"] / asked.layer.num_experts
    return (share * noise(asked)).expand(asked.layer.num_experts, -1)
