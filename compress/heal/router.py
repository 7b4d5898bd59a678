"""The pass `heal.router`: fine-tune the routers of a changed model so that it does what the original did.

Nothing but router parameters is trained, in float32, and judged as they will be stored. Part of the calibration
sequences is held out: what makes these worse is not kept, and both figures are reported.

Letters: T tokens, H hidden, E experts, C classes that a router scores.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from moe_compress.calib.batches import split
from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import Result
from moe_compress.errors import RunError
from moe_compress.model import MoEBlock
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Lesson, Pass, PassOptions, Plan, register

from .lessons import Judged, Routers, judge, teach_layers, teach_model

_ROUTER = "router/"


class RouterOptions(PassOptions):
    """Options of `heal.router`."""

    mode: Literal["layer", "model"] = Field(
        default="layer",
        description="Layer by layer in one sweep, towards what the original's layer makes of its own inputs; or all "
        "routers together, towards the original's next-token distribution (Router-KD), by backward sweeps",
    )
    objective: Literal["hidden", "routing"] = Field(
        default="hidden",
        description="Layer by layer: the hidden state behind the layer, or the router's distribution over the experts",
    )
    epochs: int = Field(default=3, ge=1, description="Times that the text is gone through")
    rate: float = Field(
        default=0.02, gt=0, description="AdamW's step, relative to the root mean square of the router's parameters"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's, per step and rate")
    sequences_per_step: int = Field(
        default=4, ge=1, description="All routers together: sequences of one step, each step is a sweep forth and back"
    )
    temperature: float = Field(default=1.0, gt=0, description="All routers together: of both next-token distributions")
    held_out: float = Field(default=0.125, gt=0, lt=1, description="Share of the sequences that judges, never teaches")
    seed: int = Field(default=0, ge=0, description="Order of the sequences")


@register
class HealRouter(Pass):
    """Fine-tune routers towards the original."""

    name = "heal.router"
    summary = "fine-tune routers after pruning, merging or quantizing, towards what the original does"
    paper = "GEMQ (router fine-tuning); Router-KD, arXiv 2603.02217 (mode: model)"
    Options = RouterOptions
    accepts = frozenset({"fused", "packed", "factored"})
    options: RouterOptions

    def learns(self) -> bool:
        """From the original."""
        return True

    def goes_back(self) -> bool:
        """Where all routers are trained together."""
        return self.options.mode == "model"

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Nothing changes in size."""
        return shape

    def learn(self, lesson: Lesson) -> dict[int, Result]:
        """New values of the routers' parameters, and how far routing and predictions were and are from the original."""
        taught, held = split(lesson.text, self.options.held_out)
        routers = Routers(lesson.model)
        try:
            before = judge(lesson, held, routers)
            objectives: dict[int, tuple[float, float]] = {}
            if self.options.mode == "layer":
                objectives = teach_layers(lesson, taught, held, routers, self.options)
            else:
                teach_model(lesson, taught, held, routers, self.options, before.kl)
            after = judge(lesson, held, routers)
            kept = after.kl < before.kl
            if not kept:
                routers.reset()
            return {i: self._result(i, routers, before, after, kept, objectives) for i in lesson.model.moe_layers}
        finally:
            routers.restore()

    def _result(
        self, index: int, routers: Routers, before: Judged, after: Judged, kept: bool, objectives: dict[int, Any]
    ) -> Result:
        result = {_ROUTER + name: value for name, value in routers.values[index].items()}
        result["kl"] = torch.tensor([before.kl, after.kl], dtype=torch.float64)
        result["kept"] = torch.tensor(kept)
        for key in ("kl", "agreement"):
            if key in before.routing[index]:
                values = [judged.routing[index][key] for judged in (before, after)]
                result[f"router_{key}"] = torch.tensor(values, dtype=torch.float64)
        if index in objectives:
            result["objective"] = torch.tensor(objectives[index], dtype=torch.float64)
        return result

    def plan(self, profile: Profile) -> Plan:
        """What was learned, in numbers; the parameters themselves are beside it."""
        layers = {}
        summary: dict[str, Any] = {}
        notes: list[str] = []
        for index in profile.shape.layers:
            learned = self.learned[index]
            layers[index] = {
                f"{name}_{when}": value
                for name in ("router_kl", "router_agreement", "objective")
                if name in learned
                for when, value in zip(("before", "after"), learned[name].tolist(), strict=True)
            }
            before, after = learned["kl"].tolist()
            kept = bool(learned["kept"])
            summary = {"held_out_kl_before": before, "held_out_kl_after": after, "kept": kept}
            layers[index]["kept"] = kept
            if not kept and not notes:
                notes.append(
                    f"the fine-tuned routers predict held-out text no better than before (KL {before:.4g} nats per "
                    f"token, then {after:.4g}): all routers stay as they were"
                )
        return Plan(self.name, layers, summary, notes)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Put the parameters in place."""
        state = block.module.state_dict()
        learned = {n.removeprefix(_ROUTER): v for n, v in self.learned[block.layer].items() if n.startswith(_ROUTER)}
        missing = learned.keys() - state.keys()
        if missing:
            raise RunError(f"layer {block.layer} has no {sorted(missing)}, which heal.router has learned")
        block.assign({n: v.to(device=state[n].device, dtype=state[n].dtype) for n, v in learned.items()})
        return dict(decision)
