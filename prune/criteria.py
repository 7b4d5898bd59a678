"""How much an expert matters: functions of statistics, registered by name, each with its source.

Every criterion returns one score per expert, [E] float64: the lowest go first. Adding one: a function here, or in any
file, under `@criterion`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.calib.outputs import OutputMoments, TokenContribution
from moe_compress.calib.statistics import ChosenLogits, OutputNorms, Result, Routing, Statistic
from moe_compress.counts import ExpertCounts
from moe_compress.model.shape import LayerShape
from moe_compress.registry import Registry

Measured = dict[str, Result]


@dataclass(frozen=True)
class Selection:
    """What is asked of a criterion in one layer. Most look at nothing but what was measured.

    Attributes:
        layer: its shape; with `groups`, every routing group keeps the same number.
        keep: experts that stay (with scope: global, that would stay if all layers kept the same number).
        protected: experts that stay whatever their score.
        generator: for criteria that draw.
    """

    layer: LayerShape
    keep: int
    protected: Sequence[int]
    generator: torch.Generator


Score = Callable[[Measured, Selection], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A way to score experts.

    Attributes:
        name, source: how recipes call it, and where it is from.
        statistics: what it needs; a function of the pass's options where that depends on how many experts stay.
        score: results by statistic name, what is asked → [E].
        ranks: whether its order holds for any number of experts. One that looks for the best set of
            `Selection.keep` experts gives scores for that number only, and has no part in scope: global.
        comparable: whether scores of different layers compare as they stand; otherwise scope: global compares shares of
            each layer's sum.
        problem: layer's shape, experts that stay → why it can't choose these, or None; asked before anything is
            measured.
    """

    name: str
    source: str
    statistics: tuple[Statistic | Callable[[ExpertCounts], Statistic], ...]
    score: Score
    ranks: bool = True
    comparable: bool = False
    problem: Callable[[LayerShape, int], str | None] = lambda layer, keep: None

    def measures(self, options: ExpertCounts) -> list[Statistic]:
        """The statistics that it needs under these options."""
        return [s if isinstance(s, Statistic) else s(options) for s in self.statistics]


CRITERIA = Registry[Criterion]("criterion", "criteria")
find_criterion = CRITERIA.find


def criterion(
    name: str,
    source: str,
    *statistics: Statistic | Callable[[ExpertCounts], Statistic],
    ranks: bool = True,
    comparable: bool = False,
    problem: Callable[[LayerShape, int], str | None] = lambda layer, keep: None,
) -> Callable[[Score], Score]:
    """Register a score under a name; see Criterion."""

    return CRITERIA.adding(lambda score: Criterion(name, source, statistics, score, ranks, comparable, problem))


@criterion("random", "control: what any criterion has to beat", Routing())
def random_score(measured: Measured, asked: Selection) -> Tensor:
    """Uniform noise."""
    return torch.rand(len(measured["routing"]["counts"]), generator=asked.generator, dtype=torch.float64)


# Sums over the tokens that the expert serves: a rare expert goes, however strong.


@criterion("frequency", "how often an expert is chosen, n_e; SEER-MoE's hard counting (arXiv 2404.05089)", Routing())
def frequency(measured: Measured, _: Selection) -> Tensor:
    """Tokens routed to the expert."""
    return measured["routing"]["counts"]


@criterion("gate_mass", "SEER-MoE (arXiv 2404.05089), soft counting: Σ_t g_te", Routing())
def gate_mass(measured: Measured, _: Selection) -> Tensor:
    """Routing weight that the expert received."""
    return measured["routing"]["gate"]


@criterion(
    "ean",
    "expert activation norm, a baseline in REAP (arXiv 2510.13999): Σ_t ‖f_e(x_t)‖₂ over routed tokens",
    OutputNorms(),
)
def ean(measured: Measured, _: Selection) -> Tensor:
    """Summed size of the expert's outputs."""
    return measured["output_norms"]["norm"]


