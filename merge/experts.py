"""The passes `merge.average` and `merge.subspace`: experts with similar outputs become one.

What they share: experts are grouped by the similarity of their outputs, each group's router rows become one row, and
what that does to the routing is measured on the calibration text and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.routing import merged_slots
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing, Statistic
from moe_compress.counts import ExpertCounts, kept_count
from moe_compress.model import ExpertWeights, MoEBlock
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register
from moe_compress.prune.super_experts import super_experts

from .cluster import inertia, kmeans
from .combine import subspace_merge, weighted_average


class MergeOptions(PassOptions, ExpertCounts):
    """Options of both merging passes."""

    weight: Literal["frequency", "gate", "equal"] = Field(
        default="frequency", description="Weights of a group's members: tokens routed to them, routing weight, or equal"
    )
    router: Literal["weighted", "dominant", "mean"] = Field(
        default="weighted",
        description="The group's router row: members' rows by their weights, the row of the member with the largest, or their mean",
    )
    sample: int = Field(default=1024, ge=1, description="Tokens per layer on which outputs are compared")
    protect_super_experts: bool = Field(default=True, description="Experts with massive activations stay by themselves")
    seed: int = Field(default=0, description="Seed of the k-means starts")


class SubspaceOptions(MergeOptions):
    """Options of `merge.subspace`."""

    rank: float = Field(
        default=0.75, gt=0, le=1, description="Share of the joint output subspace that is kept; 1 is plain averaging"
    )
    whiten: bool = Field(default=True, description="Weigh the subspace by the second moments of each member's inputs")


class _MergeExperts(Pass):
    """Grouping, router and report; the subclass combines matrices."""

    options: MergeOptions

    def statistics(self) -> Sequence[Statistic]:
        """Similarity of outputs, and how often each expert is used."""
        found: list[Statistic] = [self._similarity, Routing()]
        if self.options.protect_super_experts:
            found.append(OutputNorms())
        return found

    def needs_inputs(self) -> bool:
        """To measure what the merge does to the routing."""
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
            similarity = profile.of(index, self._similarity)["similarity"]
            usage = self._usage(profile, index)
            count = kept_count(self.name, index, layer, self.options)
            routing_groups = layer.groups[0] if layer.groups else 1
            size = layer.num_experts // routing_groups
            groups: list[list[int]] = []
            for first in range(0, layer.num_experts, size):
                members = list(range(first, first + size))
                groups += _partition(similarity, members, count // routing_groups, alone.get(index, []), generator)
            groups.sort(key=lambda g: _dominant(g, usage))
            layers[index] = {
                "groups": groups,
                "weights": [[float(usage[e]) for e in g] for g in groups],
                "dominant": [_dominant(g, usage) for g in groups],
                "inertia": inertia(similarity, groups),
                "protected": alone.get(index, []),
            }
        notes = [f"layer {i}: super experts {e} are not merged" for i, e in alone.items()]
        merged = sum(len(g) > 1 for d in layers.values() for g in d["groups"])
        total = sum(len(d["groups"]) for d in layers.values())
        return Plan(self.name, layers, {"experts": total, "merged_groups": merged}, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Merge each group's weights and router rows."""
        groups, weights = decision["groups"], [torch.tensor(w, dtype=torch.float64) for w in decision["weights"]]
        weights = [w if float(w.sum()) > 0 else torch.ones_like(w) for w in weights]
        experts = block.num_experts
        old = block.experts.weights()
        merged = self._merged(block, old, groups, weights, inputs)
        mixing = torch.zeros(len(groups), experts, dtype=torch.float64)
        for slot, (members, weight) in enumerate(zip(groups, weights, strict=True)):
            mixing[slot, torch.tensor(members)] = self._router_mixture(weight)
        block.regroup(decision["dominant"], mixing)
        new = block.experts.weights()
        for name, target in new.items():
            for slot, tensors in merged.items():
                target[slot] = tensors[name].to(target)
        return {
            "groups": groups,
            "slots": merged_slots(groups, experts),
            "protected": decision["protected"],
            "output_similarity_lost": decision["inertia"],
        }

    def _merged(
        self,
        block: MoEBlock,
        old: ExpertWeights,
        groups: list[list[int]],
        weights: list[Tensor],
        inputs: BlockInputs | None,
    ) -> dict[int, dict[str, Tensor]]:
        """Slot → merged tensors by name, for groups of more than one; groups of a size are merged in one call."""
        merged: dict[int, dict[str, Tensor]] = {}
        for size in sorted({len(g) for g in groups} - {1}):
            slots = [s for s, g in enumerate(groups) if len(g) == size]
            members_GN = torch.tensor([groups[s] for s in slots])
            weight_GN = torch.stack([weights[s] for s in slots])
            for name, stacked in old.items():
                values = self._combine(name, stacked[members_GN], weight_GN, members_GN, block, inputs)
                for slot, value in zip(slots, values, strict=True):
                    merged.setdefault(slot, {})[name] = value
        return merged

    def _combine(
        self,
        name: str,
        members: Tensor,
        weight_GN: Tensor,
        members_GN: Tensor,
        block: MoEBlock,
        inputs: BlockInputs | None,
    ) -> Tensor:
        """Groups' merged tensors [G, …] from their members' [G, N, …]."""
        if members.dim() == 3:  # biases
            return weighted_average(members.unsqueeze(-2), weight_GN).squeeze(-2)
        return weighted_average(members, weight_GN)

    def _usage(self, profile: Profile, index: int) -> Tensor:
        routing = profile.of(index, Routing())
        if self.options.weight == "equal":
            return torch.ones_like(routing["counts"])
        return routing["counts" if self.options.weight == "frequency" else "gate"]

    def _router_mixture(self, weight_N: Tensor) -> Tensor:
        if self.options.router == "mean":
            return torch.full_like(weight_N, 1 / len(weight_N))
        if self.options.router == "dominant":
            return torch.nn.functional.one_hot(weight_N.argmax(), len(weight_N)).double()
        return weight_N / weight_N.sum()

    @property
    def _similarity(self) -> OutputSimilarity:
        return OutputSimilarity(sample=self.options.sample)


