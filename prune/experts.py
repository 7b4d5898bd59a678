"""The pass `prune.experts`: remove whole experts, and the router's rows with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import OutputNorms, Routing, Statistic
from moe_compress.counts import ExpertCounts, chosen, kept_count, least_kept, ranked
from moe_compress.errors import RecipeError, RunError
from moe_compress.merge.refit import LayerRefit
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register

from . import gram_greedy, naee, stun  # noqa: F401  (they register criteria)
from .criteria import CRITERIA, Selection, find_criterion
from .super_experts import super_experts


class PruneOptions(PassOptions, ExpertCounts):
    """Options of `prune.experts`."""

    criterion: str = Field(default="reap", description="How experts are scored; the lowest go first")
    scope: Literal["uniform", "global"] = Field(
        default="uniform",
        description="uniform: the same number in every layer; global: the lowest of all layers, by scores "
        "that are made comparable (each layer's sum to 1, unless they are by themselves)",
    )
    minimum: int | None = Field(
        default=None, ge=1, description="Experts that a layer keeps at the least (global); default: twice the top-k"
    )
    protect_super_experts: bool = Field(default=True, description="Never remove experts with massive activations")
    refit: bool = Field(
        default=True,
        description="Solve the down projections that are left again, so that on the calibration tokens the layer puts "
        "out what it did (experts with massive activations stay as they are)",
    )
    ridge: float = Field(
        default=0.25,
        gt=0,
        description="How strongly refitting holds on to the weights that are there; the fewer tokens, the stronger",
    )
    seed: int = Field(default=0, description="Seed of the criterion `random`")

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        find_criterion(value)
        return value

    @model_validator(mode="after")
    def _minimum_of_global(self) -> Self:
        if self.minimum is not None and self.scope == "uniform":
            raise ValueError("`minimum` belongs to scope: global; in a uniform plan every layer keeps the same number")
        if self.scope == "global" and not find_criterion(self.criterion).ranks:
            raise ValueError(
                f"criterion {self.criterion!r} chooses sets of a given size and gives no order, which scope: global "
                "compares layers by; take scope: uniform, or the criterion gram_greedy"
            )
        return self


@register
class PruneExperts(Pass):
    """Remove the experts that matter least by a criterion."""

    name = "prune.experts"
    summary = "remove whole experts by a criterion, uniformly or globally"
    paper = "REAP, arXiv 2510.13999 (default criterion)"
    Options = PruneOptions
    options: PruneOptions

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """The registered criteria."""
        return {"criterion": {c.name: c.source for c in CRITERIA.values()}}

    def statistics(self) -> Sequence[Statistic]:
        """The criterion's, and what finds super experts."""
        found = find_criterion(self.options.criterion).measures(self.options)
        if self.options.protect_super_experts:
            found.append(OutputNorms())
        return list({s.key: s for s in [*found, Routing()]}.values())

    def needs_inputs(self) -> bool:
        """To refit."""
        return self.options.refit

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Counts after pruning; a global plan is forecast as if it were uniform, its total is the same."""
        if self.options.scope == "global" and self.target.uniform_experts:
            raise RecipeError(
                f"prune.experts: scope 'global' gives layers different numbers of experts, which the target "
                f"{self.target.name!r} can't load; use scope: uniform, or target: native"
            )
        counts = {i: self._kept(i, layer) for i, layer in shape.layers.items()}
        for index, count in counts.items():
            if problem := find_criterion(self.options.criterion).problem(shape.layers[index], count):
                raise RecipeError(f"prune.experts: criterion {self.options.criterion!r}: layer {index} {problem}")
        if self.options.scope == "global":
            _floors(shape, sum(counts.values()), self.options.minimum, {})
        return shape.with_layers({i: layer.with_experts(counts[i]) for i, layer in shape.layers.items()})

    def plan(self, profile: Profile) -> Plan:
        """Score all experts, protect super experts, keep the best."""
        protected: dict[int, list[int]] = {}
        if self.options.protect_super_experts:
            maxima = {i: profile.of(i, OutputNorms())["maximum"] for i in profile.shape.layers}
            protected = super_experts(maxima, profile.decoder_layers)
        chosen_criterion = find_criterion(self.options.criterion)
        generator = torch.Generator().manual_seed(self.options.seed)
        scores = {
            index: chosen_criterion.score(
                {s.name: profile.of(index, s) for s in chosen_criterion.measures(self.options)},
                Selection(layer, self._kept(index, layer), protected.get(index, []), generator),
            )
            for index, layer in profile.shape.layers.items()
        }
        for layer, found in scores.items():
            if not found.isfinite().all():
                raise RunError(
                    f"prune.experts: {self.options.criterion} gives experts "
                    f"{(~found.isfinite()).nonzero().flatten().tolist()} of layer {layer} no finite score: the "
                    "checkpoint's weights, or what they compute, overflow"
                )
        keep = self._choose(profile.shape, scores, protected)
        unseen = {i: (profile.of(i, Routing())["counts"] == 0).sum().item() for i in scores}
        layers = {
            i: {
                "keep": keep[i],
                "remove": sorted(set(range(len(scores[i]))) - set(keep[i])),
                "scores": [float(f"{float(s):.9g}") for s in scores[i]],
                "protected": protected.get(i, []),
            }
            for i in scores
        }
        notes = [f"layer {i}: super experts {e} are protected" for i, e in protected.items()]
        notes += [f"layer {i}: {int(n)} experts saw no calibration token" for i, n in unseen.items() if n]
        kept = sum(len(k) for k in keep.values())
        total = sum(len(s) for s in scores.values())
        return Plan(self.name, layers, {"kept": kept, "of": total, "criterion": self.options.criterion}, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Drop the experts that the plan removes, and let those that are left take over what they can."""
        refit, refitted = None, None
        if self.options.refit and decision["remove"]:
            assert inputs is not None
            refit, refitted = _refit(block, inputs)
        block.keep(decision["keep"])
        slots = [-1] * (len(decision["keep"]) + len(decision["remove"]))
        for slot, expert in enumerate(decision["keep"]):
            slots[expert] = slot
        if refit is not None:
            refitted = refit.after(block, slots, self.options.ridge, [slots[e] for e in decision["protected"]])
        experts = [
            {"score": score, "removed": slot < 0, "protected": expert in decision["protected"]}
            for expert, (score, slot) in enumerate(zip(decision["scores"], slots, strict=True))
        ]
        return {"removed": decision["remove"], "experts": experts, "slots": slots, "refit": refitted}

    def _kept(self, index: int, layer: LayerShape) -> int:
        return kept_count(self.name, index, layer, self.options)

    def _choose(
        self, shape: ModelShape, scores: dict[int, Tensor], protected: dict[int, list[int]]
    ) -> dict[int, list[int]]:
        counts = {i: self._kept(i, layer) for i, layer in shape.layers.items()}
        if self.options.scope == "uniform":
            return {i: chosen(scores[i], counts[i], shape.layers[i], protected.get(i, [])) for i in scores}
        shares = scores if find_criterion(self.options.criterion).comparable else _shares(scores)
        return _global_choice(shape, shares, sum(counts.values()), self.options.minimum, protected)


