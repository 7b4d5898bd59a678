"""Options of `prune.experts`, and what a paper sets them to."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from moe_compress.counts import ExpertCounts
from moe_compress.passes import PresetOptions
from moe_compress.refit import Ridge
from moe_compress.rounds import Rounds

from .criteria import find_criterion

# What a paper's method is in terms of the options, where that is more than a criterion.
PRESETS: dict[str, dict[str, Any]] = {
    "tsep": {  # arXiv 2206.00277, without the fine-tuning that goes on meanwhile; each window is all of the text
        "criterion": "gate_mass",
        "steps": 8,
        "below": 0.5,
        "refit": False,
    },
}


class PruneOptions(Rounds, ExpertCounts, PresetOptions):
    """Options of `prune.experts`; `preset` replaces the defaults of those that are not given."""

    presets: ClassVar = PRESETS

    preset: Literal["tsep"] | None = Field(
        default=None, description="A paper's setting, for all of the options that are not given"
    )
    criterion: str = Field(default="reap", description="How experts are scored; the lowest go first")
    scope: Literal["uniform", "global", "sensitivity"] = Field(
        default="uniform",
        description="uniform: the same number in every layer; global: the lowest of all layers, by scores "
        "that are made comparable (each layer's sum to 1, unless they are by themselves); sensitivity: fewest where "
        "losing those that score lowest costs the model's predictions least",
    )
    sensitivity: Literal["fisher", "measured"] = Field(
        default="fisher",
        description="scope: sensitivity: what it costs, estimated from gradients by one backward sweep, or measured by "
        "running the whole model for each layer and some numbers of experts (for small models)",
    )
    check: bool | None = Field(
        default=None,
        description="Hold sequences out and keep the uniform plan if it predicts them better, both as they would be "
        "written (solved again, or with novices, by the other sequences); default: with scope: sensitivity",
    )
    held_out: float = Field(default=0.125, gt=0, lt=1, description="check: share of the sequences that judges")
    measured_tokens: int = Field(default=2048, ge=1, description="sensitivity: measured: tokens of each run")
    minimum: int | None = Field(
        default=None,
        ge=1,
        description="Experts that a layer keeps at the least (global, sensitivity); default: twice the top-k",
    )
    most_removed: float = Field(
        default=1.0, gt=0, le=1, description="Share of its experts that a layer loses at the most (global, sensitivity)"
    )
    protect_super_experts: bool = Field(default=True, description="Never remove experts with massive activations")
    below: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="steps: 2 and more: every round but the last removes, instead of a set share, the experts whose "
        "part of their layer's scores is less than so much of an even one, as long as more stay than are asked for",
    )
    domains: list[str] | None = Field(
        default=None, min_length=1, description="Score experts, and refit, on calibration text with these tags alone"
    )
    replace: Literal["nothing", "mean"] = Field(
        default="nothing",
        description="mean: a removed expert becomes a novice, a vector, its mean output over the tokens routed to it; "
        "the router goes on choosing it (MoNE; its criterion is `mone`). For target: native",
    )
    refit: bool = Field(
        default=True,
        description="Solve the down projections that are left again, so that on the calibration tokens the layer puts "
        "out what it did (experts with massive activations stay as they are)",
    )
    ridge: Ridge = 0.25
    seed: int = Field(default=0, description="Seed of the criterion `random`")

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        find_criterion(value)
        return value

    @model_validator(mode="after")
    def _novices(self) -> Self:
        if self.replace == "mean" and self.steps > 1:
            raise ValueError("`steps` belongs to replace: nothing; nothing can follow replace: mean, no round either")
        return self

    @model_validator(mode="after")
    def _windows(self) -> Self:
        if self.below is not None:
            if self.steps < 2:
                raise ValueError("`below` says what goes before the last round: give `steps`, 2 or more")
            if self.scope != "uniform":
                raise ValueError(f"`below` belongs to scope: uniform; scope: {self.scope} decides by other means")
            if not find_criterion(self.criterion).ranks:
                raise ValueError(f"`below` compares scores, and criterion {self.criterion!r} chooses sets")
        return self

    @model_validator(mode="after")
    def _of_other_scopes(self) -> Self:
        if self.scope == "uniform":
            given = {"minimum": self.minimum is not None, "most_removed": self.most_removed < 1, "check": self.check}
            if wrong := [name for name, there in given.items() if there]:
                raise ValueError(
                    f"`{wrong[0]}` belongs to scope: global or sensitivity; in a uniform plan every layer keeps the "
                    "same number"
                )
        elif not find_criterion(self.criterion).ranks:
            raise ValueError(
                f"criterion {self.criterion!r} chooses sets of a given size and gives no order, which scope: "
                f"{self.scope} compares layers by; take scope: uniform, or the criterion gram_greedy"
            )
        return self

    @property
    def checked(self) -> bool:
        """Whether the plan is compared with a uniform one."""
        return self.scope == "sensitivity" if self.check is None else self.check
