"""The pass `skip.capacity`: no expert serves more than its share of a batch.

It is for the time that a batch takes where experts are spread over devices, which is that of the busiest: a policy of
serving, not a compression. What a token loses depends on the other tokens of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from moe_compress.calib.collect import Profile
from moe_compress.calib.skipping import CapacityUse
from moe_compress.calib.statistics import Statistic
from moe_compress.errors import RecipeError
from moe_compress.model.rules import RouteRule, make_rule
from moe_compress.model.shape import LayerShape
from moe_compress.passes import register

from .skip import Skip, SkipOptions


class CapacityOptions(SkipOptions):
    """Options of `skip.capacity`."""

    renormalize: bool = Field(
        default=False, description="Rescale the weights that are left to the sum that the token's weights had"
    )
    factor: float = Field(
        default=1.25,
        gt=0,
        description="Tokens that an expert serves at most, over what each would serve of an even load",
    )
    overflow: Literal["drop", "reroute"] = Field(
        default="drop", description="What is over is dropped, or goes to the token's next expert that has room"
    )
    tries: int = Field(default=4, ge=1, description="Experts that are asked for room")


@register
class SkipCapacity(Skip):
    """Limit how many tokens of a forward an expert serves."""

    name = "skip.capacity"
    kind = "capacity"
    summary = "limit the tokens per expert of a forward: for the time that the busiest expert takes, not for quality"
    paper = "Capacity-Aware Inference, arXiv 2503.05066"
    Options = CapacityOptions
    options: CapacityOptions

    def check(self, index: int, layer: LayerShape) -> None:
        """Every layer can have a limit; logits that say where to go instead must be of the experts there are."""
        if self.options.overflow == "reroute" and "remap" in layer.rules:
            raise RecipeError(
                f"{self.name}: the router of layer {index} scores other experts than there are (`router: remap`), so "
                "it can't say where to go instead: set `overflow: drop`"
            )

    def statistics(self) -> Sequence[Statistic]:
        """What the limit leaves in batches of calibration text."""
        return [self._use()]

    def rule(self, index: int, profile: Profile) -> RouteRule:
        """See Skip."""
        options = self.options
        return make_rule({"kind": self.kind, **options.model_dump()})

    def left(self, index: int, profile: Profile, rule: RouteRule) -> tuple[float, float]:
        """As measured."""
        use = profile.of(index, self._use())
        return float(use["slots"] / use["tokens"]), float(use["executed"] / use["tokens"])

    def notes(self, profile: Profile, layers: dict[int, dict[str, Any]]) -> list[str]:
        """What is gained, and what it depends on."""
        busiest = torch.stack([profile.of(i, self._use())["busiest"] for i in layers]).mean(0).tolist()
        return [
            f"the busiest expert serves {busiest[1]:.2f} times the mean expert's tokens, before {busiest[0]:.2f}",
            "what is dropped depends on what else is in the batch: the same text gives other answers in other batches",
        ]

    def _use(self) -> CapacityUse:
        return CapacityUse(self.options.factor, self.options.overflow, self.options.tries)