def _refit(block: MoEBlock, inputs: BlockInputs) -> tuple[LayerRefit | None, dict[str, str] | None]:
    """What refits a block once experts are gone; or why nothing can."""
    if FusedExperts(block.experts_module).has_norm:
        return None, {"skipped": "experts end in a norm: their outputs are not linear in the down projections"}
    refit = LayerRefit(block, inputs)
    if not refit.known:
        return None, {"skipped": "the router reads more than the experts do: whom it chooses instead isn't known here"}
    return refit, None


def _shares(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    """Every layer's scores as shares of their sum. Raises RunError for negative ones, of which that says nothing."""
    if negative := [i for i, found in scores.items() if bool((found < 0).any())]:
        raise RunError(
            f"prune.experts: scores of layers {negative} are negative, and scope: global compares shares of their sum; "
            "use scope: uniform, or another criterion"
        )
    return {index: found / found.sum().clamp_min(1e-300) for index, found in scores.items()}


def _global_choice(
    shape: ModelShape,
    scores: dict[int, Tensor],
    total: int,
    minimum: int | None,
    protected: dict[int, list[int]],
) -> dict[int, list[int]]:
    """The `total` highest scores of all layers, which are comparable, a minimum kept in every layer.

    Group-limited layers keep whole numbers of experts per group: they take part with one step per group.
    """
    floors = _floors(shape, total, minimum, protected)
    units: list[tuple[float, int, int]] = []  # score, layer, number of experts that come with it
    for index, layer in shape.layers.items():
        step = layer.routing_groups
        order = ranked(scores[index], layer, protected.get(index, []))
        price = scores[index][order].mean(dim=0)  # of each further step
        units += [(float(price[n // step]), index, step) for n in range(floors[index], layer.num_experts, step)]
    kept = dict(floors)
    left = total - sum(kept.values())
    for _, index, step in sorted(units, key=lambda u: (-u[0], u[1])):
        if step <= left:
            kept[index] += step
            left -= step
    return {i: chosen(scores[i], kept[i], shape.layers[i], protected.get(i, [])) for i in scores}


def _floors(shape: ModelShape, total: int, minimum: int | None, protected: dict[int, list[int]]) -> dict[int, int]:
    """Experts that each layer keeps in any case. Raises RecipeError when they are more than `total`."""
    floors: dict[int, int] = {}
    for index, layer in shape.layers.items():
        step = layer.routing_groups
        least = minimum if minimum is not None else min(layer.num_experts, 2 * layer.top_k)
        least = max(least, layer.top_k, least_kept(layer, protected.get(index, [])))
        if layer.groups:
            groups, used = layer.groups
            least = max(least, 2 * groups, -(-layer.top_k * groups // used))
        floors[index] = min(layer.num_experts, -(-least // step) * step)
    if sum(floors.values()) > total:
        raise RecipeError(
            f"prune.experts: {total} experts are to be kept, but each layer keeps a minimum and these sum to "
            f"{sum(floors.values())}; lower `minimum` or keep more"
        )
    return floors
