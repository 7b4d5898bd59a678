"""The pass `quantize.gguf`: experts in llama.cpp's block types, a type per layer and projection from one program.

Plan: what each type costs each projection of each layer is measured at the block's output, and one multiple-choice
program over all layers spends a budget of real bytes. Apply: every expert is quantized with the importances of its own
input channels. The experts then hold the blocks that the file will have, and run on what llama.cpp reads from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from moe_compress.budget.knapsack import solve_arrays
from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import Statistic
from moe_compress.constants import GGUF
from moe_compress.errors import BudgetError, RecipeError
from moe_compress.export.gguf_layout import PARTS, Layout, layout
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.dispatch import Dispatch
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register
from moe_compress.units import Size, parse_bytes, show_budget, show_bytes

from .gguf_blocks import BlockType, dequantize, find_type
from .gguf_cost import BlockTypeError
from .gguf_quantize import quantize
from .importance import channel_squares
from .packed import pack_experts
from .stack import Stack

_DENSE = {
    "embeddings": ["Q6_K", "Q8_0", "BF16"],
    "output": ["Q6_K", "Q8_0", "BF16"],
    "attention": ["Q8_0", "BF16"],
    "shared_experts": ["Q8_0", "BF16"],
    "feed_forward": ["Q8_0", "BF16"],
}


class GGUFOptions(PassOptions):
    """Options of `quantize.gguf`."""

    bits: float | None = Field(
        default=None, gt=0, le=32, description="Budget: average bits per expert weight, scales included"
    )
    size: Size | None = Field(default=None, description='Instead of `bits`: size of all tensors of the file, "12 GB"')
    types: list[str] = Field(
        default=["Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "IQ4_NL", "Q5_0", "Q5_1"],
        min_length=1,
        description="Types that a projection of a layer may get; those of 256 weights only where rows are whole blocks",
    )
    dense: dict[str, list[str]] = Field(
        default={},
        description="Types of the other parts, in order: the first that fits a tensor's rows is taken. Parts: "
        + ", ".join(f"{part} ({', '.join(types)})" for part, types in _DENSE.items()),
    )
    importance: bool = Field(
        default=True, description="Weigh the error of a weight by the mean square of its input channel, per expert"
    )
    search: bool = Field(default=True, description="Look for the best scales; otherwise those of plain converters")
    sample: int = Field(
        default=16, ge=0, description="Experts of a layer whose error is measured for the plan; 0: all of them"
    )
    tokenizer_pre: str | None = Field(
        default=None, description="llama.cpp's name for how the tokenizer splits text, where it can't be told"
    )

    @field_validator("types")
    @classmethod
    def _known_types(cls, value: list[str]) -> list[str]:
        return _checked(value)

    @field_validator("dense", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {part: [types] if isinstance(types, str) else types for part, types in value.items()}

    @field_validator("dense")
    @classmethod
    def _known_parts(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        if unknown := sorted(value.keys() - PARTS.keys()):
            raise ValueError(f"{unknown[0]!r} is no part of a model; there are {', '.join(PARTS)}")
        return {part: _checked(types) for part, types in value.items()}

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.bits is None) == (self.size is None):
            raise ValueError('give either `bits` (average per expert weight, e.g. 4.5) or `size` (e.g. "12 GB")')
        return self

    @property
    def dense_types(self) -> dict[str, list[str]]:
        """`dense`, defaults filled in."""
        return {**_DENSE, **self.dense}


def _checked(names: list[str]) -> list[str]:
    try:
        return [find_type(name).name for name in dict.fromkeys(names)]
    except RecipeError as error:
        raise ValueError(str(error)) from error


@register
class QuantizeGGUF(Pass):
    """Quantize experts into GGUF blocks, a type per layer and projection, under one budget."""

    name = "quantize.gguf"
    summary = "quantize experts into llama.cpp's block types, per layer and projection from a program under one budget"
    paper = "none: K-quants and importance matrices are llama.cpp's; the program is that of quantize.mixed"
    leaves = frozenset({"packed"})
    Options = GGUFOptions
    options: GGUFOptions

    def statistics(self) -> Sequence[Statistic]:
        """Error of each projection at each type; nothing where there is no choice."""
        return [] if len(self.options.types) == 1 else [self._error]

    def needs_inputs(self) -> bool:
        """Importances are of what the experts read."""
        return self.options.importance

    def layout(self, shape: ModelShape) -> Layout:
        """Tensors of the file beside the experts. Raises RecipeError."""
        if self.target.quantized_format != GGUF:
            raise RecipeError(f"{self.name}: the target {self.target.name!r} loads no GGUF: set `target: llama.cpp`")
        if not shape.others:
            raise RecipeError(f"{self.name}: a GGUF is made from a checkpoint folder, not from a model in memory")
        experts = next(iter(shape.layers.values())).num_experts
        others = {n: _pruned(n, s, experts) for n, s in shape.others.items()}
        return layout(shape.config, others, self.options.dense_types)

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Sizes at the budget. Raises RecipeError for what the file can't hold, BudgetError for too small a budget."""
        settled = self.settle(shape)
        budget = self._budget(settled)
        least = most = 0
        bounds = {}
        for index, layer in shape.layers.items():
            sizes = [self._sizes(index, layer, projection) for projection in _projections(layer)]
            least += sum(min(s.values()) for s in sizes)
            bounds[index] = sum(max(s.values()) for s in sizes)
            most += bounds[index]
        if least > budget:
            raise BudgetError(
                f"{self.name}: {show_budget(budget, self.options.size)} for all experts, and in the smallest of "
                f"{', '.join(self.options.types)} that fit their rows they take {show_bytes(least)}: allow more"
            )
        share = min(1.0, budget / most)
        return settled.with_layers(
            {i: replace(layer, bytes=int(bounds[i] * share), kind="packed") for i, layer in shape.layers.items()}
        )

    def settle(self, shape: ModelShape) -> ModelShape:
        """Everything outside the experts takes what its types take."""
        return replace(shape, other_bytes=self.layout(shape).nbytes)

    def plan(self, profile: Profile) -> Plan:
        """A type for every projection of every layer."""
        shape = profile.shape
        laid_out = self.layout(shape)
        units = [(i, p) for i, layer in shape.layers.items() for p in _projections(layer)]
        types = self.options.types
        size = np.zeros((len(units), len(types)), np.int64)
        cost = np.zeros((len(units), len(types)))
        allowed = np.zeros((len(units), len(types)), dtype=bool)
        for u, (index, projection) in enumerate(units):
            layer = shape.layers[index]
            fitting = self._sizes(index, layer, projection)
            measured = profile.of(index, self._error) if self.statistics() else {}
            errors = measured.get("relative", measured.get("squared"))
            for b, name in enumerate(types):
                if name not in fitting:
                    continue
                allowed[u, b], size[u, b] = True, fitting[name]
                cost[u, b] = 0.0 if errors is None else float(errors[_projections(layer).index(projection), b])
        budget = self._budget(self.settle(shape))
        found = solve_arrays(cost, size, budget, allowed, gap=0.0, names=[f"layer {i} {p}" for i, p in units])
        layers: dict[int, dict[str, Any]] = {i: {"types": {}} for i in shape.layers}
        for (index, projection), choice in zip(units, found.choice.tolist(), strict=True):
            layers[index]["types"][projection] = types[choice]
        chosen = [name for decision in layers.values() for name in decision["types"].values()]
        summary = {
            "expert_bytes": int(found.size),
            "budget_bytes": budget,
            "cost": float(found.cost),
            "solver": found.solver,
            "gap": float(found.gap),
            "projections_per_type": {name: chosen.count(name) for name in types},
            "dense_types": _counted(laid_out),
        }
        return Plan(self.name, layers, summary, self._notes(shape, laid_out, found.note))

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Quantize a block's experts and put the blocks in place."""
        experts = FusedExperts(block.experts_module)
        squares = channel_squares(inputs, experts) if inputs is not None else None
        everyone = list(range(experts.num_experts))
        stacks: dict[str, list[tuple[list[int], Stack]]] = {}
        errors = {}
        for projection, matrix_EOK in experts.weights().matrices():
            kind = find_type(decision["types"][projection])
            importance_EK = squares.importance(projection) if squares is not None else None
            blocks = quantize(matrix_EOK, kind, importance_EK, search=self.options.search)
            errors[projection] = _relative_error(matrix_EOK, blocks, kind, importance_EK)
            stacks[projection] = [(everyone, Stack.of_blocks(blocks, kind.name, matrix_EOK.shape[-1]))]
        pack_experts(block, stacks)
        report: list[dict[str, Any]] = [{} for _ in everyone]
        if inputs is not None:
            counts = Dispatch.of(inputs.index_TK, inputs.weight_TK, len(everyone)).counts
            report = [{"tokens": count} for count in counts]
        return {"types": decision["types"], "relative_error": errors, "experts": report}

    # --- inside ------------------------------------------------------------------------------------------------

    @property
    def _error(self) -> BlockTypeError:
        options = self.options
        return BlockTypeError(tuple(options.types), options.importance, options.search, options.sample)

    def _budget(self, settled: ModelShape) -> int:
        if self.options.bits is not None:
            return int(self.options.bits * sum(layer.weights for layer in settled.layers.values()) / 8)
        assert self.options.size is not None
        return parse_bytes(self.options.size) - settled.other_bytes

    def _sizes(self, index: int, layer: LayerShape, projection: str) -> dict[str, int]:
        """Type → bytes of a projection of all experts of a layer, of those types that its rows are whole blocks of."""
        rows, length = layer.intermediate, layer.hidden
        if projection == "down":
            rows, length = length, rows
        kinds = [kind for name in self.options.types if (kind := find_type(name)).fits(length)]
        if not kinds:
            raise RecipeError(
                f"{self.name}: rows of the {projection} projections of layer {index} have {length} weights, which are "
                f"not whole blocks of {', '.join(self.options.types)}: add {_fitting(length)} to `types`"
            )
        return {kind.name: layer.num_experts * rows * kind.row_bytes(length) for kind in kinds}

    def _notes(self, shape: ModelShape, laid_out: Layout, solver_note: str) -> list[str]:
        notes = [solver_note] if solver_note else []
        lengths = {length for layer in shape.layers.values() for length in (layer.hidden, layer.intermediate)}
        for length in sorted(lengths):
            missing = [name for name in self.options.types if not find_type(name).fits(length)]
            if missing:
                notes.append(f"rows of {length} weights are not whole blocks of {', '.join(missing)}")
        missing_for: dict[str, list[str]] = {}
        for name, reason in laid_out.left_out.items():
            missing_for.setdefault(reason, []).append(name)
        for reason, names in missing_for.items():  # of a draft layer hundreds; moe_compress.json lists all
            more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
            notes.append(f"{names[0]}{more} not in the file: {reason}")
        notes += [f"{name} is a copy of {origin}: llama.cpp wants it" for name, origin in laid_out.copied.items()]
        return notes