@criterion(
    "weighted_ean", "REAP's numerator (arXiv 2510.13999), not divided by n_e: Σ_t g_te·‖f_e(x_t)‖₂", OutputNorms()
)
def weighted_ean(measured: Measured, _: Selection) -> Tensor:
    """Summed size of what the expert adds."""
    return measured["output_norms"]["gated_norm"]


@criterion(
    "easy_ep",
    "EASY-EP (arXiv 2504.06792): Σ_t g_te·‖f_e(x_t)‖₂·(1 − cos(h_t, h_t + y_t)), h_t the residual stream, y_t what all "
    "experts add",
    TokenContribution(),
)
def easy_ep(measured: Measured, _: Selection) -> Tensor:
    """Summed size of what the expert adds to tokens that the experts turn far."""
    return measured["token_contribution"]["turned"]


@criterion(
    "tcess",
    "PreMoe (arXiv 2505.17639), task-conditioned expected selection score: mean over all tokens of the router's logit, "
    "0 where the expert isn't chosen",
    Routing(),
    ChosenLogits(),
)
def tcess(measured: Measured, _: Selection) -> Tensor:
    """Mean logit, counted where the model itself chooses the expert. Negative logits count against it."""
    return measured["chosen_logits"]["sum"] / measured["routing"]["tokens"].clamp_min(1)


# Means over the tokens that the expert serves: a rare but strong expert stays. One that saw no token scores 0.


@criterion("reap", "REAP (arXiv 2510.13999): mean over routed tokens of g_te·‖f_e(x_t)‖₂", Routing(), OutputNorms())
def reap(measured: Measured, _: Selection) -> Tensor:
    """Mean size of what the expert adds to a token routed to it; 0 for an expert that saw none."""
    counts = measured["routing"]["counts"]
    return measured["output_norms"]["gated_norm"] / counts.clamp_min(1)


@criterion(
    "reap_l2",
    "REAP (arXiv 2510.13999) with a root mean square for the mean: √(mean over routed tokens of g_te²·‖f_e(x_t)‖₂²)",
    Routing(),
    OutputNorms(),
)
def reap_l2(measured: Measured, _: Selection) -> Tensor:
    """Root mean square of what the expert adds to a token routed to it."""
    counts = measured["routing"]["counts"]
    return (measured["output_norms"]["gated_norm_squared"] / counts.clamp_min(1)).sqrt()


@criterion(
    "man", "mean activation norm (arXiv 2606.15716): mean over routed tokens of ‖f_e(x_t)‖₂", Routing(), OutputNorms()
)
def man(measured: Measured, _: Selection) -> Tensor:
    """Mean size of the expert's outputs."""
    return measured["output_norms"]["norm"] / measured["routing"]["counts"].clamp_min(1)


@criterion(
    "msan", "mean squared activation norm (arXiv 2606.15716): mean over routed tokens of ‖f_e(x_t)‖₂²", OutputMoments()
)
def msan(measured: Measured, _: Selection) -> Tensor:
    """Mean squared size of the expert's outputs."""
    moments = measured["output_moments"]
    return moments["squares"].sum(dim=1) / moments["counts"].clamp_min(1)


@criterion(
    "mone",
    "MoNE (arXiv 2507.00390): ‖√Var_t f_e(x_t)‖₂ over routed tokens, times the mean over all tokens of g_te; pruned "
    "experts are replaced by their mean output with replace: mean, removed without",
    Routing(),
    OutputMoments(),
)
def mone(measured: Measured, _: Selection) -> Tensor:
    """How far the expert is from a constant, and how much routing weight it gets."""
    moments, routing = measured["output_moments"], measured["routing"]
    counts = moments["counts"].clamp_min(1).unsqueeze(1)
    variance_EH = (moments["squares"] / counts - (moments["sum"] / counts).square()).clamp_min(0)
    return variance_EH.sum(dim=1).sqrt() * routing["gate"] / routing["tokens"].clamp_min(1)


@criterion(
    "max_activation",
    "largest |f_e| over tokens and channels: what marks super experts (arXiv 2507.23279)",
    OutputNorms(),
)
def max_activation(measured: Measured, _: Selection) -> Tensor:
    """Largest channel of the expert's outputs."""
    return measured["output_norms"]["maximum"]
