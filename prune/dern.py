"""The pass `prune.dern`: drop experts, give their neurons to the kept experts that they fit, recombine (DERN).

DERN (arXiv 2509.10377), nothing trained: the experts with the least routing weight go. Each of their neurons moves to
the kept expert that has the neuron most like it, if that is alike enough, else it is lost. Every expert that got some
is brought back to its width by weighted spherical k-means over its neurons. Routers lose the dropped experts' rows.
The paper starts it from the neurons with the largest |gate|, here the largest weight of the gate's row (up's where
there is no gate); where those are nearly copies of each other, directions are lost, so starts are by default the
expert's own.

What the paper doesn't do: `refit` solves the layer's down projections again on the calibration tokens
(compress/refit.py).

Letters: E experts, S of them kept, I neurons of each, H hidden, N neurons of the receiving experts, D = length of a
neuron's whole vector: its rows of gate and up with their biases, and its column of down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import OutputNorms, Routing, Statistic
from moe_compress.counts import ExpertCounts, chosen, kept_count, kept_slots
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock
from moe_compress.model.dispatch import grouped_linear
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register
from moe_compress.refit import LayerRefit, Ridge

from .super_experts import measured_super_experts

# Similarities made at a time, bytes; and turns of k-means at the most.
_CHUNK_BYTES = 256 << 20
_TURNS = 20


class DernOptions(PassOptions, ExpertCounts):
    """Options of `prune.dern`."""

    threshold: float = Field(
        default=0.6, ge=-1, le=1, description="Cosine above which a neuron of a dropped expert moves; else it is lost"
    )
    gate: bool = Field(default=False, description="Compare neurons by their gate rows too, not by up and down alone")
    start: Literal["own", "gate"] = Field(
        default="own",
        description="Clusters start from the kept expert's own neurons, or those with the largest weight in their "
        "gate's row (as published)",
    )
    refit: bool = Field(default=True, description="Solve the layer's down projections again on the calibration tokens")
    ridge: Ridge = 0.25
    protect_super_experts: bool = Field(default=True, description="Never drop experts with massive activations")


@register
class PruneDern(Pass):
    """Drop experts and recombine their neurons with those of the kept."""

    name = "prune.dern"
    summary = "drop experts, their neurons go to the kept experts that they fit, k-means back to the former width"
    paper = "DERN, arXiv 2509.10377 (as published: refit: false, start: gate)"
    Options = DernOptions
    options: DernOptions

    def statistics(self) -> Sequence[Statistic]:
        """Routing weight of each expert, and what finds super experts."""
        return [Routing(), *([OutputNorms()] if self.options.protect_super_experts else [])]

    def needs_inputs(self) -> bool:
        """To refit."""
        return self.options.refit

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Counts after dropping."""
        counts = {i: kept_count(self.name, i, layer, self.options) for i, layer in shape.layers.items()}
        return shape.with_experts(counts)

    def plan(self, profile: Profile) -> Plan:
        """Keep the experts with the most routing weight."""
        protected = measured_super_experts(profile) if self.options.protect_super_experts else {}
        layers = {}
        for index, layer in profile.shape.layers.items():
            routing = profile.of(index, Routing())
            importance = routing["gate"] / routing["tokens"].clamp_min(1)
            own = protected.get(index, [])
            keep = chosen(importance, kept_count(self.name, index, layer, self.options), layer, own)
            layers[index] = {"keep": keep, "importance": importance.tolist(), "protected": own}
        notes = [f"layer {i}: super experts {e} are protected" for i, e in protected.items()]
        kept = sum(len(d["keep"]) for d in layers.values())
        total = sum(layer.num_experts for layer in profile.shape.layers.values())
        return Plan(self.name, layers, {"kept": kept, "of": total}, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Move neurons, recombine them, drop experts, and solve down projections again."""
        experts, keep = FusedExperts(block.experts_module), decision["keep"]
        slots = kept_slots(keep, block.num_experts)
        refit = LayerRefit(block, inputs) if inputs is not None else None
        importance = torch.tensor(decision["importance"], dtype=torch.float64)
        weights = experts.weights()
        moved = move(weights, keep, self.options.threshold, self.options.gate)
        recombined = recombine(weights, keep, moved, importance, self.options.start == "own")
        block.keep(keep)
        for (_, old), (_, new) in zip(block.experts.weights().items(), recombined.items(), strict=True):
            old.copy_(new)
        received = torch.bincount(moved.slot_N, minlength=len(keep)).tolist()
        from_E = torch.bincount(moved.expert_N, minlength=len(slots)).tolist()
        report: dict[str, Any] = {
            "slots": slots,
            "removed": [e for e, slot in enumerate(slots) if slot < 0],
            "experts": [
                {
                    "importance": decision["importance"][e],
                    "removed": slot < 0,
                    "protected": e in decision["protected"],
                    **({"neurons_moved": from_E[e]} if slot < 0 else {"neurons_received": received[slot]}),
                }
                for e, slot in enumerate(slots)
            ],
        }
        if refit is not None:
            report["refit"] = refit.after(block, slots, self.options.ridge)
        return report


class Moved(NamedTuple):
    """Neurons of dropped experts that move: whose they were, which they were, the slot that gets them."""

    expert_N: Tensor
    neuron_N: Tensor
    slot_N: Tensor


def move(weights: ExpertWeights, keep: Sequence[int], threshold: float, gate: bool) -> Moved:
    """Where the neurons of dropped experts go: to the kept expert with the neuron of the largest cosine, if that is
    above the threshold. [E − S]·I rows times S·I columns of similarities, a part at a time."""
    experts, neurons = weights.up.shape[:2]
    kept = torch.tensor(list(keep), device=weights.up.device)
    dropped = torch.tensor([e for e in range(experts) if e not in set(keep)], device=weights.up.device)
    if not len(dropped):
        return Moved(dropped, dropped, dropped)
    parts = [weights.up, weights.down.transpose(1, 2)]
    if gate and weights.gate is not None:
        parts.append(weights.gate)

    def units(which: Tensor) -> Tensor:
        return normalize(torch.cat([part[which].float() for part in parts], dim=2), dim=2, eps=1e-30).flatten(0, 1)

    kept_ND, dropped_ND = units(kept), units(dropped)
    found = [(part @ kept_ND.T).max(dim=1) for part in dropped_ND.split(max(1, _CHUNK_BYTES // (4 * len(kept_ND))))]
    cosine, nearest = torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
    taken = (cosine > threshold).nonzero().flatten()
    return Moved(dropped[taken // neurons], taken % neurons, nearest[taken] // neurons)


def recombine(
    weights: ExpertWeights, keep: Sequence[int], moved: Moved, importance_E: Tensor, own: bool = True
) -> ExpertWeights:
    """The kept experts, slot by slot; those that received neurons with as many as before, centres of their clusters.

    Args:
        weights: of all experts.
        keep, moved: what stays, what moves.
        importance_E: what an expert's neurons weigh.
        own: clusters start from the experts' own neurons, not from those with the largest weight in their gate's row.
    """
    kept = torch.tensor(list(keep), device=weights.up.device)
    result = weights.map(lambda w: w[kept.to(w.device)].clone())
    receiving = moved.slot_N.unique()
    if not len(receiving):
        return result
    neurons = weights.up.shape[1]
    # Own neurons and received ones, sorted by slot.
    own_expert = kept[receiving].repeat_interleave(neurons)
    own_neuron = torch.arange(neurons, device=kept.device).repeat(len(receiving))
    expert, neuron = torch.cat([own_expert, moved.expert_N]), torch.cat([own_neuron, moved.neuron_N])
    slot = torch.cat([receiving.repeat_interleave(neurons), moved.slot_N])
    order = slot.argsort(stable=True)
    expert, neuron, slot = expert[order], neuron[order], slot[order]
    place = torch.searchsorted(receiving, slot)  # of the receiving, one after the other
    columns = {n: w.transpose(1, 2) if n == "down" else w for n, w in weights.items() if n != "down_bias"}
    vectors = {n: w[expert, neuron].double().view(len(expert), -1) for n, w in columns.items()}
    first = vectors["gate" if "gate" in vectors else "up"].abs().amax(dim=1)
    if own:
        first = (expert == kept[slot]).double()
    importance_N = importance_E.double().to(expert.device)[expert].clamp_min(1e-30)
    whole_SID = clusters(torch.cat([*vectors.values()], dim=1), importance_N, first, place, len(receiving), neurons)
    split = whole_SID.split([v.shape[1] for v in vectors.values()], dim=2)
    for name, value in zip(vectors, split, strict=True):
        target = getattr(result, name)
        new = value.transpose(1, 2) if name == "down" else value.view(len(receiving), *columns[name].shape[1:])
        target[receiving] = new.to(target)
    return result


def clusters(
    vector_ND: Tensor, weight_N: Tensor, first_N: Tensor, group_N: Tensor, groups: int, centres: int
) -> Tensor:
    """Weighted spherical k-means of every group on its own, all in one: [groups, centres, D] float64.

    Directions are clustered; a centre's length is the weighted mean of its members'. Vectors of length 0 weigh nothing.

    Args:
        vector_ND: sorted by group.
        weight_N: of each, positive.
        first_N: of each group, those with the largest are where its centres start.
        group_N: ascending; each group has at least `centres`.
    """
    length_N = torch.linalg.vector_norm(vector_ND, dim=1)
    unit_ND = normalize(vector_ND, dim=1, eps=1e-30)
    offsets = torch.bincount(group_N, minlength=groups).cumsum(0).to(torch.int32)
    order = first_N.argsort(descending=True, stable=True)
    order = order[group_N[order].argsort(stable=True)]  # group by group, the largest first
    starts = offsets.long() - torch.bincount(group_N, minlength=groups)
    at = order[(starts.unsqueeze(1) + torch.arange(centres, device=order.device)).flatten()]
    centre = unit_ND[at].view(groups, centres, -1)
    length = length_N[at].clone()
    assigned = torch.full_like(group_N, -1)
    for _ in range(_TURNS):
        nearest = grouped_linear(unit_ND.float(), centre.float(), offsets).argmax(dim=1) + centres * group_N
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        total = torch.zeros(groups * centres, unit_ND.shape[1], dtype=torch.float64, device=unit_ND.device)
        total.index_add_(0, assigned, unit_ND * weight_N.unsqueeze(1))
        mass, sizes = (torch.zeros(groups * centres, dtype=torch.float64, device=unit_ND.device) for _ in range(2))
        mass.index_add_(0, assigned, weight_N)
        sizes.index_add_(0, assigned, weight_N * length_N)
        filled = mass > 0  # an empty cluster stays where it was
        centre = torch.where(filled.unsqueeze(1), normalize(total, dim=1, eps=1e-30), centre.flatten(0, 1))
        centre = centre.view(groups, centres, -1)
        length = torch.where(filled, sizes / mass.clamp_min(1e-300), length)
    found: Tensor = centre * length.view(groups, centres, 1)
    return found