def _pruned(name: str, shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """Shape that a router's tensor has after earlier passes removed experts."""
    router = name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight", "e_score_correction_bias"))
    return (experts, *shape[1:]) if router else shape


def _projections(layer: LayerShape) -> list[str]:
    return ["gate", "up", "down"] if layer.matrices == 3 else ["up", "down"]


def _fitting(length: int) -> str:
    return "Q8_0 or IQ4_NL" if length % 32 == 0 else "BF16"


def _counted(laid_out: Layout) -> dict[str, dict[str, int]]:
    """Part of the model → type → tensors."""
    found: dict[str, dict[str, int]] = {}
    for name, placed in laid_out.types.items():
        part = next((p for p, pattern in PARTS.items() if pattern.fullmatch(name)), "other")
        counts = found.setdefault(part, {})
        counts[placed.type.name] = counts.get(placed.type.name, 0) + 1
    return found


def _relative_error(matrix_EOK: Any, blocks_EOB: Any, kind: BlockType, importance_EK: Any) -> float:
    """Σ importance · (w − ŵ)² / Σ importance · w² over all experts, an expert at a time; 0 where nothing counts."""
    top = bottom = 0.0
    for expert in range(len(matrix_EOK)):
        weight_OK = matrix_EOK[expert].float()
        importance_K = 1.0 if importance_EK is None else importance_EK[expert]
        change_OK = dequantize(blocks_EOB[expert], kind) - weight_OK
        top += float((change_OK.square() * importance_K).sum())
        bottom += float((weight_OK.square() * importance_K).sum())
    return top / bottom if bottom else 0.0
