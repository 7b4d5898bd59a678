"""The passes `merge.average` and `merge.subspace`: several experts become one.

What they share: experts are grouped, each group's members get the neuron order of its dominant member, their weights
and router rows become one, and down projections are solved again. What that does to the routing is measured on the
calibration text and reported.

A group's router row can't be exact: that any of the members is chosen follows log Σ exp of their logits, which no row
gives unless the members' rows differ by a constant only. The row nearest to that function (least squares on the
calibration tokens) did worse on the demo model than the dominant member's own, so it is no option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import OutputNorms, Routing, Statistic
from moe_compress.counts import kept_count
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.experts import ExpertWeights
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass, Plan, register
from moe_compress.prune.criteria import Selection, find_criterion
from moe_compress.prune.super_experts import super_experts

from .align import align_experts
from .cluster import inertia
from .combine import output_gram, subspace_merge, weighted_average
from .grouping import group_experts, similarity_statistic
from .moments import output_moments
from .options import PRESETS, MergeOptions, SubspaceOptions
from .refit import LayerRefit, refit_down

# Weight of the matrices themselves in the second moment of their outputs: directions that a group's few tokens say
# nothing about are ordered by the weights, not left to round-off.
PRIOR = 1e-4


class _MergeExperts(Pass):
    """Grouping, alignment, router, refitting and report; the subclass combines matrices."""

    options: MergeOptions

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """The presets, as the options that they set."""
        told = {name: ", ".join(f"{k}: {v}" for k, v in values.items()) for name, values in PRESETS.items()}
        return {"preset": told}

    def statistics(self) -> Sequence[Statistic]:
        """Similarity of experts, how often each is used, and how much it puts out."""
        found: list[Statistic] = [similarity_statistic(self.options), Routing()]
        by_output = self.options.weight in ("reap", "energy") or self.options.cluster in ("absorb", "ream")
        if self.options.protect_super_experts or by_output:
            found.append(OutputNorms())
        return found

    def needs_inputs(self) -> bool:
        """To refit, to align, and to measure what the merge does to the routing."""
        return True

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Counts after merging."""
        return shape.with_layers(
            {i: layer.with_experts(kept_count(self.name, i, layer, self.options)) for i, layer in shape.layers.items()}
        )

    def plan(self, profile: Profile) -> Plan:
        """Group every layer's experts."""
        generator = torch.Generator().manual_seed(self.options.seed)
        alone: dict[int, list[int]] = {}
        if self.options.protect_super_experts:
            maxima = {i: profile.of(i, OutputNorms())["maximum"] for i in profile.shape.layers}
            alone = super_experts(maxima, profile.decoder_layers)
        layers: dict[int, dict[str, Any]] = {}
        for index, layer in profile.shape.layers.items():
            similarity = profile.of(index, similarity_statistic(self.options))["similarity"]
            usage = self._usage(profile, index)
            found = group_experts(
                similarity,
                kept_count(self.name, index, layer, self.options),
                self.options,
                usage,
                self._saliency(profile, index),
                layer.routing_groups,
                alone.get(index, []),
                generator,
            )
            groups = [g.members for g in found]
            layers[index] = {
                "groups": groups,
                "weights": [[float(usage[e]) for e in g] for g in groups],
                "dominant": [g.dominant for g in found],
                "spread": inertia(similarity, groups),
                "protected": alone.get(index, []),
            }
        notes = [f"layer {i}: super experts {e} are not merged" for i, e in alone.items()]
        merged = sum(len(g) > 1 for d in layers.values() for g in d["groups"])
        total = sum(len(d["groups"]) for d in layers.values())
        return Plan(self.name, layers, {"experts": total, "merged_groups": merged}, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Merge each group's weights and router rows, and solve down projections again."""
        assert inputs is not None
        groups, weights = decision["groups"], [torch.tensor(w, dtype=torch.float64) for w in decision["weights"]]
        weights = [w if float(w.sum()) > 0 else torch.ones_like(w) for w in weights]
        experts = block.num_experts
        slots = merged_slots(groups, experts)
        by_layer = self.options.refit == "layer" and not FusedExperts(block.experts_module).has_norm
        refit = LayerRefit(block, inputs) if by_layer else None
        self._align(block, decision, inputs)
        merged, refitted = self._merged(block, decision, weights, inputs)
        mixing = torch.zeros(len(groups), experts, dtype=torch.float64)
        for slot, (members, weight) in enumerate(zip(groups, weights, strict=True)):
            own = members.index(decision["dominant"][slot])
            mixing[slot, torch.tensor(members)] = self._router_mixture(weight, own)
        block.regroup(decision["dominant"], mixing, slots)
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
        }

    def _align(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs) -> None:
        if self.options.align == "none":
            return
        pairs = [
            (dominant, e)
            for members, dominant in zip(decision["groups"], decision["dominant"], strict=True)
            for e in members
            if e != dominant
        ]
        hidden = inputs.hidden_TH
        taken = (
            torch.arange(min(self.options.sample, len(hidden))) * len(hidden) // min(self.options.sample, len(hidden))
        )
        sample = hidden[taken.to(hidden.device)] if self.options.align == "activations" else None
        align_experts(FusedExperts(block.experts_module), pairs, sample, self.options.assignment == "approximate")

    def _merged(
        self, block: MoEBlock, decision: dict[str, Any], weights: list[Tensor], inputs: BlockInputs
    ) -> tuple[ExpertWeights, dict[str, Any] | None]:
        """Group j's weights in slot j, and what refitting each group alone did; groups of a size in one call."""
        groups, experts = decision["groups"], FusedExperts(block.experts_module)
        merged = experts.weights().map(lambda w: w[torch.tensor(decision["dominant"], device=w.device)])
        grams = self._grams(block, groups, inputs)
        for size in sorted({len(g) for g in groups} - {1}):
            slots = torch.tensor([s for s, g in enumerate(groups) if len(g) == size])
            weight_GN = torch.stack([weights[s] for s in slots.tolist()])
            for (name, stacked), (_, target) in zip(experts.weights().items(), merged.items(), strict=True):
                members = stacked[torch.tensor([groups[s] for s in slots.tolist()], device=stacked.device)]
                gram = grams[name][slots.to(grams[name].device)] if name in grams else None
                target[slots.to(target.device)] = self._combine(members, weight_GN, gram).to(target)
        if self.options.refit == "none":
            return merged, None
        if self.options.refit == "layer":
            skipped = "experts end in a norm: their outputs are not linear in the down projections"
            return merged, {"skipped": skipped} if experts.has_norm else None
        read = (inputs.hidden_TH, inputs.index_TK, inputs.weight_TK)
        return merged, asdict(refit_down(experts, merged, groups, *read, self.options.ridge))

    def _grams(self, block: MoEBlock, groups: list[list[int]], inputs: BlockInputs) -> dict[str, Tensor]:
        """Projection → second moment of each group's outputs [G, O, O], where the subclass needs it."""
        return {}

    def _combine(self, members: Tensor, weight_GN: Tensor, gram_GOO: Tensor | None) -> Tensor:
        """Groups' merged tensors [G, …] from their members' [G, N, …]."""
        if members.dim() == 3:  # biases
            return weighted_average(members.unsqueeze(-1), weight_GN).squeeze(-1)
        return weighted_average(members, weight_GN)

    def _usage(self, profile: Profile, index: int) -> Tensor:
        routing = profile.of(index, Routing())
        if self.options.weight == "equal":
            return torch.ones_like(routing["counts"])
        if self.options.weight == "reap":
            return self._reap(profile, index)
        if self.options.weight == "energy":
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
        count = kept_count(self.name, index, layer, self.options)
        return criterion.score(measured, Selection(layer, count, (), torch.Generator()))

    def _router_mixture(self, weight_N: Tensor, dominant: int) -> Tensor:
        if self.options.router == "mean":
            return torch.full_like(weight_N, 1 / len(weight_N))
        if self.options.router == "dominant":
            return torch.nn.functional.one_hot(torch.tensor(dominant), len(weight_N)).double()
        return weight_N / weight_N.sum()


@register
class MergeAverage(_MergeExperts):
    """Groups become the weighted average of their members."""

    name = "merge.average"
    summary = "groups of experts become their weighted average, neurons aligned, down projections solved again"
    paper = "M-SMoE (arXiv 2310.01334), HC-SMoE (2410.08589), MergeMoE (2510.14436), REAM (2604.04356): see presets"
    Options = MergeOptions


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
