"""The pass `prune.neurons`: experts get narrower, all of them stay.

An expert's output is a sum over its neurons, so leaving some out changes nothing else: the router's choices stay right.
What the others can take over, they do: the down projections of each layer are solved again on what the block reads now,
so that it puts out what it did (compress/refit.py; methods: CAMERA, HEAPr and TENP leave this out).

Letters: E experts, I neurons of each before, m neurons that widths are multiples of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import Routing, Statistic
from moe_compress.errors import BudgetError, RecipeError, RunError
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register
from moe_compress.refit import LayerRefit, Ridge
from moe_compress.rounds import Rounds, check_rounds, reached, said

from .neuron_criteria import NEURON_CRITERIA, find_neuron_criterion
from .ragged import make_ragged, padded


class NeuronOptions(Rounds, PassOptions):
    """Options of `prune.neurons`."""

    keep: float | None = Field(default=None, gt=0, le=1, description="Share of the neurons that stays, e.g. 0.75")
    neurons: int | None = Field(default=None, ge=1, description="Instead of `keep`: neurons of an expert, on average")
    criterion: str = Field(default="output", description="How neurons are scored; the lowest go first")
    width: Literal["uniform", "layer", "free"] = Field(
        default="uniform",
        description="uniform: all experts of the model alike, what servers load; layer: all experts of a layer alike; "
        "free: every expert its own. The last two are for `native`, and nothing can follow free",
    )
    scope: Literal["layer", "global"] = Field(
        default="global",
        description="width: free: neurons are compared within their layer, or among all layers",
    )
    multiple: int | None = Field(
        default=None,
        ge=1,
        description="Widths are multiples of it; default: 1 if free, else 64, or 32 or 16 where the width now is less "
        "than 8 times that, or 8. Kernels of servers and of transformers want 8 or more",
    )
    minimum: float = Field(
        default=0.125, ge=0, le=1, description="Share of its neurons that every expert keeps (layer and free)"
    )
    refit: bool = Field(default=True, description="Solve the layer's down projections again on the calibration tokens")
    ridge: Ridge = 0.25
    seed: int = Field(default=0, description="Seed of the criterion `random`")

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        find_neuron_criterion(value)
        return value

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if (self.keep is None) == (self.neurons is None):
            raise ValueError("give either `keep` (a share, e.g. 0.75) or `neurons` (a number per expert)")
        if self.width != "free" and "scope" in self.model_fields_set:
            raise ValueError("`scope` belongs to width: free")
        if self.width == "uniform" and "minimum" in self.model_fields_set:
            raise ValueError("`minimum` belongs to width: layer and free; in a uniform plan every expert keeps as many")
        if self.width == "free" and self.steps > 1:
            raise ValueError("`steps` belongs to width: uniform and layer; nothing can follow free, no round either")
        across = self.width == "layer" or (self.width == "free" and self.scope == "global")
        if across and find_neuron_criterion(self.criterion).signed:
            raise ValueError(
                f"scores of the criterion {self.criterion!r} may be negative, and a choice across layers compares "
                "shares of their sum; take width: uniform, or free with scope: layer, or another criterion"
            )
        return self


@register
class PruneNeurons(Pass):
    """Remove the neurons that matter least by a criterion, and let the others take over."""

    name = "prune.neurons"
    summary = "make experts narrower: remove neurons by a criterion, down projections solved again"
    paper = "HEAPr (arXiv 2509.22299), CAMERA-P (2508.02322), TENP (2606.09885): criteria; see docs/pruning.md"
    leaves = frozenset({"fused", "ragged"})
    Options = NeuronOptions
    options: NeuronOptions

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """The registered criteria."""
        return {"criterion": {c.name: c.source for c in NEURON_CRITERIA.values()}}

    def statistics(self) -> Sequence[Statistic]:
        """The criterion's, and how often each expert is used."""
        found = find_neuron_criterion(self.options.criterion).statistics
        return found if all(not s.reads_text for s in found) else [*found, Routing()]

    def needs_inputs(self) -> bool:
        """To refit."""
        return self.options.refit

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Widths afterwards; where they differ, the same total is forecast as if they didn't."""
        if self.options.width != "uniform" and self.target.quantized_format != "native":
            raise RecipeError(
                f"prune.neurons: width {self.options.width!r} gives experts different widths, which the target "
                f"{self.target.name!r} can't load; use width: uniform, or target: native"
            )
        start = self._start(shape).layers
        going = {i: (n.intermediate - self._goal(i, n)) // self._multiple(n) for i, n in start.items()}
        check_rounds(self, going, "times `multiple` of its neurons")
        widths = self._widths(shape)
        layers = {i: layer.with_width(widths[i]) for i, layer in shape.layers.items()}
        if self.options.width != "uniform":
            for index, layer in start.items():
                if (least := self._least(layer)) > layers[index].intermediate:
                    raise BudgetError(
                        f"prune.neurons: layer {index}: experts keep {least} neurons at the least, and "
                        f"{layers[index].intermediate} on average; lower `minimum` or keep more"
                    )
        if self.options.width == "free":
            layers = {i: _ragged(layer) for i, layer in layers.items()}
        return shape.with_layers(layers)

    def plan(self, profile: Profile) -> Plan:
        """Score all neurons, decide on widths, keep the best of each expert."""
        scores = self._scores(profile)
        kept = self._choose(profile.shape, scores)
        notes = []
        if any(s.reads_text for s in self.statistics()):
            unseen = {i: int((profile.of(i, Routing())["counts"] == 0).sum()) for i in scores}
            notes = [f"layer {i}: {n} experts saw no calibration token" for i, n in unseen.items() if n]
        layers = {i: {"kept": [_to_hex(row) for row in kept[i]], "lost": _lost(scores[i], kept[i])} for i in scores}
        total, left = sum(k.numel() for k in kept.values()), sum(int(k.sum()) for k in kept.values())
        summary: dict[str, Any] = {**said(self), "neurons": left, "of": total, "criterion": self.options.criterion}
        if self.options.width != "uniform":
            summary["widths"] = [
                {"layer": i, "least": int(n.min()), "mean": round(float(n.double().mean()), 1), "most": int(n.max())}
                for i, n in ((i, k.sum(dim=1)) for i, k in kept.items())
            ]
        return Plan(self.name, layers, summary, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Remove neurons and solve down projections again."""
        experts = FusedExperts(block.experts_module)
        kept_EI = torch.stack([_from_hex(row, experts.intermediate_size) for row in decision["kept"]])
        widths = kept_EI.sum(dim=1).tolist()
        report: dict[str, Any] = {
            "experts": [{"neurons": n, "lost": lost} for n, lost in zip(widths, decision["lost"], strict=True)]
        }
        refit = LayerRefit(block, inputs) if inputs is not None else None
        free = self.options.width == "free"
        if free:
            silence(experts, kept_EI)
        else:
            block.narrow(kept_EI.nonzero()[:, 1].view(len(kept_EI), -1))
        if refit is not None:
            report["refit"] = refit.after(block, None, self.options.ridge)
        if free:
            make_ragged(block, kept_EI)
            report["all_neurons"] = sum(widths)
        return report

    def _start(self, shape: ModelShape) -> ModelShape:
        return self.start if self.start is not None and self.round else shape

    def _widths(self, shape: ModelShape) -> dict[int, int]:
        """Layer → neurons per expert on average at the end of this round. Raises RecipeError."""
        start = self._start(shape).layers
        return {i: reached(self, n.intermediate, self._goal(i, n), self._multiple(n)) for i, n in start.items()}

    def _goal(self, index: int, layer: LayerShape) -> int:
        """The same after the last round, a multiple of m, of a layer as it was before the first. Raises RecipeError."""
        now, step = layer.intermediate, self._multiple(layer)
        wanted = self.options.neurons if self.options.neurons is not None else now * (self.options.keep or 1.0)
        if wanted > now:
            raise RecipeError(f"prune.neurons: experts of layer {index} have {now} neurons, {wanted} can't be kept")
        if self.options.neurons is not None and wanted % step:
            raise RecipeError(f"prune.neurons: `neurons` is {wanted}, and widths are multiples of {step} (`multiple`)")
        if step > now:
            raise RecipeError(f"prune.neurons: `multiple` is {step}, and experts of layer {index} have {now} neurons")
        return max(step, round(wanted / step) * step)

    def _multiple(self, layer: LayerShape) -> int:
        if self.options.multiple is not None:
            return self.options.multiple
        if self.options.width == "free":
            return 1
        fitting = [m for m in (64, 32, 16, 8) if layer.intermediate % m == 0]
        return next((m for m in fitting if layer.intermediate >= 8 * m), fitting[-1] if fitting else 1)

    def _least(self, layer: LayerShape) -> int:
        step = self._multiple(layer)
        return max(step, -(-round(self.options.minimum * layer.intermediate) // step) * step)

    def _scores(self, profile: Profile) -> dict[int, Tensor]:
        criterion = find_neuron_criterion(self.options.criterion)
        generator = torch.Generator().manual_seed(self.options.seed)
        scores = {
            index: criterion.score({s.name: profile.of(index, s) for s in criterion.statistics}, generator).double()
            for index in profile.shape.layers
        }
        for layer, found in scores.items():
            if not found.isfinite().all():
                raise RunError(
                    f"prune.neurons: {self.options.criterion} gives neurons of layer {layer} no finite score: the "
                    "checkpoint's weights, or what they compute, overflow"
                )
        return scores

    def _choose(self, shape: ModelShape, scores: dict[int, Tensor]) -> dict[int, Tensor]:
        """Layer → which neurons stay, [E, I]."""
        width, start = self._widths(shape), self._start(shape).layers
        if self.options.width == "uniform":
            return {i: best(s, torch.full((len(s),), width[i])) for i, s in scores.items()}
        step = {i: self._multiple(layer) for i, layer in start.items()}
        least = {i: self._least(layer) for i, layer in start.items()}
        if self.options.width == "free" and self.options.scope == "layer":
            parts = [[i] for i in scores]
        else:
            parts = [list(scores)]
            if not find_neuron_criterion(self.options.criterion).comparable:
                scores = _shares(scores)
        kept: dict[int, Tensor] = {}
        for part in parts:
            # What competes: every expert's neurons, or those of all experts of a layer at the same place in its order.
            prices = {i: scores[i].sort(dim=1, descending=True).values for i in part}
            if self.options.width == "layer":
                prices = {i: price.sum(dim=0, keepdim=True) for i, price in prices.items()}
            total = sum(width[i] * len(scores[i]) for i in part)
            weight = {i: len(scores[i]) // len(prices[i]) for i in part}
            chosen = widths_within(prices, total, step, least, weight)
            kept |= {i: best(scores[i], chosen[i].expand(len(scores[i]))) for i in part}
        return kept


def widths_within(
    prices: dict[int, Tensor], total: int, step: dict[int, int], least: dict[int, int], weight: dict[int, int]
) -> dict[int, Tensor]:
    """How many neurons each row keeps so that the prices of those removed sum to least.

    Args:
        prices: layer → [rows, I], descending along the neurons.
        total: neurons to keep, of all rows.
        step, least: layer → what numbers are multiples of, and the least of a row.
        weight: layer → neurons that one of a row stands for.

    Returns layer → [rows] int64. Prices descend, so the best steps first is exact, but for a last one that doesn't fit.
    """
    counts = {i: torch.full((len(p),), least[i]) for i, p in prices.items()}
    left = total - sum(int(counts[i].sum()) * weight[i] for i in prices)
    values, places, sizes = [], [], []
    for index, price in prices.items():
        steps = (price.shape[1] - least[index]) // step[index]
        own = price[:, least[index] : least[index] + steps * step[index]].unflatten(1, (steps, step[index])).mean(dim=2)
        values.append((own / weight[index]).flatten())
        rows = torch.arange(len(price)).repeat_interleave(steps)
        places.append(torch.stack([torch.full_like(rows, index), rows], dim=1))
        sizes.append(torch.full_like(rows, step[index] * weight[index]))
    order = torch.cat(values).argsort(descending=True, stable=True)
    place, size = torch.cat(places)[order], torch.cat(sizes)[order]
    for (index, row), taken in zip(place.tolist(), size.tolist(), strict=True):
        if taken <= left:
            counts[index][row] += step[index]
            left -= taken
    return counts


def best(scores_EI: Tensor, counts_E: Tensor) -> Tensor:
    """The so many neurons of each expert with the highest scores: [E, I]."""
    order = scores_EI.argsort(dim=1, descending=True, stable=True)
    inside = torch.arange(scores_EI.shape[1]) < counts_E.unsqueeze(1)
    return torch.zeros_like(inside).scatter_(1, order, inside)


def silence(experts: FusedExperts, kept_EI: Tensor) -> None:
    """Let the other neurons put out nothing, and compute nothing that a refit could make something of."""
    weights = experts.weights()
    gone = ~kept_EI.to(weights.down.device)
    for name, value in weights.items():
        if name == "down":
            value.transpose(1, 2)[gone] = 0
        elif name != "down_bias":
            value[gone] = 0


def _shares(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    """Every layer's scores as shares of their sum. Raises RunError for negative ones, of which that says nothing."""
    if negative := [i for i, found in scores.items() if bool((found < 0).any())]:
        raise RunError(
            f"prune.neurons: scores of layers {negative} are negative, and a choice across layers compares shares of "
            "their sum: register the criterion as signed"
        )
    return {index: found / found.sum().clamp_min(1e-300) for index, found in scores.items()}


def _lost(scores_EI: Tensor, kept_EI: Tensor) -> list[float]:
    """Sum of the scores of the neurons that go, per expert."""
    return [float(f"{float(v):.6g}") for v in torch.where(kept_EI, 0, scores_EI).sum(dim=1)]


def _ragged(layer: LayerShape) -> LayerShape:
    return LayerShape(
        **{**vars(layer), "kind": "ragged", "neurons": layer.num_experts * layer.intermediate,
           "intermediate": padded([layer.intermediate])}
    )  # fmt: skip


def _to_hex(kept_I: Tensor) -> str:
    """Which neurons stay, neuron 0 the lowest bit."""
    return f"{sum(1 << j for j in kept_I.nonzero().flatten().tolist()):x}"


def _from_hex(kept: str, neurons: int) -> Tensor:
    bits = int(kept, 16)
    return torch.tensor([bool(bits >> j & 1) for j in range(neurons)])
