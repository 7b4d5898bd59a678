"""Options of `quantize.mixed`, and what papers set them to."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe_compress.export.targets import Target
from moe_compress.passes import PresetOptions
from moe_compress.units import Size

from .allocate import Rule, Unit
from .costs import find_cost
from .grid import WIDTHS
from .solver import SolverOptions
from .stack import Encoding
from .trits import TERNARY

# What a paper's allocation is in terms of the options. Group sizes are left to the user: each paper's is 128.
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2410.06270, Eq. 4 and 5: each layer by itself, widths 1 to 3, somebody at 3 bits and somebody at 2.
    "pmq": {"cost": "pmq", "scope": "layer", "unit": "expert", "widths": [1, 2, 3], "cover": 2},
    # Its program with coefficients from the loss's gradients: all layers together, whole experts.
    "gemq": {"cost": "gradient", "scope": "global", "unit": "expert", "widths": [1, 2, 3], "solver_gain": "none"},
    # arXiv 2606.04980: each matrix, all layers together, from weights alone.
    "alphaq": {"cost": "alphaq", "scope": "global", "unit": "matrix", "tie_gate_up": False, "widths": [2, 3, 4, 8]},
    # arXiv 2505.05799, Δ of its program without the time term: each layer by itself, each matrix, one scheme for gate
    # and up, the block's output error (there not squared: Frobenius norms).
    "mxmoe": {
        "cost": "norm",
        "scope": "layer",
        "unit": "matrix",
        "tie_gate_up": True,
        "widths": [2, 4, 8],
        "solver_gain": "none",
    },
    # arXiv 2308.14352: whole experts, lowered one after another.
    "edgemoe": {
        "allocation": "greedy",
        "cost": "squared",
        "unit": "expert",
        "scope": "global",
        "widths": [2, 4, 8],
        "solver_gain": "none",
    },
    # arXiv 2406.08155: two widths, the matrices with the highest outlier scores get the larger.
    "quantmoe-bench": {"cost": "outlier", "scope": "global", "unit": "matrix", "tie_gate_up": False, "widths": [2, 4]},
}


class LowRankOptions(BaseModel):
    """Ranks of what is added to quantized matrices."""

    model_config = ConfigDict(extra="forbid")

    ranks: list[Annotated[int, Field(ge=0, le=4096)]] = Field(default=[0, 8, 16], min_length=1)
    shared: int = Field(default=0, ge=0, le=4096)
    rounds: int = Field(default=1, ge=1, le=10)

    @field_validator("ranks")
    @classmethod
    def _with_none(cls, value: list[int]) -> list[int]:
        return sorted({0, *value})


class MixedOptions(SolverOptions, PresetOptions):
    """Options of `quantize.mixed`; `preset` replaces the defaults of those that are not given."""

    presets: ClassVar = PRESETS

    preset: Literal["pmq", "gemq", "alphaq", "mxmoe", "edgemoe", "quantmoe-bench"] | None = Field(
        default=None, description="A paper's allocation, for all of the options below that are not given"
    )
    bits: float | None = Field(
        default=None,
        gt=0,
        le=16,
        description="Budget: average bits per weight of all that is included; scales, zero points and padding count",
    )
    size: Size | None = Field(default=None, description='Instead of `bits`: size of the whole checkpoint, e.g. "12 GB"')
    widths: list[float] = Field(
        default=[1, 2, 3, 4, 8], min_length=1, description="Widths that a unit may get: 1 to 8, and 1.58 for ternary"
    )
    include: list[Literal["experts", "attention", "shared_experts", "dense_mlp", "embeddings", "head"]] = Field(
        default=["experts"],
        description="What is quantized, under the one budget: experts, and beside them attention projections, shared "
        "experts, the MLPs of layers without experts, embeddings, head. Routers, gates and convolutions never are",
    )
    dense_widths: list[float] = Field(
        default=[4, 6, 8], min_length=1, description="Widths that a matrix beside the experts may get"
    )
    unit: Unit | None = Field(
        default=None,
        description="What gets a width of its own: each matrix, each expert, each projection of a layer (gate, up, "
        "down) or each layer; default: the smallest that the target loads and `cost` knows",
    )
    tie_gate_up: bool = Field(
        default=True,
        description="Gate and up of an expert get the same width and are solved as one (unit: matrix or projection)",
    )
    scope: Literal["global", "layer"] = Field(
        default="global",
        description="Who shares the budget: all experts of the model, or each layer's by themselves (PMQ)",
    )
    allocation: Rule = Field(
        default="program",
        description="Who decides: the program; greedy: all start at the largest width, and who loses least by it is "
        "lowered, one width at a time (EdgeMoE); uniform: the same mixture of two widths everywhere (control)",
    )
    cover: int = Field(
        default=0,
        ge=0,
        description="In every layer, some unit gets each of so many of the largest widths (PMQ: 2); program only",
    )
    cost: str = Field(default="relative", description="What a width costs; see below")
    solver_gain: Literal["foreseen", "solved", "none"] = Field(
        default="foreseen",
        description="GPTQ: scale costs that are squared errors of rounding by the share that GPTQ leaves of them, for "
        "each matrix, foreseen from second moments or found by running it at every width",
    )
    alpha: float = Field(default=1.0, ge=0, description="PMQ: exponent of how often an expert is chosen")
    beta: float = Field(default=1.5, ge=0, description="PMQ: exponent of its routing weight")
    gamma: float = Field(default=2.0, gt=0, description="PMQ: exponent of its error at the block's output")
    pmq_variant: Literal["paper", "code"] = Field(
        default="paper", description="PMQ: exponent of the error; the authors' code takes alpha for it, not gamma"
    )
    alphaq_gamma: float = Field(
        default=1.0, ge=0, description="AlphaQ: exponent of the heavy tail (the paper's best: 10 to 200, by model)"
    )
    low_rank: LowRankOptions | None = Field(
        default=None,
        description="Pairs of low-rank factors that make up for what quantizing loses, added at run time (Quant "
        "Experts; target: native). `ranks`: that a matrix may get beside its width, by the same program; `shared`: "
        "rank of a pair that all experts of a projection have in common; `rounds`: of quantizing and fitting in turn",
    )
    protect_super_experts: bool = Field(
        default=True, description="Experts with massive activations get the largest of `widths`"
    )
    seed: int = Field(default=0, description="Seed of the cost `random`")

    @field_validator("cost")
    @classmethod
    def _known_cost(cls, value: str) -> str:
        find_cost(value)
        return value

    @field_validator("include")
    @classmethod
    def _experts(cls, value: list[str]) -> list[str]:
        if "experts" not in value:
            raise ValueError("`include` names what is quantized beside the experts: keep `experts` in it")
        return list(dict.fromkeys(value))

    @field_validator("widths", "dense_widths")
    @classmethod
    def _known_widths(cls, value: list[float]) -> list[float]:
        if not set(value) <= set(WIDTHS):
            raise ValueError(f"widths are 1 to 8 bits, or {TERNARY} for ternary")
        return [width for width in WIDTHS if width in value]  # integers as such

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.bits is None) == (self.size is None):
            raise ValueError(
                'give either `bits` (average per weight, e.g. 2.5) or `size` (of the checkpoint, e.g. "12 GB")'
            )
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        """Beside the experts, costs are errors relative to the hidden state."""
        if set(self.include) == {"experts"} or self.allocation == "uniform":
            return self
        for option, value, allowed in (
            ("cost", self.cost, "relative"),
            ("scope", self.scope, "global"),
            ("cover", self.cover, 0),
        ):
            if value != allowed:
                raise ValueError(
                    f"`{option}: {value}` is of experts alone: with {self.include} set `{option}: {allowed}`"
                )
        return self

    @model_validator(mode="after")
    def _low_rank(self) -> Self:
        """Ranks are fitted to what experts read, and cost what they leave of rounding's error."""
        if self.low_rank is None:
            return self
        for option, value, allowed in (
            ("method", self.method, "gptq"),
            ("allocation", self.allocation, "program"),
            ("cover", self.cover, 0),
        ):
            if value != allowed:
                raise ValueError(f"`low_rank` doesn't go with `{option}: {value}`: set `{option}: {allowed}`")
        if not find_cost(self.cost).scaled(self):
            raise ValueError(
                "`low_rank` needs a cost that is a squared error of rounding, scaled by what GPTQ leaves: "
                "set `cost: relative` and `solver_gain: foreseen`"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.cover and self.allocation != "program":
            raise ValueError(f"`cover` belongs to allocation: program, not {self.allocation}")
        if self.cover > len(self.widths):
            raise ValueError(f"`cover` asks for {self.cover} widths, `widths` has {len(self.widths)}")
        return self

    @property
    def low_rank_rounds(self) -> int:
        """See SolverOptions."""
        return 1 if self.low_rank is None else self.low_rank.rounds

    @property
    def choices(self) -> list[tuple[float, int]]:
        """Width and rank that a matrix may get: the plain largest width last, which protected experts get."""
        ranks = [0] if self.low_rank is None else self.low_rank.ranks
        return [(width, rank) for width in self.widths for rank in reversed(ranks)]

    def matrix_bytes(self, target: Target, bits: float, rows: int, columns: int) -> int:
        """Bytes of a matrix at a width in a file for a target: codes, scales, zero points, and what is beside them."""
        grid = self.grid(bits)
        stored = Encoding(bits, grid.group_size, grid.symmetric).matrix_bytes(rows, columns)
        return stored + target.beside(bits, grid.group_size, rows, columns)
