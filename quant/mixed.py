"""The pass `quantize.mixed`: every matrix at the width that a multiple-choice program gives it, in packed integers.

Plan: what each width would cost is computed (costs.py), and one program over all layers spends a budget of real bytes
(allocate.py; scales, zero points and padding counted). Apply (experts.py): GPTQ on what the experts really read, or a
method that needs no data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from moe_compress.budget.integer import Floats, Ints
from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import OutputNorms, Statistic
from moe_compress.errors import BudgetError, RecipeError
from moe_compress.model import MoEBlock
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Changed, Pass, Plan, register
from moe_compress.prune.super_experts import measured_super_experts
from moe_compress.units import parse_bytes, show_budget, show_bytes

from .allocate import LOADED, Allocation, Choices, Unit, by_layer, greedy, program, uniform, unit_of
from .beside import Beside, quantize_matrices
from .costs import COSTS, Asked, find_cost
from .experts import CHUNK_BYTES, quantize_experts
from .input_smoothing import check_reachable, input_errors, left_out, smooth_inputs
from .low_rank import pair_bytes
from .options import MixedOptions
from .packed import PROJECTIONS


@register
class QuantizeMixed(Pass):
    """Quantize experts, each matrix to its own width, under one budget."""

    name = "quantize.mixed"
    summary = "quantize experts, bits from a program under one budget of real bytes; GPTQ, HQQ or round-to-nearest"
    paper = "PMQ, arXiv 2410.06270 (allocation); GPTQ, arXiv 2210.17323; HQQ (Badri and Shaji 2023)"
    leaves = frozenset({"packed"})
    Options = MixedOptions
    options: MixedOptions

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """The registered costs."""
        return {"cost": {c.name: c.source for c in COSTS.values()}}

    def statistics(self) -> Sequence[Statistic]:
        """What the cost is computed from, and what finds super experts."""
        found: list[Statistic] = []
        if self.options.allocation != "uniform":
            found += find_cost(self.options.cost).statistics(self.options, self._per_matrix)
        if self.options.protect_super_experts:
            found.append(OutputNorms())
        if (matrix_error := self._beside.statistic) is not None:
            found.append(matrix_error)
        return list({s.key: s for s in found}.values())

    def needs_inputs(self) -> bool:
        """GPTQ and smoothing read what the experts read."""
        return self.options.method == "gptq" or self.options.smooth != "none"

    def prepares(self) -> bool:
        """Smoothing of inputs changes the norm before the block and all that reads it."""
        return self.options.smooths_input

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Sizes at the budget. Raises RecipeError for widths or groups, BudgetError for a budget that can't be met."""
        options = self.options
        self.target.check_grid(self.name, options.widths, options.group_size, options.symmetric)
        if self._unit not in (loaded := LOADED[self.target.bits_per]):
            raise RecipeError(
                f"quantize.mixed: the target {self.target.name!r} loads one width per {self.target.bits_per}, not per "
                f"{self._unit}: set `unit` to {' or '.join(loaded)}, or leave it out"
            )
        if self._per_matrix and options.allocation != "uniform" and not find_cost(options.cost).per_matrix:
            raise RecipeError(
                f"quantize.mixed: cost {options.cost!r} is known of whole experts only, and unit {self._unit!r} is "
                "smaller: take unit: expert or layer, or another cost"
            )
        if options.rotate != "none" and self.target.quantized_format != "native":
            raise RecipeError(
                f"quantize.mixed: the target {self.target.name!r} can't rotate what experts' projections read: leave "
                "`rotate` out, or take target: native"
            )
        if options.low_rank is not None and self.target.quantized_format != "native":
            raise RecipeError(
                f"quantize.mixed: the target {self.target.name!r} can't add low-rank factors to packed experts: leave "
                "`low_rank` out, or take target: native"
            )
        if options.smooths_input:
            check_reachable(self.name, shape)
        for index, layer in shape.layers.items():
            for what, length in (("hidden size", layer.hidden), ("neurons", layer.intermediate)):
                if self.options.group_size != -1 and length % self.options.group_size:
                    raise RecipeError(
                        f"quantize.mixed: group_size {self.options.group_size} doesn't divide the {what} {length} of "
                        f"layer {index}; {self._group_that_fits(layer)}"
                    )
        self._beside.check(self.name, shape)
        budget = self._budget(shape)
        least, most = ({i: self._layer_bytes(la, b) for i, la in shape.layers.items()} for b in self._extremes)
        fewest, largest = (self._beside.total(shape, pick(options.dense_widths)) for pick in (self._least_dense, max))
        if sum(least.values()) + fewest > budget:
            beside = f", what is included beside them {show_bytes(fewest)}" if fewest else ""
            raise BudgetError(
                f"quantize.mixed: {show_budget(budget, options.size)} for all {' and '.join(options.include)}, and at "
                f"{min(self.options.widths)} bits with groups of {self.options.group_size} experts take "
                f"{show_bytes(sum(least.values()))}{beside}: allow more, smaller widths or larger groups"
            )
        share = min(1.0, budget / (sum(most.values()) + largest))
        shape = self._beside.forecast(shape, share)
        return shape.with_layers(
            {i: replace(layer, bytes=int(most[i] * share), kind="packed") for i, layer in shape.layers.items()}
        )

    def plan(self, profile: Profile) -> Plan:
        """A width for every matrix."""
        shape, widths = profile.shape, self.options.widths
        protected = measured_super_experts(profile) if self.options.protect_super_experts else {}
        choices = {i: self._choices(profile, i, protected.get(i, [])) for i in shape.layers}
        try:
            found, beside = self._allocated(choices, profile)
        except BudgetError as error:
            raise BudgetError(f"quantize.mixed: {error}") from error
        layers: dict[int, dict[str, Any]] = {}
        table = []
        for index, own in choices.items():
            column_U = found.column_U[index]
            width_EM, rank_EM = (
                np.array(values, dtype=object)[column_U][own.unit_EM]
                for values in zip(*self.options.choices, strict=True)
            )
            names = self._projections(shape.layers[index])
            layers[index] = {"bits": dict(zip(names, width_EM.T.tolist(), strict=True))}
            if self.options.low_rank is not None:
                layers[index]["ranks"] = dict(zip(names, rank_EM.T.tolist(), strict=True))
            layers[index]["protected"] = protected.get(index, [])
            table.append({"layer": index, **self._row(own, column_U, width_EM, rank_EM, shape.layers[index])})
        summary = {
            **found.summary,
            "expert_bytes": sum(row["bytes"] for row in table),
            "budget_bytes": self._budget(shape),
            "matrices_per_width": {str(w): sum(row[f"at {w}"] for row in table) for w in widths},
            **self._rank_counts(table),
            "layers": table,
            **self._beside.summary(shape, beside),
        }
        notes = [f"layer {i}: super experts {e} get {max(widths)} bits" for i, e in protected.items()]
        notes += left_out(shape) if self.options.smooths_input else []
        return Plan(
            self.name, layers, summary, [self._said(found), *notes, *found.notes, *self._beside.notes(shape)], beside
        )

    def _rank_counts(self, table: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """How many matrices have each rank, where any may."""
        if self.options.low_rank is None:
            return {}
        return {"matrices_per_rank": {str(r): sum(t[f"rank {r}"] for t in table) for r in self.options.low_rank.ranks}}

    def _row(self, own: Choices, column_U: Ints, width_EM: Any, rank_EM: Any, layer: LayerShape) -> dict[str, Any]:
        """A layer of the plan for people: matrices at each width, and what the layer would cost all at one width."""
        unit = np.arange(len(column_U))
        used = int(own.size_UB[unit, column_U].sum()) + self._shared_bytes(layer)
        row: dict[str, Any] = {"bits": 8 * used / layer.weights, "bytes": used}
        row |= {f"at {width}": int((width_EM == width).sum()) for width in self.options.widths}
        if self.options.low_rank is not None:
            row |= {f"rank {rank}": int((rank_EM == rank).sum()) for rank in self.options.low_rank.ranks}
        if self.options.allocation != "uniform":
            plain = [(w, b) for b, (w, rank) in enumerate(self.options.choices) if rank == 0]
            row |= {f"cost at {w}": float(own.cost_UB[:, b].sum()) for w, b in plain}
            row["cost"] = float(own.cost_UB[unit, column_U].sum())
        return row

    def _said(self, found: Allocation) -> str:
        """How the widths were found, in a line."""
        options, chosen = self.options, find_cost(self.options.cost)
        if options.allocation == "uniform":
            mixed = "width" if len(options.choices) == 1 else "mixture of two widths"
            return f"the same {mixed} in every layer"
        gain = f", scaled by what GPTQ leaves ({options.solver_gain})" if chosen.scaled(options) else ""
        share = "the model" if options.scope == "global" else "each layer"
        gap = found.summary.get("gap")
        proven = "" if gap is None else ", proven to be the best" if gap == 0 else f", within {gap:.1g} of the best"
        return (
            f"a width for each {self._unit} by {options.allocation} within {share}, cost: {options.cost}{gain}{proven}"
        )

    def prepare(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs) -> dict[str, Any]:
        """Smooth what a block reads."""
        widths, options = [decision["bits"]], self.options
        return smooth_inputs(
            block,
            options,
            inputs,
            lambda factor_PH: input_errors(block, factor_PH, widths, options, inputs, CHUNK_BYTES)[0],
        )

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Quantize and pack a block's experts."""
        ranks, low_rank = decision.get("ranks", {}), self.options.low_rank
        shared = 0 if low_rank is None else low_rank.shared
        report = quantize_experts(block, decision["bits"], self.options, inputs, ranks, shared)
        for expert, values in enumerate(report):
            values["protected"] = expert in decision["protected"]
        return {"experts": report}

    def apply_beside(
        self, weights: Mapping[str, Tensor], decision: dict[str, Any], moments: Mapping[str, Tensor] | None
    ) -> dict[str, Changed]:
        """Quantize and pack matrices beside the experts."""
        return quantize_matrices(weights, decision, self.options, moments)

    # --- plan --------------------------------------------------------------------------------------------------

    @property
    def _unit(self) -> Unit:
        """What gets a width of its own."""
        if self.options.unit is not None:
            return self.options.unit
        loaded = LOADED[self.target.bits_per]
        if self.options.allocation != "uniform" and not find_cost(self.options.cost).per_matrix:
            loaded = tuple(unit for unit in loaded if unit in ("expert", "layer"))
        return loaded[0]

    @property
    def _per_matrix(self) -> bool:
        return self._unit in ("matrix", "projection")

    @property
    def _beside(self) -> Beside:
        return Beside(self.options, self.target)

    @property
    def _least_dense(self) -> Callable[[list[float]], float]:
        """Which of `dense_widths` the least budget is reckoned with."""
        return max if self.options.allocation == "uniform" else min

    @property
    def _extremes(self) -> tuple[tuple[float, int], tuple[float, int]]:
        """The smallest width and rank, and the largest."""
        return min(self.options.choices), max(self.options.choices)

    @staticmethod
    def _projections(layer: LayerShape) -> tuple[str, ...]:
        return PROJECTIONS[-layer.matrices :]

    def _budget(self, shape: ModelShape) -> int:
        if self.options.bits is not None:
            weights = sum(layer.weights for layer in shape.layers.values()) + self._beside.weights(shape)
            return int(self.options.bits * weights / 8)
        assert self.options.size is not None
        return parse_bytes(self.options.size) - shape.other_bytes + self._beside.dense_bytes(shape)

    def _group_that_fits(self, layer: LayerShape) -> str:
        """Which group size, no larger than the one asked for, divides both sides of an expert."""
        sizes = self.target.group_sizes or range(1, self.options.group_size + 1)
        fitting = [g for g in sizes if layer.hidden % g == 0 and layer.intermediate % g == 0]
        return f"{max(fitting)} does" if fitting else f"nothing that the target {self.target.name!r} loads does"

    def _matrix_bytes(self, layer: LayerShape) -> Ints:
        """Bytes of each matrix of an expert at each choice, [M, B]; the expert's biases count as part of the last."""

        def size(width: float, rank: int, rows: int, columns: int) -> int:
            return self.options.matrix_bytes(self.target, width, rows, columns) + pair_bytes(rows, columns, rank)

        wide, narrow = (
            [size(*choice, *sides) for choice in self.options.choices]
            for sides in ((layer.intermediate, layer.hidden), (layer.hidden, layer.intermediate))
        )
        size_MB = np.array([*[wide] * (layer.matrices - 1), narrow], dtype=np.int64)
        size_MB[-1] += layer.biases * layer.weight_bytes
        return size_MB

    def _layer_bytes(self, layer: LayerShape, choice: tuple[float, int]) -> int:
        sizes = self._matrix_bytes(layer)[:, self.options.choices.index(choice)]
        return layer.num_experts * int(sizes.sum()) + self._shared_bytes(layer)

    def _shared_bytes(self, layer: LayerShape) -> int:
        """Of the pairs that all experts of a layer have in common."""
        low_rank = self.options.low_rank
        return 0 if low_rank is None else layer.matrices * pair_bytes(layer.intermediate, layer.hidden, low_rank.shared)

    def _choices(self, profile: Profile, index: int, protected: Sequence[int]) -> Choices:
        layer, unit, size_MB = profile.shape.layers[index], self._unit, self._matrix_bytes(profile.shape.layers[index])
        if self.options.allocation == "uniform":  # a mixture of experts, or of layers, whatever the unit
            unit = "expert" if unit in ("expert", "matrix") else "layer"
            costs = np.zeros((layer.num_experts, len(self.options.choices)))
        else:
            costs = self._costs(profile, index)
        unit_EM = unit_of(unit, layer.num_experts, layer.matrices, self.options.tie_gate_up)
        return Choices.of(unit_EM, costs, size_MB, protected)

    def _costs(self, profile: Profile, index: int) -> Floats:
        """What every width costs every expert or matrix."""
        chosen = find_cost(self.options.cost)
        measured = {s.name: profile.of(index, s) for s in chosen.statistics(self.options, self._per_matrix)}
        per_matrix = chosen.asked_per_matrix(self.options, self._per_matrix)
        asked = Asked(self.options, per_matrix, index, profile.shape.layers[index])
        costs: Floats = chosen.of(measured, asked).double().numpy()
        return costs

    def _allocated(
        self, choices: dict[int, Choices], profile: Profile
    ) -> tuple[Allocation, dict[int, dict[str, dict[str, Any]]]]:
        """Widths of experts' units, and `Plan.beside`."""
        shape, options = profile.shape, self.options
        budget = self._budget(shape) - sum(self._shared_bytes(layer) for layer in shape.layers.values())
        if self._beside.statistic is None:  # what is beside, if anything, has the largest width, experts the rest
            fixed = self._beside.total(shape, max(options.dense_widths))
            return self._ruled(choices, shape, budget - fixed), self._beside.decided(profile, None)
        # Layers' numbers are taken: what is beside the experts of layer i is number −2 − i.
        others = {-2 - i: own for i, own in self._beside.choices(profile).items()}
        found = self._ruled({**choices, **others}, shape, budget)
        columns = {-2 - i: found.column_U[i] for i in others}
        return found, self._beside.decided(profile, columns)

    def _ruled(self, choices: dict[int, Choices], shape: ModelShape, budget: int) -> Allocation:
        options = self.options

        def rule(own: dict[int, Choices], most: int) -> Allocation:
            if options.allocation == "uniform":
                return uniform(own, most, spread=self._unit in ("expert", "matrix"))
            return greedy(own, most) if options.allocation == "greedy" else program(own, most, options.cover)

        if options.scope == "global" or options.allocation == "uniform":
            return rule(choices, budget)
        weights = sum(layer.weights for layer in shape.layers.values())
        return by_layer(choices, {i: budget * la.weights // weights for i, la in shape.layers.items()}, rule)
