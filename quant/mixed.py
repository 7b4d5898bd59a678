"""The pass `quantize.mixed`: every expert at the width that a multiple-choice program gives it, in packed integers.

Plan: what each expert would cost at each width is measured, and one program over all layers spends a budget of real
bytes (scales, zero points and padding counted). Apply: round-to-nearest, or GPTQ on what the experts really read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from moe_compress.budget.knapsack import solve_arrays
from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import OutputNorms, Routing, Statistic
from moe_compress.errors import BudgetError, RecipeError, UnsupportedModelError
from moe_compress.model import MoEBlock
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register
from moe_compress.prune.super_experts import super_experts
from moe_compress.units import parse_bytes, show_bytes

from .cost import QuantizationError
from .experts import quantize_experts
from .grid import Grid, Search
from .packed import PROJECTIONS, Encoding


class MixedOptions(PassOptions):
    """Options of `quantize.mixed`."""

    bits: float | None = Field(
        default=None,
        gt=0,
        le=16,
        description="Budget: average bits per expert weight; scales, zero points and padding count",
    )
    size: str | None = Field(default=None, description='Instead of `bits`: size of the whole checkpoint, e.g. "12 GB"')
    widths: list[int] = Field(default=[1, 2, 3, 4, 8], min_length=1, description="Widths that an expert may get")
    scope: Literal["global", "layer"] = Field(
        default="global",
        description="Who shares the budget: all experts of the model, or each layer's by themselves (PMQ)",
    )
    allocation: Literal["program", "uniform"] = Field(
        default="program",
        description="Who decides: the program, or the same mixture of two widths everywhere (control)",
    )
    method: Literal["gptq", "rtn"] = Field(
        default="gptq", description="GPTQ, or round-to-nearest (needs no data to apply)"
    )
    group_size: int = Field(default=64, ge=-1, description="Weights that share a scale, -1 for a whole row")
    symmetric: bool = Field(default=True, description="No zero points (what servers load)")
    search: Literal["none", "mse", "pnorm"] = Field(default="mse", description="How scales are found")
    cost: Literal["relative", "pmq"] = Field(
        default="relative",
        description="What a width costs an expert: its squared error on every token relative to the hidden state that "
        "it is added to, comparable between layers; or PMQ's product of powers",
    )
    alpha: float = Field(default=1.0, ge=0, description="PMQ: exponent of how often an expert is chosen")
    beta: float = Field(default=1.5, ge=0, description="PMQ: exponent of its routing weight")
    gamma: float = Field(default=2.0, gt=0, description="PMQ: exponent of its error at the block's output")
    damping: float = Field(default=0.01, ge=0, description="GPTQ: added to the Hessian's diagonal, times its mean")
    shrinkage: float | None = Field(
        default=None,
        ge=0,
        description="GPTQ: tokens that the layer's mean Hessian counts for; default: a quarter of its size",
    )
    protect_super_experts: bool = Field(
        default=True, description="Experts with massive activations get the largest of `widths`"
    )

    @field_validator("widths")
    @classmethod
    def _known_widths(cls, value: list[int]) -> list[int]:
        if not set(value) <= set(range(1, 9)):
            raise ValueError("widths are 1 to 8 bits")
        return sorted(set(value))

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.bits is None) == (self.size is None):
            raise ValueError(
                'give either `bits` (average per weight, e.g. 2.5) or `size` (of the checkpoint, e.g. "12 GB")'
            )
        return self


@register
class QuantizeMixed(Pass):
    """Quantize experts, each to its own width, under one budget."""

    name = "quantize.mixed"
    summary = (
        "quantize experts, bits per expert from a program under one budget of real bytes; GPTQ or round-to-nearest"
    )
    paper = "PMQ, arXiv 2410.06270 (allocation); GPTQ, arXiv 2210.17323"
    Options = MixedOptions
    options: MixedOptions

    def statistics(self) -> Sequence[Statistic]:
        """Error of each expert at each width, and what weighs it."""
        if self.options.allocation == "uniform":
            return [OutputNorms()] if self.options.protect_super_experts else []
        found: list[Statistic] = [self._error]
        if self.options.cost == "pmq":
            found.append(Routing())
        if self.options.protect_super_experts:
            found.append(OutputNorms())
        return found

    def needs_inputs(self) -> bool:
        """GPTQ reads what the experts read."""
        return self.options.method == "gptq"

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Sizes at the budget. Raises RecipeError for widths or groups, BudgetError for a budget that can't be met."""
        options = self.options
        self.target.check_grid(self.name, options.widths, options.group_size, options.symmetric)
        for index, layer in shape.layers.items():
            for what, length in (("hidden size", layer.hidden), ("neurons", layer.intermediate)):
                if self.options.group_size != -1 and length % self.options.group_size:
                    raise RecipeError(
                        f"quantize.mixed: group_size {self.options.group_size} doesn't divide the {what} {length} of "
                        f"layer {index}; {self._group_that_fits(layer)}"
                    )
        budget = self._budget(shape)
        least = sum(
            layer.num_experts * self._expert_bytes(layer, min(self.options.widths)) for layer in shape.layers.values()
        )
        if least > budget:
            raise BudgetError(
                f"quantize.mixed: the budget is {show_bytes(budget)} for all experts, and at "
                f"{min(self.options.widths)} bits with groups of {self.options.group_size} they take "
                f"{show_bytes(least)}: allow more, smaller widths or larger groups"
            )
        most = {
            i: layer.num_experts * self._expert_bytes(layer, max(self.options.widths))
            for i, layer in shape.layers.items()
        }
        share = min(1.0, budget / sum(most.values()))
        return shape.with_layers(
            {i: replace(layer, bytes=int(most[i] * share), kind="packed") for i, layer in shape.layers.items()}
        )

    def plan(self, profile: Profile) -> Plan:
        """A width for every expert."""
        protected: dict[int, list[int]] = {}
        if self.options.protect_super_experts:
            maxima = {i: profile.of(i, OutputNorms())["maximum"] for i in profile.shape.layers}
            protected = super_experts(maxima, profile.decoder_layers)
        summary: dict[str, Any] = {}
        if self.options.allocation == "uniform":
            bits = self._uniform(profile.shape, protected)
        else:
            bits, summary = self._solved(profile, protected)
        layers: dict[int, dict[str, Any]] = {
            i: {
                "bits": dict.fromkeys(self._projections(profile.shape.layers[i]), widths),
                "protected": protected.get(i, []),
            }
            for i, widths in bits.items()
        }
        used = sum(self._expert_bytes(profile.shape.layers[i], b) for i, widths in bits.items() for b in widths)
        everything = [b for widths in bits.values() for b in widths]
        summary |= {
            "expert_bytes": used,
            "budget_bytes": self._budget(profile.shape),
            "experts_per_width": {str(b): everything.count(b) for b in self.options.widths},
        }
        notes = [f"layer {i}: super experts {e} get {max(self.options.widths)} bits" for i, e in protected.items()]
        return Plan(self.name, layers, summary, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Quantize and pack a block's experts."""
        report = quantize_experts(block, decision["bits"], self, inputs)
        for expert, values in enumerate(report):
            values["protected"] = expert in decision["protected"]
        return {"experts": report}

    # --- how matrices are quantized (see Solving) ---------------------------------------------------------------

    @property
    def search(self) -> Search:
        """How scales are found."""
        return self.options.search

    @property
    def damping(self) -> float:
        """Added to the Hessian's diagonal, times its mean."""
        return self.options.damping

    @property
    def shrinkage(self) -> float | None:
        """Tokens that the layer's mean Hessian counts for."""
        return self.options.shrinkage

    def grid(self, bits: int) -> Grid:
        """The grid of a width."""
        return Grid(bits, self.options.group_size, self.options.symmetric or bits == 1)

    # --- plan --------------------------------------------------------------------------------------------------

    @property
    def _error(self) -> QuantizationError:
        return QuantizationError(tuple(self.options.widths), self.options.group_size, self.options.symmetric)

    @staticmethod
    def _projections(layer: LayerShape) -> tuple[str, ...]:
        return PROJECTIONS[-layer.matrices :]

    def _budget(self, shape: ModelShape) -> int:
        if self.options.bits is not None:
            return int(self.options.bits * sum(layer.weights for layer in shape.layers.values()) / 8)
        assert self.options.size is not None
        return parse_bytes(self.options.size) - shape.other_bytes

    def _group_that_fits(self, layer: LayerShape) -> str:
        """Which group size, no larger than the one asked for, divides both sides of an expert."""
        sizes = self.target.group_sizes or range(1, self.options.group_size + 1)
        fitting = [g for g in sizes if layer.hidden % g == 0 and layer.intermediate % g == 0]
        return f"{max(fitting)} does" if fitting else f"nothing that the target {self.target.name!r} loads does"

    def _expert_bytes(self, layer: LayerShape, bits: int) -> int:
        encoding = Encoding(bits, self.options.group_size, self.options.symmetric or bits == 1)
        wide = encoding.matrix_bytes(layer.intermediate, layer.hidden)
        narrow = encoding.matrix_bytes(layer.hidden, layer.intermediate)
        beside = layer.matrices * self.target.matrix_bytes
        return (layer.matrices - 1) * wide + narrow + beside + layer.biases * layer.weight_bytes

    def _uniform(self, shape: ModelShape, protected: dict[int, list[int]]) -> dict[int, list[int]]:
        """In every layer the same mixture of the two widths around the budget, spread evenly over the experts.

        Protected experts get the largest width (the whole layer, where the target wants one), the others what is left.
        """
        widths = self.options.widths
        whole = self.target.bits_per == "layer"
        free = {
            i: [e for e in range(layer.num_experts) if not (protected.get(i) if whole else e in protected.get(i, []))]
            for i, layer in shape.layers.items()
        }

        def total(bits: int) -> int:
            return sum(len(free[i]) * self._expert_bytes(layer, bits) for i, layer in shape.layers.items())

        fixed = sum(
            (layer.num_experts - len(free[i])) * self._expert_bytes(layer, widths[-1])
            for i, layer in shape.layers.items()
        )
        budget = self._budget(shape) - fixed
        affordable = [b for b in widths if total(b) <= budget]
        if not affordable:
            raise BudgetError(
                f"quantize.mixed: super experts at {widths[-1]} bits leave {show_bytes(max(0, budget))} of the budget, "
                f"and the others take {show_bytes(total(widths[0]))} at {widths[0]} bits: allow more, or set "
                "`protect_super_experts: false`"
            )
        low = affordable[-1]
        high = min((b for b in widths if b > low), default=low)
        spare = total(high) - total(low)
        share = (budget - total(low)) / spare if spare and not whole else 0.0
        result = {}
        for index, layer in shape.layers.items():
            result[index] = [widths[-1]] * layer.num_experts
            for position, expert in enumerate(free[index]):
                step = int((position + 1) * share + 1e-9) - int(position * share + 1e-9)
                result[index][expert] = high if step else low
        return result

    def _solved(self, profile: Profile, protected: dict[int, list[int]]) -> tuple[dict[int, list[int]], dict[str, Any]]:
        layers = profile.shape.layers
        costs = {i: self._costs(profile, i) for i in layers}
        sizes = {i: np.array([self._expert_bytes(layers[i], b) for b in self.options.widths], np.int64) for i in layers}
        allowed = {i: np.ones_like(costs[i], dtype=bool) for i in layers}
        for index, experts in protected.items():
            allowed[index][experts, :-1] = False
        budget = self._budget(profile.shape)
        if self.options.scope == "global":
            return self._program(list(layers), costs, sizes, allowed, budget)
        bits: dict[int, list[int]] = {}
        summaries = []
        weights = sum(layer.weights for layer in layers.values())
        for index, layer in layers.items():
            part, summary = self._program([index], costs, sizes, allowed, budget * layer.weights // weights)
            bits |= part
            summaries.append(summary)
        solvers = sorted({s["solver"] for s in summaries})
        notes = sorted({s["solver_note"] for s in summaries if "solver_note" in s})
        return bits, {
            "solver": ", ".join(solvers),
            "gap": max(s["gap"] for s in summaries),
            "cost": sum(s["cost"] for s in summaries),
            **({"solver_note": "; ".join(notes)} if notes else {}),
        }

    def _program(
        self,
        layers: list[int],
        costs: dict[int, NDArray[np.float64]],
        sizes: dict[int, NDArray[np.int64]],
        allowed: dict[int, NDArray[np.bool_]],
        budget: int,
    ) -> tuple[dict[int, list[int]], dict[str, Any]]:
        """Solve for some layers together. A unit is an expert, or a whole layer where the target wants one width."""
        whole = self.target.bits_per == "layer"
        counts = {i: len(costs[i]) for i in layers}
        cost = [costs[i].sum(0, keepdims=True) if whole else costs[i] for i in layers]
        size = [sizes[i][None] * counts[i] if whole else np.repeat(sizes[i][None], counts[i], 0) for i in layers]
        mask = [allowed[i].all(0, keepdims=True) if whole else allowed[i] for i in layers]
        solution = solve_arrays(np.concatenate(cost), np.concatenate(size), budget, np.concatenate(mask), gap=0.0)
        widths = np.array(self.options.widths)[solution.choice]
        bits: dict[int, list[int]] = {}
        start = 0
        for index in layers:
            units = 1 if whole else counts[index]
            own = widths[start : start + units].tolist()
            bits[index] = own * counts[index] if whole else own
            start += units
        summary = {"solver": solution.solver, "gap": float(solution.gap), "cost": float(solution.cost)}
        return bits, {**summary, **({"solver_note": solution.note} if solution.note else {})}

    def _costs(self, profile: Profile, index: int) -> NDArray[np.float64]:
        """What every width costs every expert, [E, B].

        PMQ (Eq. 4): φ^α · ω^β · ε^γ, where frequency φ and routing weight ω sum to 1 in a layer and ε is measured.
        """
        measured = profile.of(index, self._error)
        if self.options.cost == "relative":
            if "relative" not in measured:
                raise UnsupportedModelError(
                    f"layer {index} returns no hidden state per token that errors could be compared with: set "
                    "`cost: pmq` in quantize.mixed"
                )
            relative: NDArray[np.float64] = measured["relative"].numpy()
            return relative
        routing = profile.of(index, Routing())
        frequency = routing["counts"] / routing["counts"].sum().clamp_min(1)
        weight = routing["gate"] / routing["gate"].sum().clamp_min(1e-300)
        error = measured["error"]
        factor = frequency**self.options.alpha * weight**self.options.beta
        cost: NDArray[np.float64] = (factor.unsqueeze(1) * error**self.options.gamma).numpy()
        return cost
