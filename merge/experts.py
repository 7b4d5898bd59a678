"""The passes `merge.average`, `merge.subspace` and `merge.zip`: several experts become one.

What they share: experts are grouped, each group's members get the neuron order of its dominant member (or neurons are
joined one by one), their weights and router rows become one, and down projections are solved again. What that does to
the routing is measured on the calibration text and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.fisher import WeightFisher
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.outputs import OutputGram
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing, Statistic
from moe_compress.counts import kept_count
from moe_compress.errors import RecipeError, UnsupportedModelError
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.experts import ExpertWeights
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Pass, Plan, register
from moe_compress.prune.criteria import Selection, find_criterion
from moe_compress.prune.super_experts import measured_super_experts
from moe_compress.refit import LayerRefit

from .align import activations_on, align_experts, permuted
from .cluster import inertia
from .combine import fisher_average, members_of, output_gram, subspace_merge, weighted_average
from .grouping import Asked, group_layers, similarity_statistic, too_many
from .moments import output_moments
from .options import MergeOptions, SubspaceOptions, ZipOptions
from .refit import refit_down, refit_mean
from .routers import FoldedBias, router_mixing
from .scope import MergingCost, counts_by_cost, merging_floors
from .zipping import zip_experts, zipped_neurons

# Weight of the matrices themselves in the second moment of their outputs: directions that a group's few tokens say
# nothing about are ordered by the weights, not left to round-off.
PRIOR = 1e-4


class _MergeExperts(Pass):
    """Grouping, alignment, router, refitting and report; the subclass combines matrices."""

    options: MergeOptions

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """The presets, as the options that they set."""
        assert issubclass(cls.Options, MergeOptions)
        return {"preset": cls.Options.told_presets()}

    def statistics(self) -> Sequence[Statistic]:
        """Similarity of experts, how often each is used, and how much it puts out."""
        found: list[Statistic] = [similarity_statistic(self.options), Routing()]
        if self.options.weight == "fisher":
            found.append(WeightFisher())
        by_output = self.options.weight in ("reap", "energy", "fisher") or self.options.cluster in ("absorb", "ream")
        if self.options.protect_super_experts or by_output:
            found.append(OutputNorms())
        if self.options.scope == "global":
            found += [self._outputs, OutputGram()]
        return list({s.key: s for s in found}.values())

    def needs_inputs(self) -> bool:
        """To refit, to align, and to measure what the merge does to the routing."""
        return True

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Counts after merging; where layers differ they are forecast as if uniform, the total is the same.

        Raises RecipeError where the target has no router that leads several rows to one, or loads only uniform layers.
        """
        if self.options.scope == "global":
            if self.target.uniform_experts:
                raise RecipeError(
                    f"{self.name}: scope 'global' gives layers different numbers of experts, which the target "
                    f"{self.target.name!r} can't load; use scope: uniform, or target: native"
                )
            self._floors(shape, {})
        counts = {i: self._count(i, layer) for i, layer in shape.layers.items()}
        if self.options.router == "remap":
            if self.target.quantized_format != "native":
                raise RecipeError(
                    f"{self.name}: the target {self.target.name!r} has no router whose rows lead to fewer experts: set "
                    "`target: native`, or another `router`"
                )
            return shape.with_layers(
                {
                    i: replace(layer.with_experts(counts[i]), rules=(*layer.rules, "remap"))
                    for i, layer in shape.layers.items()
                }
            )
        return shape.with_experts(counts)

    def plan(self, profile: Profile) -> Plan:
        """Group every layer's experts."""
        generator = torch.Generator().manual_seed(self.options.seed)
        alone = measured_super_experts(profile) if self.options.protect_super_experts else {}
        counts = {i: self._count(i, layer) for i, layer in profile.shape.layers.items()}
        told: dict[str, Any] = {}
        if self.options.scope == "global":
            counts, told = counts_by_cost(
                profile.shape.with_layers({i: self._routed(layer) for i, layer in profile.shape.layers.items()}),
                counts,
                self._floors(profile.shape, alone),
                {i: self._merging_cost(profile, i) for i in counts},
                lambda tried: group_layers(
                    [self._asked(profile, i, count, alone.get(i, [])) for i, count in tried], self.options, generator
                ),
            )
        asked = {i: self._asked(profile, i, count, alone.get(i, [])) for i, count in counts.items()}
        found = dict(zip(asked, group_layers(list(asked.values()), self.options, generator), strict=True))
        layers: dict[int, dict[str, Any]] = {}
        for index, own in found.items():
            groups = [g.members for g in own]
            layers[index] = {
                "groups": groups,
                "weights": [[float(asked[index].usage_E[e]) for e in g] for g in groups],
                "dominant": [g.dominant for g in own],
                "spread": inertia(asked[index].similarity_EE, groups),
                "protected": alone.get(index, []),
            }
        notes = [f"layer {i}: super experts {e} are not merged" for i, e in alone.items()]
        placed = {i: sorted(e for g in own for e in g.placed) for i, own in found.items()}
        notes += [
            f"layer {i}: no two groups could be joined within max_group: {self.options.bound}; those of experts {e} "
            "were broken up, and these placed where room was left"
            for i, e in placed.items()
            if e
        ]
        merged = sum(len(g) > 1 for d in layers.values() for g in d["groups"])
        total = sum(len(d["groups"]) for d in layers.values())
        return Plan(self.name, layers, {"experts": total, "merged_groups": merged, **told}, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Merge each group's weights and router rows, and solve down projections again."""
        assert inputs is not None
        groups, weights = decision["groups"], [torch.tensor(w, dtype=torch.float64) for w in decision["weights"]]
        weights = [w if float(w.sum()) > 0 else torch.ones_like(w) for w in weights]
        experts = block.num_experts
        slots = merged_slots(groups, experts)
        refit = LayerRefit(block, inputs) if self.options.refit == "layer" else None
        order_EI = self._align(block, decision, inputs)
        merged = self._combined(block, decision, weights, inputs, order_EI)
        refitted = self._refitted(block, decision, weights, inputs, merged)
        folded = FoldedBias(block, groups) if self.options.router == "folded" else None
        if self.options.router == "remap":
            block.remap(decision["dominant"], slots)
        else:
            mixing = router_mixing(self.options.router, groups, weights, decision["dominant"])
            block.regroup(decision["dominant"], mixing, slots)
        if folded is not None:
            folded.put(block)
        for (_, new), (_, value) in zip(block.experts.weights().items(), merged.items(), strict=True):
            new.copy_(value)
        if refit is not None:
            refitted = refit.after(block, slots, self.options.ridge, [slots[e] for e in decision["protected"]])
        return {
            "groups": groups,
            "experts": _told(decision, weights, experts),
            "slots": slots,
            "spread_within_groups": decision["spread"],
            "refit": refitted,
            "router": {"skipped": folded.missing} if folded is not None and folded.missing else self.options.router,
        }

    def _align(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs) -> Tensor | None:
        """The order that experts' neurons came from, [E, I]; None where nothing was moved."""
        if self.options.align == "none":
            return None
        pairs = [
            (dominant, e)
            for members, dominant in zip(decision["groups"], decision["dominant"], strict=True)
            for e in members
            if e != dominant
        ]
        sample = self._sample(inputs) if self.options.align == "activations" else None
        approximate = self.options.assignment == "approximate"
        return align_experts(FusedExperts(block.experts_module), pairs, sample, approximate)

    def _sample(self, inputs: BlockInputs) -> Tensor:
        """Tokens spread over all, [S, H]."""
        hidden = inputs.hidden_TH
        count = min(self.options.sample, len(hidden))
        return hidden[(torch.arange(count) * len(hidden) // count).to(hidden.device)]

    def _combined(
        self, block: MoEBlock, decision: dict[str, Any], weights: list[Tensor], inputs: BlockInputs,
        order_EI: Tensor | None,
    ) -> ExpertWeights:  # fmt: skip
        """Group j's weights in slot j; groups of a size together, a few at a time."""
        groups, experts = decision["groups"], FusedExperts(block.experts_module)
        fisher = self._fisher(block, order_EI) if self.options.weight == "fisher" else {}
        merged = experts.weights().map(lambda w: w[torch.tensor(decision["dominant"], device=w.device)])
        grams = self._grams(block, groups, inputs)
        for size in sorted({len(g) for g in groups} - {1}):
            slots = torch.tensor([s for s, g in enumerate(groups) if len(g) == size])
            weight_GN = torch.stack([weights[s] for s in slots.tolist()])
            for (name, stacked), (_, target) in zip(experts.weights().items(), merged.items(), strict=True):
                chosen_GN = torch.tensor([groups[s] for s in slots.tolist()])
                for part, members in members_of(stacked, chosen_GN):
                    own = slots[part]
                    if fisher:
                        value = fisher_average(members, fisher[name][chosen_GN[part]], weight_GN[part])
                    else:
                        gram = grams[name][own.to(grams[name].device)] if name in grams else None
                        value = self._combine(members, weight_GN[part], gram)
                    target[own.to(target.device)] = value.to(target)
        return merged

    def _refitted(
        self, block: MoEBlock, decision: dict[str, Any], weights: list[Tensor], inputs: BlockInputs,
        merged: ExpertWeights,
    ) -> dict[str, Any] | None:  # fmt: skip
        """Refit each group alone, in place, where that is asked. Returns what it did."""
        groups, experts = decision["groups"], FusedExperts(block.experts_module)
        if self.options.refit in ("none", "layer"):
            return None
        if self.options.refit == "mean":
            return asdict(refit_mean(experts, merged, groups, weights, self._sample(inputs), self.options.ridge))
        read = (inputs.hidden_TH, inputs.index_TK, inputs.weight_TK)
        return asdict(refit_down(experts, merged, groups, *read, self.options.ridge))

    def _fisher(self, block: MoEBlock, order_EI: Tensor | None) -> dict[str, Tensor]:
        """What was measured of the experts' weights, neurons in the order that they have now."""
        assert self.profile is not None
        found = ExpertWeights(**self.profile.of(block.layer, WeightFisher()))
        return dict((found if order_EI is None else permuted(found, order_EI)).items())

    def _grams(self, block: MoEBlock, groups: list[list[int]], inputs: BlockInputs) -> dict[str, Tensor]:
        """Projection → second moment of each group's outputs [G, O, O], where the subclass needs it."""
        return {}

    def _combine(self, members: Tensor, weight_GN: Tensor, gram_GOO: Tensor | None) -> Tensor:
        """Groups' merged tensors [G, …] from their members' [G, N, …]."""
        if members.dim() == 3:  # biases
            return weighted_average(members.unsqueeze(-1), weight_GN).squeeze(-1)
        return weighted_average(members, weight_GN)

    def _count(self, index: int, layer: LayerShape) -> int:
        """Experts that a layer keeps; a router that stays as it is sets no limit to that."""
        count = kept_count(self.name, index, self._routed(layer), self.options)
        problem = too_many(layer.num_experts, count, self.options.bound)
        if problem and self.options.scope == "uniform":
            raise RecipeError(f"{self.name}: layer {index}: {problem}")
        return count

    @property
    def _outputs(self) -> OutputSimilarity:
        return OutputSimilarity(sample=self.options.sample)

    def _routed(self, layer: LayerShape) -> LayerShape:
        """With what the router asks of the number of experts; one that stays as it is asks for nothing."""
        return replace(layer, top_k=1, groups=None) if self.options.router == "remap" else layer

    def _floors(self, shape: ModelShape, alone: dict[int, list[int]]) -> dict[int, int]:
        options, total = self.options, sum(self._count(i, layer) for i, layer in shape.layers.items())
        routed = shape.with_layers({i: self._routed(layer) for i, layer in shape.layers.items()})
        return merging_floors(self.name, routed, total, options.minimum, options.bound, alone)

    def _merging_cost(self, profile: Profile, index: int) -> MergingCost:
        gram, similarity = profile.of(index, OutputGram()), profile.of(index, self._outputs)["similarity"]
        if "relative" not in gram:
            raise UnsupportedModelError(
                f"{self.name}: layer {index} returns no hidden state per token that merging's errors could be compared "
                "with: use scope: uniform"
            )
        return MergingCost(similarity, gram["relative"].diagonal(), self._usage(profile, index))

    def _asked(self, profile: Profile, index: int, count: int, alone: Sequence[int]) -> Asked:
        """A layer with what it is grouped by."""
        groups = self._routed(profile.shape.layers[index]).routing_groups
        similarity = profile.of(index, similarity_statistic(self.options))["similarity"]
        usage, saliency = self._usage(profile, index), self._saliency(profile, index)
        return Asked(similarity, count, usage, saliency, groups, alone)

    def _usage(self, profile: Profile, index: int) -> Tensor:
        routing = profile.of(index, Routing())
        if self.options.weight == "equal":
            return torch.ones_like(routing["counts"])
        if self.options.weight == "reap":
            return self._reap(profile, index)
        if self.options.weight in ("energy", "fisher"):
            return profile.of(index, OutputNorms())["gated_norm_squared"]
        return routing["counts" if self.options.weight == "frequency" else "gate"]

    def _saliency(self, profile: Profile, index: int) -> Tensor:
        """Who stays: the most used, or those that REAP scores highest."""
        if self.options.cluster in ("absorb", "ream"):
            return self._reap(profile, index)
        return profile.of(index, Routing())["counts"]

    def _reap(self, profile: Profile, index: int) -> Tensor:
        criterion, layer = find_criterion("reap"), profile.shape.layers[index]
        measured = {s.name: profile.of(index, s) for s in criterion.measures(self.options)}
        count = self._count(index, layer)
        return criterion.score(measured, Selection(layer, count, (), torch.Generator()))


@register
class MergeAverage(_MergeExperts):
    """Groups become the weighted average of their members."""

    name = "merge.average"
    summary = "groups of experts become their weighted average, neurons aligned, down projections solved again"
    paper = "M-SMoE (arXiv 2310.01334), HC-SMoE (2410.08589), MergeMoE (2510.14436), REAM (2604.04356): see presets"
    Options = MergeOptions


@register
class MergeZip(_MergeExperts):
    """Groups' neurons are joined, the most alike first, until one expert's number is left."""

    name = "merge.zip"
    summary = "neurons of a group's experts are joined by correlation, also two of one, until one's number is left"
    paper = "ZipIt, arXiv 2305.03053"
    Options = ZipOptions
    options: ZipOptions

    def _combined(
        self, block: MoEBlock, decision: dict[str, Any], weights: list[Tensor], inputs: BlockInputs,
        order_EI: Tensor | None,
    ) -> ExpertWeights:  # fmt: skip
        groups, experts = decision["groups"], FusedExperts(block.experts_module)
        own, sample = experts.weights(), self._sample(inputs)
        merged = own.map(lambda w: w[torch.tensor(decision["dominant"], device=w.device)])
        for slot, members in enumerate(groups):
            if len(members) == 1:
                continue
            chosen = own.map(lambda w, m=members: w[torch.tensor(m, device=w.device)])  # type: ignore[misc]
            place_NI = zipped_neurons(activations_on(experts, chosen, sample))
            zipped = zip_experts(chosen.map(lambda w: w.unsqueeze(0)), weights[slot][None], place_NI[None])
            for (_, target), (_, value) in zip(merged.items(), zipped.items(), strict=True):
                target[slot] = value[0].to(target)
        return merged


@register
class MergeSubspace(_MergeExperts):
    """Groups become the weighted average, projected onto the joint output subspace of their members."""

    name = "merge.subspace"
    summary = "as merge.average, and projected onto the joint subspace of a group's outputs (SVD, whitened, truncated)"
    paper = "Sub-MoE, arXiv 2506.23266"
    Options = SubspaceOptions
    options: SubspaceOptions

    def _grams(self, block: MoEBlock, groups: list[list[int]], inputs: BlockInputs) -> dict[str, Tensor]:
        if not self.options.whiten or self.options.rank == 1:
            return {}
        return output_moments(FusedExperts(block.experts_module), groups, inputs)

    def _combine(self, members: Tensor, weight_GN: Tensor, gram_GOO: Tensor | None) -> Tensor:
        if members.dim() == 3:
            return super()._combine(members, weight_GN, gram_GOO)
        rank = max(1, round(self.options.rank * members.shape[-2]))
        plain = output_gram(members)
        if gram_GOO is not None:
            gram_GOO = _unit_trace(gram_GOO.to(plain)) + PRIOR * _unit_trace(plain)
        return subspace_merge(members, weight_GN, rank, plain if gram_GOO is None else gram_GOO)


def merged_slots(groups: Sequence[Sequence[int]], experts: int) -> list[int]:
    """Slot of each expert when group j becomes slot j."""
    slots = torch.full((experts,), -1, dtype=torch.int64)
    for slot, members in enumerate(groups):
        slots[torch.tensor(list(members))] = slot
    return slots.tolist()


def _told(decision: dict[str, Any], weights: Sequence[Tensor], experts: int) -> list[dict[str, Any]]:
    """What is said of each expert: with whom it was merged, its weight among them, whose router row came first."""
    told: list[dict[str, Any]] = [{} for _ in range(experts)]
    for members, weight, dominant in zip(decision["groups"], weights, decision["dominant"], strict=True):
        for expert, share in zip(members, (weight / weight.sum()).tolist(), strict=True):
            told[expert] = {
                "merged_with": [e for e in members if e != expert],
                "weight": share,
                "dominant": expert == dominant,
                "protected": expert in decision["protected"],
            }
    return told


def _unit_trace(gram_GOO: Tensor) -> Tensor:
    trace = gram_GOO.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return gram_GOO / torch.where(trace > 0, trace, 1)
