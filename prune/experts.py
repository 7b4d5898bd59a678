"""The pass `prune.experts`: remove whole experts, and the router's rows with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.batches import TokenBatches, split
from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import OutputNorms, Result, Routing, Statistic
from moe_compress.counts import ExpertCounts, kept_count
from moe_compress.errors import RecipeError, RunError
from moe_compress.model import MoEBlock
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.model.sweep import Sweep
from moe_compress.passes import Lesson, Pass, Plan, register
from moe_compress.rounds import check_rounds, number_of_rounds, reached, said

from . import attribution, diep, gram_greedy, naee, stun  # noqa: F401  (they register criteria)
from .choice import Guards, as_mask, best, cheapest_counts, evened, global_counts, removal_order, shares, standing
from .criteria import CRITERIA, Selection, find_criterion
from .drop import drop_experts
from .novices import put_means, with_novices
from .options import PruneOptions
from .removal import RemovalLoss, dropping_costs
from .sensitivity import loss_of, measured_costs
from .super_experts import measured_super_experts


@register
class PruneExperts(Pass):
    """Remove the experts that matter least by a criterion."""

    name = "prune.experts"
    summary = "remove whole experts by a criterion, uniformly, globally or by layer sensitivity"
    paper = "REAP, arXiv 2510.13999 (default criterion)"
    leaves = frozenset({"fused", "ragged"})
    Options = PruneOptions
    options: PruneOptions

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """The registered criteria, and the presets."""
        return {"preset": PruneOptions.told_presets(), "criterion": {c.name: c.source for c in CRITERIA.values()}}

    def statistics(self) -> Sequence[Statistic]:
        """The criterion's, and what finds super experts; nothing where they are measured on part of the text."""
        return [] if self.learns() else self._measures()

    def learns(self) -> bool:
        """Where the whole model has to run to decide."""
        return self.options.checked or self.options.scope == "sensitivity"

    def needs_original(self) -> bool:
        """It is compared with the model as the passes before have left it."""
        return False

    def goes_back(self) -> bool:
        """Where gradients say what a layer's experts are worth, or the criterion takes them."""
        return any(statistic.gradients for statistic in self._measures())

    def domains(self) -> list[str] | None:
        """The domains that experts are kept for."""
        return self.options.domains

    def needs_inputs(self) -> bool:
        """To refit, or to take means."""
        return self.options.refit or self.options.replace == "mean"

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Counts after pruning; where layers differ they are forecast as if uniform, the total is the same."""
        if self.options.scope != "uniform" and self.target.uniform_experts:
            raise RecipeError(
                f"prune.experts: scope '{self.options.scope}' gives layers different numbers of experts, which the "
                f"target {self.target.name!r} can't load; use scope: uniform, or target: native"
            )
        if self.options.replace == "mean" and self.target.quantized_format != "native":
            raise RecipeError(
                "prune.experts: replace: mean leaves experts that are one vector each, which the target "
                f"{self.target.name!r} can't load; use replace: nothing, or target: native"
            )
        counts = self._counts(shape)
        if self.options.below is None:
            going = {i: layer.num_experts - self._goal(i, layer) for i, layer in self._start(shape).layers.items()}
            units = {i: n // shape.layers[i].routing_groups for i, n in going.items()}
            check_rounds(self, units, "experts (of each routing group)")
        if number_of_rounds(self) > 1 and len(set(counts.values())) > 1 and self._measures_for_a_number():
            raise RecipeError(
                f"prune.experts: criterion {self.options.criterion!r} measures for one number of experts, and layers "
                f"keep {sorted(set(counts.values()))} after round {self.round + 1}; use steps: 1, or another criterion"
            )
        for index, count in counts.items():
            if problem := find_criterion(self.options.criterion).problem(shape.layers[index], count):
                raise RecipeError(f"prune.experts: criterion {self.options.criterion!r}: layer {index} {problem}")
        if self.options.scope != "uniform":
            self._guards().floors(shape, sum(counts.values()), {})
        if self.options.replace == "mean":
            return shape.with_layers({i: with_novices(layer, counts[i]) for i, layer in shape.layers.items()})
        return shape.with_experts(counts)

    def learn(self, lesson: Lesson) -> dict[int, Result]:
        """What to keep: measured on part of the text and, where asked for, checked on the rest."""
        text, held = split(lesson.text, self.options.held_out) if self.options.checked else (lesson.text, None)
        profile = self._measured(lesson, text)
        scores, protected = self._scores(profile)
        uniform = best(profile.shape, scores, self._counts(profile.shape), protected)
        free = self._choose(profile, scores, protected, self._costs(lesson, text, profile, scores, protected))
        losses = []
        if held is not None:
            reads = text if self.needs_inputs() else None

            def take_out(block: MoEBlock, keep: Sequence[int], inputs: BlockInputs | None) -> None:
                if self.options.replace == "mean":  # novices are made in place, and these weights are needed again
                    state = block.state()[0]
                    block.assign({name: state[name].clone() for name in block.weight_names()})
                self._take_out(block, list(keep), protected.get(block.layer, []), inputs)

            losses = [loss_of(lesson, held, keep, take_out, reads) for keep in (uniform, free)]
        keep = uniform if losses and losses[0] <= losses[1] else free
        return {
            index: {
                "keep": as_mask(keep[index], len(found)),
                "free": torch.tensor([len(free[i]) for i in scores]),
                "losses": torch.tensor(losses, dtype=torch.float64),
                "scores": found.double(),
                "protected": as_mask(protected.get(index, []), len(found)),
                "unseen": (profile.of(index, Routing())["counts"] == 0).sum(),
                "weighed": torch.tensor(text.modality_weights is not None),
            }
            for index, found in scores.items()
        }

    def plan(self, profile: Profile) -> Plan:
        """Score all experts, protect super experts, keep the best."""
        extra: dict[str, Any] = {}
        notes: list[str] = []
        if self.learns():
            scores = {i: self.learned[i]["scores"] for i in profile.shape.layers}
            masks = {i: self.learned[i]["protected"] for i in scores}
            protected = {i: mask.nonzero().flatten().tolist() for i, mask in masks.items() if mask.any()}
            keep = {i: self.learned[i]["keep"].nonzero().flatten().tolist() for i in scores}
            unseen = {i: int(self.learned[i]["unseen"]) for i in scores}
            extra, notes = self._verdict(next(iter(self.learned.values())))
            unweighed = sorted({s.name for s in self._measures() if not s.weighs_tokens})
            if unweighed and any(bool(found["weighed"]) for found in self.learned.values()):
                notes.append(f"modality_weights don't reach {', '.join(unweighed)}")
        else:
            scores, protected = self._scores(profile)
            keep = self._choose(profile, scores, protected, {})
            unseen = {i: int((profile.of(i, Routing())["counts"] == 0).sum()) for i in scores}
        layers = {
            i: {
                "keep": keep[i],
                "remove": sorted(set(range(len(scores[i]))) - set(keep[i])),
                "scores": [float(f"{float(s):.9g}") for s in scores[i]],
                "protected": protected.get(i, []),
            }
            for i in scores
        }
        notes += [f"layer {i}: super experts {e} are protected" for i, e in protected.items()]
        notes += [f"layer {i}: {n} experts saw no calibration token" for i, n in unseen.items() if n]
        if self.options.below is not None and not any(decision["remove"] for decision in layers.values()):
            notes.append(
                f"round {self.round + 1}: nothing goes: no expert's share is below {self.options.below} of an even one"
            )
        kept = sum(len(k) for k in keep.values())
        total = sum(len(s) for s in scores.values())
        summary = {**said(self), "kept": kept, "of": total, "criterion": self.options.criterion, **extra}
        return Plan(self.name, layers, summary, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Drop the experts that the plan removes, and let those that are left take over what they can."""
        report = self._take_out(block, decision["keep"], decision["protected"], inputs)
        told = {"round": self.round + 1} if number_of_rounds(self) > 1 else {}
        experts = [
            {
                "score": score,
                "removed": expert in report["removed"],
                **({"replaced": expert in report["replaced"]} if "replaced" in report else {}),
                "protected": expert in decision["protected"],
                **told,
            }
            for expert, score in enumerate(decision["scores"])
        ]
        return {**report, "experts": experts}

    def _take_out(
        self, block: MoEBlock, keep: list[int], protected: list[int], inputs: BlockInputs | None
    ) -> dict[str, Any]:
        """Remove all experts but these from a block, or put means in their place. Returns what is reported of it."""
        count, ridge = block.num_experts, self.options.ridge if self.options.refit else None
        removed = sorted(set(range(count)) - set(keep))
        if self.options.replace == "nothing":
            slots, told = drop_experts(block, keep, protected, inputs, ridge)
            return {"removed": removed, "slots": slots, "refit": told}
        assert inputs is not None
        neurons = block.experts.intermediate_size * len(keep)
        unseen, told = put_means(block, removed, inputs, ridge, protected)
        report = {"removed": [], "replaced": removed, "replaced_by_zeros": unseen, "refit": told}
        return {**report, "slots": list(range(count)), "all_neurons": neurons}

    def _measures(self) -> list[Statistic]:
        found = find_criterion(self.options.criterion).measures(self._asked())
        if self.options.protect_super_experts:
            found.append(OutputNorms())
        if self.options.scope == "sensitivity" and self.options.sensitivity == "fisher":
            found.append(RemovalLoss())
        return list({s.key: s for s in [*found, Routing()]}.values())

    def _measured(self, lesson: Lesson, text: TokenBatches) -> Profile:
        """Statistics of some of the text, in one sweep."""
        store, batches, measures = MemoryStore(), text.forwards(lesson.batch_size), self._measures()
        back = self.goes_back()
        kind, hold = (GradientSweep, lesson.hold_all) if back else (Sweep, lesson.hold)
        with kind(lesson.model, batches, hold) as sweep:
            collect(sweep, measures, store, lesson.progress, NextToken(batches))
        return Profile(lesson.shape, store, len(lesson.model.layers))

    def _scores(self, profile: Profile) -> tuple[dict[int, Tensor], dict[int, list[int]]]:
        """Layer → scores, and layer → super experts."""
        protected = measured_super_experts(profile) if self.options.protect_super_experts else {}
        chosen_criterion = find_criterion(self.options.criterion)
        generator = torch.Generator().manual_seed(self.options.seed)
        counts = self._counts(profile.shape)
        scores = {
            index: chosen_criterion.score(
                {s.name: profile.of(index, s) for s in chosen_criterion.measures(self._asked())},
                Selection(layer, counts[index], protected.get(index, []), generator),
            )
            for index, layer in profile.shape.layers.items()
        }
        for layer, found in scores.items():
            count = profile.shape.layers[layer].num_experts
            if found.shape != (count,):
                raise RunError(
                    f"prune.experts: {self.options.criterion} gives a tensor {list(found.shape)} for the {count} "
                    f"experts of layer {layer}: one score for each is needed"
                )
            if not found.isfinite().all():
                raise RunError(
                    f"prune.experts: {self.options.criterion} gives experts "
                    f"{(~found.isfinite()).nonzero().flatten().tolist()} of layer {layer} no finite score: the "
                    "checkpoint's weights, or what they compute, overflow"
                )
        return scores, protected

    def _counts(self, shape: ModelShape) -> dict[int, int]:
        """Layer → experts that it keeps in a uniform plan, at the end of this round."""
        start = self._start(shape).layers
        if self.options.below is not None:
            last = self.round + 1 == number_of_rounds(self)  # what goes before that is known once it is measured
            return {i: self._goal(i, start[i]) if last else layer.num_experts for i, layer in shape.layers.items()}
        counts = {
            i: reached(self, layer.num_experts, self._goal(i, layer), layer.routing_groups)
            for i, layer in start.items()
        }
        return counts if self.options.scope == "uniform" else evened(shape, counts)

    def _goal(self, index: int, layer: LayerShape) -> int:
        """Experts that a layer, as it was before the first round, keeps after the last."""
        return kept_count(self.name, index, layer, self.options)

    def _start(self, shape: ModelShape) -> ModelShape:
        return self.start if self.start is not None and self.round else shape

    def _guards(self) -> Guards:
        """What every layer keeps."""
        return Guards(self.options.minimum, self.options.most_removed, self.start if self.round else None)

    def _measures_for_a_number(self) -> bool:
        return any(not isinstance(s, Statistic) for s in find_criterion(self.options.criterion).statistics)

    def _asked(self) -> ExpertCounts:
        """What a criterion is told that measures for a number of experts: that of this round."""
        if self.start is None or number_of_rounds(self) == 1:
            return self.options
        counts = set(self._counts(self.start).values())
        return ExpertCounts(experts=counts.pop()) if len(counts) == 1 else self.options

    def _costs(
        self,
        lesson: Lesson,
        text: TokenBatches,
        profile: Profile,
        scores: dict[int, Tensor],
        protected: dict[int, list[int]],
    ) -> dict[int, dict[int, float]]:
        """Layer → experts kept → what that costs; nothing unless the scope asks for it."""
        if self.options.scope != "sensitivity":
            return {}
        shape = profile.shape
        orders = {i: removal_order(scores[i], layer, protected.get(i, [])) for i, layer in shape.layers.items()}
        if self.options.sensitivity == "fisher":
            costs = {i: dropping_costs(profile.of(i, RemovalLoss())["fisher"], order) for i, order in orders.items()}
            return {i: {len(found) - 1 - n: float(c) for n, c in enumerate(found)} for i, found in costs.items()}
        floors = self._guards().floors(shape, sum(self._counts(shape).values()), protected)
        count = min(len(text), -(-self.options.measured_tokens * len(text) // text.tokens))
        spread = torch.linspace(0, len(text) - 1, count).round().long().tolist()  # from all domains
        sample = text.chosen(sorted(set(spread)))
        return measured_costs(lesson, sample, orders, floors, {i: s.routing_groups for i, s in shape.layers.items()})

    def _choose(
        self,
        profile: Profile,
        scores: dict[int, Tensor],
        protected: dict[int, list[int]],
        costs: dict[int, dict[int, float]],
    ) -> dict[int, list[int]]:
        shape, guards = profile.shape, self._guards()
        counts = self._counts(shape)
        if self.options.below is not None and self.round + 1 < number_of_rounds(self):
            start = self._start(shape).layers
            goals = {i: self._goal(i, layer) for i, layer in start.items()}
            counts = standing(shape, scores, self.options.below, goals, protected)
        if self.options.scope == "global":
            compared = scores if find_criterion(self.options.criterion).comparable else shares(scores)
            counts = global_counts(shape, compared, sum(counts.values()), guards, protected)
            scores = compared
        if self.options.scope == "sensitivity":
            total = sum(counts.values())
            counts = cheapest_counts(shape, costs, total, guards.floors(shape, total, protected))
        return best(shape, scores, counts, protected)

    def _verdict(self, learned: Result) -> tuple[dict[str, Any], list[str]]:
        """What the check found: for the plan's summary, and in words."""
        free, losses = learned["free"].tolist(), learned["losses"].tolist()
        extra: dict[str, Any] = {"experts_by_" + self.options.scope: free}
        if not losses:
            return extra, [f"{self.options.scope}: layers keep {free} experts; not checked on held-out text"]
        used = self.options.scope if losses[1] < losses[0] else "uniform"
        extra |= {"held_out_kl_uniform": losses[0], f"held_out_kl_{self.options.scope}": losses[1], "used": used}
        return extra, [
            f"held-out text: {losses[1]:.4g} nats per token lost with {free} experts in the layers, {losses[0]:.4g} "
            f"with the same number in all: the {used} plan is used"
        ]
