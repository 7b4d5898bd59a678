"""How much an expert matters: functions of statistics, registered by name, each with its source.

Every criterion returns one score per expert, [E] float64: the lowest go first. Adding one: a function here, or in any
file, under `@criterion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.calib.statistics import OutputNorms, Result, Routing, Statistic
from moe_compress.errors import RecipeError, nearest

Measured = dict[str, Result]


@dataclass(frozen=True)
class Criterion:
    """A way to score experts.

    Attributes:
        name, source: how recipes call it, and where it is from.
        statistics: what it needs.
        score: results by statistic name, generator → [E].
    """

    name: str
    source: str
    statistics: tuple[Statistic, ...]
    score: Callable[[Measured, torch.Generator], Tensor]


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, source: str, *statistics: Statistic
) -> Callable[[Callable[[Measured, torch.Generator], Tensor]], Callable[[Measured, torch.Generator], Tensor]]:
    """Register a score under a name."""

    def add(score: Callable[[Measured, torch.Generator], Tensor]) -> Callable[[Measured, torch.Generator], Tensor]:
        CRITERIA[name] = Criterion(name, source, statistics, score)
        return score

    return add


def find_criterion(name: str) -> Criterion:
    """The criterion of that name. Raises RecipeError with the nearest there is."""
    if name not in CRITERIA:
        raise RecipeError(f"no criterion is called {name!r}{nearest(name, CRITERIA)}")
    return CRITERIA[name]


@criterion("random", "control: what any criterion has to beat", Routing())
def random_score(measured: Measured, generator: torch.Generator) -> Tensor:
    """Uniform noise."""
    return torch.rand(len(measured["routing"]["counts"]), generator=generator, dtype=torch.float64)


@criterion("frequency", "how often an expert is chosen, n_e", Routing())
def frequency(measured: Measured, _: torch.Generator) -> Tensor:
    """Tokens routed to the expert."""
    return measured["routing"]["counts"]


@criterion("gate_mass", "SEER-MoE (arXiv 2404.05089), soft counting: Σ_t g_te", Routing())
def gate_mass(measured: Measured, _: torch.Generator) -> Tensor:
    """Routing weight that the expert received."""
    return measured["routing"]["gate"]


@criterion(
    "ean",
    "expert activation norm, a baseline in REAP (arXiv 2510.13999): Σ_t ‖f_e(x_t)‖₂ over routed tokens",
    OutputNorms(),
)
def ean(measured: Measured, _: torch.Generator) -> Tensor:
    """Summed size of the expert's outputs."""
    return measured["output_norms"]["norm"]


@criterion("reap", "REAP (arXiv 2510.13999): mean over routed tokens of g_te·‖f_e(x_t)‖₂", Routing(), OutputNorms())
def reap(measured: Measured, _: torch.Generator) -> Tensor:
    """Mean size of what the expert adds to a token routed to it; 0 for an expert that saw none."""
    counts = measured["routing"]["counts"]
    return measured["output_norms"]["gated_norm"] / counts.clamp_min(1)