@register
class MergeAverage(_MergeExperts):
    """Groups become the weighted average of their members."""

    name = "merge.average"
    summary = "experts with similar outputs become their weighted average"
    paper = "HC-SMoE, arXiv 2410.08589, and Sub-MoE, arXiv 2506.23266, without truncation"
    Options = MergeOptions


@register
class MergeSubspace(_MergeExperts):
    """Groups become the weighted average, projected onto the joint output subspace of their members."""

    name = "merge.subspace"
    summary = "experts with similar outputs are merged in their joint subspace (SVD, whitened, truncated)"
    paper = "Sub-MoE, arXiv 2506.23266"
    Options = SubspaceOptions
    options: SubspaceOptions

    def _merged(
        self,
        block: MoEBlock,
        old: ExpertWeights,
        groups: list[list[int]],
        weights: list[Tensor],
        inputs: BlockInputs | None,
    ) -> dict[int, dict[str, Tensor]]:
        self._moments: dict[str, Tensor] = {}
        if self.options.whiten and self.options.rank < 1:
            assert inputs is not None
            self._moments = _second_moments(block, inputs)
        try:
            return super()._merged(block, old, groups, weights, inputs)
        finally:
            self._moments = {}

    def _combine(
        self,
        name: str,
        members: Tensor,
        weight_GN: Tensor,
        members_GN: Tensor,
        block: MoEBlock,
        inputs: BlockInputs | None,
    ) -> Tensor:
        if members.dim() == 3:
            return super()._combine(name, members, weight_GN, members_GN, block, inputs)
        rank = max(1, round(self.options.rank * members.shape[-2]))
        moments = self._moments.get("down" if name == "down" else "input")
        return subspace_merge(members, weight_GN, rank, None if moments is None else moments[members_GN])


def _partition(
    similarity: Tensor, members: list[int], count: int, alone: Sequence[int], generator: torch.Generator
) -> list[list[int]]:
    """`count` groups of `members`; those in `alone` are groups of one."""
    single = [[e] for e in members if e in alone]
    rest = [e for e in members if e not in alone]
    if len(single) >= count:
        raise ValueError(f"{len(single)} experts are to stay by themselves, and only {count} groups are allowed")
    inside = similarity[rest][:, rest]
    return single + [[rest[i] for i in group] for group in kmeans(inside, count - len(single), generator)]


def _dominant(group: list[int], usage: Tensor) -> int:
    return max(group, key=lambda e: (float(usage[e]), -e))


def _second_moments(block: MoEBlock, inputs: BlockInputs) -> dict[str, Tensor]:
    """Second moments of gate/up inputs and of down inputs of all experts; of the whole layer where one saw no token."""
    parts = list(inputs.moments(block.experts))
    rows = torch.cat([p.rows_C for p in parts])
    found = {
        "input": torch.cat([p.input_CHH.cpu() for p in parts]),
        "down": torch.cat([p.activation_CII.cpu() for p in parts]),
    }
    for moment in found.values():
        layer = moment.sum(dim=0) / rows.sum().clamp_min(1)
        moment[rows == 0] = layer
    return found
