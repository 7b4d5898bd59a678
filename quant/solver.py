"""How matrices are quantized: the options that every pass which quantizes experts has."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from moe_compress.passes import PassOptions

from .grid import Grid, GroupSize, Search
from .layer_rows import Weighing
from .rotation import Rotate, Rotations

# What factors depend on.
_SMOOTHING = {"method", "group_size", "symmetric", "search", "damping", "shrinkage", "hessian"}
_SMOOTHING |= {"smooth", "smooth_exponent", "smooth_merge"}


class InputSmoothing(PassOptions):
    """How factors of what a block reads are found (see input_smoothing.py), where a pass moves any."""

    smooth_exponent: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="smooth: input: exponent of what is read, its complement that of weights; default: each layer's "
        "best, or no factors",
    )
    smooth_merge: Literal["max", "mean"] = Field(
        default="mean",
        description="smooth: input: how the factors of experts, router and shared experts become one per channel: the "
        "geometric mean, or the largest (EAQuant)",
    )

    @property
    def smooths_input(self) -> bool:
        """Whether factors move out of the norm before the block."""
        return False

    @model_validator(mode="after")
    def _exponent_of_something(self) -> Self:
        if self.smooth_exponent is not None and not self.smooths_input:
            raise ValueError("`smooth_exponent` says how inputs are smoothed: add `smooth: input`")
        return self


class SolverOptions(InputSmoothing):
    """Options of the solvers (see experts.py)."""

    method: Literal["gptq", "rtn", "hqq"] = Field(
        default="gptq",
        description="GPTQ; or without data: round-to-nearest, or half-quadratic scales and zero points (HQQ)",
    )
    group_size: GroupSize = Field(default=64, description="Weights that share a scale, -1 for a whole row")
    symmetric: bool = Field(default=True, description="No zero points (what servers load)")
    search: Search = Field(default="mse", description="How scales are found")
    damping: float = Field(default=0.01, ge=0, description="GPTQ: added to the Hessian's diagonal, times its mean")
    shrinkage: float | None = Field(
        default=None,
        ge=0,
        description="GPTQ: tokens that the layer's mean Hessian counts for; default: as many as it has rows",
    )
    hessian: Weighing = Field(
        default="gate_squared",
        description="GPTQ: what a token counts for an expert: 1, its routing weight (MoEQuant), or the square of that, "
        "as in the squared error of the block's output",
    )
    compensate: bool = Field(
        default=True,
        description="GPTQ: down projections make up for what quantizing gate and up did to their inputs (GPTAQ)",
    )
    rotate: Rotate = Field(
        default="none",
        description="Rotate what down projections read by a random Hadamard matrix, at run time too, or what all "
        "projections of experts read (target: native)",
    )
    smooth: Literal["none", "neurons", "input", "both"] = Field(
        default="none",
        description="Move factors where that lowers the error, folded into the weights whatever the target. neurons: "
        "from experts' up projections to their down projections (AWQ); input: from the norm before the block to "
        "router, experts and shared experts (EAQuant); or both. Reads the text",
    )
    sweeps: int = Field(
        default=2,
        ge=0,
        description="GPTQ: sweeps of coordinate descent over codes and scales afterwards (QuantEase)",
    )

    @model_validator(mode="after")
    def _neurons_apart(self) -> Self:
        """Rotating mixes what factors would tell apart."""
        if self.smooths_neurons and self.rotate != "none":
            raise ValueError(
                f"`smooth: {self.smooth}` is of no use where activations are rotated: set `rotate: none` or "
                "`smooth: none`"
            )
        if self.smooths_input and self.rotate == "both":
            raise ValueError(
                f"`smooth: {self.smooth}` is of no use where inputs are rotated: set `rotate: down` or `smooth: none`"
            )
        return self

    @property
    def smooths_neurons(self) -> bool:
        """Whether factors move between up and down projections."""
        return self.smooth in ("neurons", "both")

    @property
    def smooths_input(self) -> bool:
        """Whether factors move out of the norm before the block."""
        return self.smooth in ("input", "both")

    @property
    def smoothing(self) -> dict[str, Any]:
        """Those options that factors follow from, as plain data; empty where there are none."""
        return {} if self.smooth == "none" else self.model_dump(include=_SMOOTHING)

    @property
    def low_rank_rounds(self) -> int:
        """How often matrices that get low-rank pairs are quantized, and their pairs fitted to what that leaves."""
        return 1

    def rotations(self, layer: int, hidden: int, neurons: int) -> Rotations:
        """How what a layer's experts read is rotated."""
        return Rotations.of_layer(self.rotate, layer, hidden, neurons)

    def grid(self, bits: float) -> Grid:
        """The grid of a width."""
        return Grid.of_width(bits, self.group_size, self.symmetric)
