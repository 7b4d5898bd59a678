"""How much a neuron of an expert matters: functions of statistics, registered by name, each with its source.

Every criterion returns one score per neuron, [E, I] float64: the lowest go first. Adding one: a function here, or in
any file, under `@neuron_criterion`. Shared experts are left as they are, whatever a paper does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.calib.neurons import NeuronGradients, NeuronProjections, NeuronRemoval, NeuronSums, NeuronWeights
from moe_compress.calib.statistics import Statistic
from moe_compress.registry import Registry

from .criteria import Measured

NeuronScore = Callable[[Measured, torch.Generator], Tensor]


@dataclass(frozen=True)
class NeuronCriterion:
    """A way to score neurons.

    Attributes:
        name, source: how recipes call it, and where it is from.
        statistics: what it needs.
        score: results by statistic name, a generator for what draws → [E, I].
        comparable: whether scores of different layers compare as they stand; otherwise a choice across layers compares
            shares of each layer's sum.
        signed: whether scores may be negative; shares of a sum then say nothing, so no choice across layers can be
        made.
    """

    name: str
    source: str
    statistics: tuple[Statistic, ...]
    score: NeuronScore
    comparable: bool = False
    signed: bool = False


NEURON_CRITERIA = Registry[NeuronCriterion]("criterion of neurons", "criteria of neurons")
find_neuron_criterion = NEURON_CRITERIA.find


def neuron_criterion(
    name: str, source: str, *statistics: Statistic, comparable: bool = False, signed: bool = False
) -> Callable[[NeuronScore], NeuronScore]:
    """Register a score under a name; see NeuronCriterion."""

    return NEURON_CRITERIA.adding(lambda score: NeuronCriterion(name, source, statistics, score, comparable, signed))


@neuron_criterion("random", "control: what any criterion has to beat", NeuronWeights(), comparable=True)
def random_neurons(measured: Measured, generator: torch.Generator) -> Tensor:
    """Uniform noise."""
    shape = measured["neuron_weights"]["down"].shape
    return torch.rand(shape, generator=generator, dtype=torch.float64)


@neuron_criterion("magnitude", "size of a neuron's weights, ‖gate‖² + ‖up‖² + ‖down‖²; reads no text", NeuronWeights())
def magnitude(measured: Measured, _: torch.Generator) -> Tensor:
    """Squared size of the neuron's rows and column."""
    return measured["neuron_weights"]["whole"]


@neuron_criterion("output", "energy that the neuron adds to the block: Σ_t (g·a)²·‖w‖²", NeuronWeights(), NeuronSums())
def output(measured: Measured, _: torch.Generator) -> Tensor:
    """Squared size of what the neuron adds, over routed tokens: CAMERA with λ = 0."""
    return measured["neuron_weights"]["down"] * measured["neuron_sums"]["gated_squares"]


@neuron_criterion(
    "camera",
    "CAMERA-P (arXiv 2508.02322), λ = 0.9: ‖w‖²·((1 − λ)·Σ_t (g·a)² + λ·max_t (g·a)²)",
    NeuronWeights(),
    NeuronSums(),
)
def camera(measured: Measured, _: torch.Generator) -> Tensor:
    """Mostly the largest single contribution of the neuron."""
    sums = measured["neuron_sums"]
    return measured["neuron_weights"]["down"] * (0.1 * sums["gated_squares"] + 0.9 * sums["gated_maximum"])


@neuron_criterion(
    "tenp",
    "TENP (arXiv 2606.09885): mean over routed tokens of ⟨a·w, f⟩/‖f‖; its rule which experts stay whole is not here",
    NeuronProjections(),
    signed=True,
)
def tenp(measured: Measured, _: torch.Generator) -> Tensor:
    """How far the neuron goes in the direction of its expert's output; negative where it works against it."""
    found = measured["neuron_projections"]
    return found["projected"] / found["counts"].clamp_min(1).unsqueeze(1)


@neuron_criterion(
    "heapr",
    "HEAPr (arXiv 2509.22299): ½·E[a²]·wᵀ G w, G = E[δ δᵀ] of the loss's gradients δ at the expert's output, E over "
    "routed tokens",
    NeuronGradients(),
    comparable=True,
)
def heapr(measured: Measured, _: torch.Generator) -> Tensor:
    """Second-order loss per token routed to the expert, activations and gradients taken for independent."""
    found = measured["neuron_gradients"]
    return 0.5 * found["squares"] * found["projected"] / found["counts"].clamp_min(1).square().unsqueeze(1)


@neuron_criterion(
    "fisher",
    "second-order loss as in HEAPr with nothing taken for independent, over all tokens: ½·Σ_t (a·δᵀw)² / T",
    NeuronGradients(),
    comparable=True,
)
def fisher(measured: Measured, _: torch.Generator) -> Tensor:
    """Nats per token of the text that are lost with the neuron alone."""
    found = measured["neuron_gradients"]
    return 0.5 * found["joint"] / found["tokens"]


@neuron_criterion(
    "refit",
    "optimal brain surgeon on whole columns: block error that is left when the neuron alone goes and the down "
    "projection is solved again, ‖w‖² / (H⁻¹)_jj",
    NeuronRemoval(),
)
def refit(measured: Measured, _: torch.Generator) -> Tensor:
    """What the other neurons can't take over from it."""
    return measured["neuron_removal"]["alone"]


@neuron_criterion(
    "refit_in_turn",
    "the same after each removal: the cheapest of the neurons left goes, the others take over, and so on",
    NeuronRemoval(),
)
def refit_in_turn(measured: Measured, _: torch.Generator) -> Tensor:
    """What was lost with the neuron when it went, one after another."""
    return measured["neuron_removal"]["in_turn"]
