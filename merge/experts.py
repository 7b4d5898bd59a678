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
from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.calib.statistics import OutputNorms, OutputSimilarity, Routing, Statistic
from moe_compress.counts import ExpertCounts, kept_count
from moe_compress.errors import RecipeError
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.dispatch import Dispatch, grouped_gram, grouped_linear
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register
from moe_compress.prune.super_experts import super_experts

from .cluster import inertia, kmeans
from .combine import output_gram, subspace_merge, weighted_average

# Weight of the matrices themselves in the second moment of their outputs: directions that a group's few tokens say
# nothing about are ordered by the weights, not left to round-off.
PRIOR = 1e-4
_CHUNK_BYTES = 512 << 20


class MergeOptions(PassOptions, ExpertCounts):
    """Options of both merging passes."""

    weight: Literal["frequency", "gate", "equal"] = Field(
        default="frequency", description="Weights of a group's members: tokens routed to them, routing weight, or equal"
    )
    router: Literal["weighted", "dominant", "mean"] = Field(
        default="weighted",
        description="The group's router row: rows by weight, the weightiest member's row, or the mean",
    )
    sample: int = Field(default=1024, ge=1, description="Tokens per layer on which outputs are compared")
    protect_super_experts: bool = Field(default=True, description="Experts with massive activations stay by themselves")
    seed: int = Field(default=0, description="Seed of the k-means starts")


class SubspaceOptions(MergeOptions):
    """Options of `merge.subspace`."""

    rank: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the joint output subspace that is kept (saves no bytes: weights stay dense)",
    )
    whiten: bool = Field(
        default=True, description="Find the subspace from the members' outputs on their tokens, not from the weights"
    )


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
                "spread": inertia(similarity, groups),
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
        merged = self._merged(block, groups, weights, inputs)
        mixing = torch.zeros(len(groups), experts, dtype=torch.float64)
        for slot, (members, weight) in enumerate(zip(groups, weights, strict=True)):
            mixing[slot, torch.tensor(members)] = self._router_mixture(weight)
        slots = merged_slots(groups, experts)
        block.regroup(decision["dominant"], mixing, slots)
        new = block.experts.weights()
        for name, target in new.items():
            for slot, tensors in merged.items():
                target[slot] = tensors[name].to(target)
        return {
            "groups": groups,
            "experts": _told(decision, weights, experts),
            "slots": slots,
            "spread_within_groups": decision["spread"],
        }

    def _merged(
        self, block: MoEBlock, groups: list[list[int]], weights: list[Tensor], inputs: BlockInputs | None
    ) -> dict[int, dict[str, Tensor]]:
        """Slot → merged tensors by name, for groups of more than one; groups of a size are merged in one call."""
        merged: dict[int, dict[str, Tensor]] = {}
        grams = self._grams(block, groups, inputs)
        for size in sorted({len(g) for g in groups} - {1}):
            slots = [s for s, g in enumerate(groups) if len(g) == size]
            weight_GN = torch.stack([weights[s] for s in slots])
            for name, stacked in block.experts.weights().items():
                members = stacked[torch.tensor([groups[s] for s in slots])]
                gram = grams[name][slots] if name in grams else None
                for slot, value in zip(slots, self._combine(members, weight_GN, gram), strict=True):
                    merged.setdefault(slot, {})[name] = value
        return merged

    def _grams(self, block: MoEBlock, groups: list[list[int]], inputs: BlockInputs | None) -> dict[str, Tensor]:
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

    def _grams(self, block: MoEBlock, groups: list[list[int]], inputs: BlockInputs | None) -> dict[str, Tensor]:
        if not self.options.whiten or self.options.rank == 1 or inputs is None:
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


def output_moments(experts: FusedExperts, groups: Sequence[Sequence[int]], inputs: BlockInputs) -> dict[str, Tensor]:
    """Projection → Σ over each group's members and their tokens of z zᵀ, z what the member's projection puts out.

    Equal to Σ_i W_i M_i W_iᵀ with M_i the second moment of member i's inputs, without the memory of the M_i.

    Returns:
        "gate" (if there is one), "up", "down" → [G, O, O] float32; groups of one get zeros.
    """
    weights = experts.weights()
    group_E = torch.full((experts.num_experts,), -1)
    for number, members in enumerate(groups):
        group_E[torch.tensor(list(members))] = number if len(members) > 1 else -1
    dispatch = Dispatch.of(inputs.index_TK, inputs.weight_TK, experts.num_experts)
    shapes = {name: matrix.shape[1] for name, matrix in weights.matrices()}
    grams = {n: torch.zeros(len(groups), o, o, device=weights.down.device) for n, o in shapes.items()}
    width = sum(o * o for o in shapes.values())
    row = 3 * experts.hidden_size + 4 * weights.up.shape[1]
    for chunk in chunks([4 * (width + rows * row) for rows in dispatch.counts_E.tolist()], _CHUNK_BYTES):
        _, part = dispatch.part(chunk)
        own = weights.part(chunk)
        input_RH = inputs.hidden_TH[part.token_R]
        activation_RI, _ = experts.with_weights(own, input_RH, part)
        group_C = group_E[chunk.start : chunk.stop]
        merged = (group_C >= 0).nonzero().flatten()
        for name, matrix in own.matrices():
            output = grouped_linear(activation_RI if name == "down" else input_RH, matrix, part.offsets_E).float()
            gram = grouped_gram(output, output, part.offsets_E)
            grams[name].index_add_(0, group_C[merged].to(gram.device), gram[merged.to(gram.device)])
    return grams


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


def _partition(
    similarity: Tensor, members: list[int], count: int, alone: Sequence[int], generator: torch.Generator
) -> list[list[int]]:
    """`count` groups of `members`; those in `alone` are groups of one."""
    single = [[e] for e in members if e in alone]
    rest = [e for e in members if e not in alone]
    if len(single) >= count:
        raise RecipeError(f"{len(single)} experts are to stay by themselves, and only {count} groups are allowed")
    inside = similarity[rest][:, rest]
    return single + [[rest[i] for i in group] for group in kmeans(inside, count - len(single), generator)]


def _dominant(group: list[int], usage: Tensor) -> int:
    return max(group, key=lambda e: (float(usage[e]), -e))
