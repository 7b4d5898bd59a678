"""The pass `prune.weights`: zeros inside the experts' matrices, anywhere in a row or N of each M.

The result is as large as before: zeros are stored like any weight. See docs/sparsity.md for who gains by them.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.errors import RecipeError
from moe_compress.model import MoEBlock
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register
from moe_compress.quant.layer_rows import Weighing

from .masks import WEIGHT_CRITERIA, Pattern, find_weight_criterion
from .sparsify import sparsify

_NOTE = (
    "zeros are stored like any weight: the checkpoint is as large as before, and no runtime that it is written for is "
    "faster by them (docs/sparsity.md); quantizing afterwards doesn't keep them"
)


class WeightOptions(PassOptions):
    """Options of `prune.weights`."""

    criterion: str = Field(default="sparsegpt", description="Which weights of a row go first")
    sparsity: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the weights that become zeros, anywhere in their row"
    )
    pattern: str | None = Field(
        default=None, description='Instead of `sparsity`: N:M, of each M neighbours in a row N stay, e.g. "2:4", "4:8"'
    )
    projections: list[Literal["gate", "up", "down"]] = Field(
        default=["gate", "up", "down"], min_length=1, description="Which matrices of an expert"
    )
    hessian: Weighing = Field(
        default="gate_squared",
        description="sparsegpt: what a token counts for an expert: 1, its routing weight, or the square of that",
    )
    damping: float = Field(
        default=0.01, ge=0, le=10, description="sparsegpt: added to the Hessian's diagonal, times its mean"
    )
    shrinkage: float | None = Field(
        default=None,
        ge=0,
        description="sparsegpt: tokens that the layer's mean Hessian counts for; default: as many as it has rows",
    )
    compensate: bool = Field(
        default=True, description="sparsegpt: down projections make up for what the zeros in gate and up did"
    )
    seed: int = Field(default=0, ge=0, description="Seed of the criterion `random`")

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        find_weight_criterion(value)
        return value

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            Pattern.named(value)
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError('give either `sparsity` (a share, e.g. 0.5) or `pattern` (N:M, e.g. "2:4")')
        return self

    @property
    def zeros(self) -> Pattern:
        """The pattern that is asked for."""
        return Pattern.named(self.pattern) if self.pattern is not None else Pattern(self.sparsity or 0.0)


@register
class PruneWeights(Pass):
    """Put zeros into the experts' matrices."""

    name = "prune.weights"
    summary = "zeros inside experts' matrices, unstructured or N:M (the checkpoint stays as large)"
    paper = "SparseGPT, arXiv 2301.00774 (default criterion)"
    Options = WeightOptions
    options: WeightOptions

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """The registered criteria."""
        return {"criterion": {c.name: c.source for c in WEIGHT_CRITERIA.values()}}

    def needs_inputs(self) -> bool:
        """Where the criterion looks at what the experts read."""
        return find_weight_criterion(self.options.criterion).reads is not None

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Nothing changes in size. Raises RecipeError where rows don't divide into runs."""
        run = self.options.zeros.run or 1
        for index, layer in shape.layers.items():
            for name in self.options.projections:
                columns = layer.intermediate if name == "down" else layer.hidden
                if columns % run:
                    raise RecipeError(
                        f"prune.weights: pattern {self.options.pattern} needs rows that divide into runs of {run}, and "
                        f"those of {name} in layer {index} have {columns} weights; leave {name} out of `projections`, "
                        "or give `sparsity`"
                    )
        if self.options.projections == ["gate"] and any(layer.matrices < 3 for layer in shape.layers.values()):
            raise RecipeError("prune.weights: `projections: [gate]`, and this model's experts have no gate")
        return shape

    def plan(self, profile: Profile) -> Plan:
        """The same for every layer."""
        pattern = self.options.zeros
        decision = {
            "criterion": self.options.criterion,
            "zeros": pattern.sparsity,
            "run": pattern.run,
            "projections": list(self.options.projections),
        }
        summary = {k: v for k, v in decision.items() if k != "projections"}
        return Plan(self.name, {index: dict(decision) for index in profile.shape.layers}, summary, [_NOTE])

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Put the zeros in place. The report says what share of the weights is really zero."""
        experts = sparsify(
            block,
            decision["projections"],
            Pattern(decision["zeros"], decision["run"]),
            find_weight_criterion(decision["criterion"]),
            self.options,
            inputs,
            torch.Generator().manual_seed(self.options.seed * 100_003 + block.layer),
        )
        shares = [share for entry in experts for share in entry["zeros"].values()]  # all matrices are of one size
        unseen = sum(entry.get("tokens") == 0 for entry in experts)
        report: dict[str, Any] = {"zeros": sum(shares) / len(shares), "experts": experts}
        return report | ({"without_tokens": unseen} if unseen else {})
