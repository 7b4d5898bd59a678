"""The pass `quantize.scheme`: all experts in one 8-bit scheme of servers, activations quantized as the server does it.

Plan: nothing to decide, the scheme says it all. Apply: scales by search, then the nearest codes; for integers GPTQ too.
Routers stay as they are, and so does everything else that isn't an expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.errors import RecipeError
from moe_compress.export.schemes import BLOCK, Scheme
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Pass, Plan, register

from .experts import CHUNK_BYTES, Widths, solve_experts
from .float8 import decode_float8, encode_float8, float8_scales, quantized_inputs, spread_scales
from .grid import Grid, dequantize
from .input_smoothing import check_reachable, left_out, scheme_errors, smooth_inputs
from .rtn import round_to_nearest
from .scaled import ScaledProjection, scale_experts
from .solver import InputSmoothing, SolverOptions

# Scales of e4m3 weights are float32, as servers allocate them; those of integers have the solvers' dtype.
_FLOAT_SCALE, _INTEGER_SCALE = torch.float32, torch.bfloat16


class SchemeOptions(InputSmoothing):
    """Options of `quantize.scheme`."""

    scheme: Literal["fp8", "fp8-block", "w8a8", "w4a8"] = Field(
        description="fp8: e4m3, scales per row and token; fp8-block: per 128×128 block and 128 inputs of a token; "
        "w8a8: 8-bit integers, scales per row and token; w4a8: 4-bit integers in groups, 8-bit activations"
    )
    group_size: Literal[-1, 32, 64, 128] | None = Field(
        default=None, description="w4a8: weights that share a scale, -1 for a whole row; default: 128"
    )
    method: Literal["rtn", "gptq"] = Field(
        default="rtn", description="Round-to-nearest (needs no data), or GPTQ (integers only)"
    )
    search: Literal["none", "mse"] = Field(
        default="mse", description="Scales: from the largest weight, or where the squared error is least"
    )
    damping: float = Field(default=0.01, ge=0, description="GPTQ: added to the Hessian's diagonal, times its mean")
    shrinkage: float | None = Field(
        default=None,
        ge=0,
        description="GPTQ: tokens that the layer's mean Hessian counts for; default: as many as it has rows",
    )
    smooth: Literal["none", "input"] = Field(
        default="none",
        description="input: move factors from the norm before the block to router, experts and shared experts where "
        "that lowers the error of quantized products (EAQuant), so that fewer inputs stand out of a token. Reads the "
        "text",
    )

    @property
    def smooths_input(self) -> bool:
        """See InputSmoothing."""
        return self.smooth == "input"

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.group_size is not None and self.scheme != "w4a8":
            raise ValueError(f"{self.scheme} has no groups to choose: leave `group_size` out (w4a8 has them)")
        if self.method == "gptq" and self.scheme.startswith("fp8"):
            raise ValueError(f"GPTQ rounds to integers, and {self.scheme} is e4m3: take `method: rtn`, or w8a8 or w4a8")
        return self


@register
class QuantizeScheme(Pass):
    """Quantize experts and their activations in a scheme that servers have kernels for."""

    name = "quantize.scheme"
    summary = "experts in FP8, W8A8 or W4A8 as servers run them, activations quantized per token in every score"
    paper = "schemes: compressed-tensors; FP8 in blocks: DeepSeek-V3, arXiv 2412.19437; GPTQ, arXiv 2210.17323"
    leaves = frozenset({"scaled"})
    Options = SchemeOptions
    options: SchemeOptions

    @property
    def scheme(self) -> Scheme:
        """What it quantizes to."""
        return Scheme.served(self.options.scheme, self.options.group_size)

    def needs_inputs(self) -> bool:
        """GPTQ and smoothing read what the experts read."""
        return self.options.method == "gptq" or self.options.smooths_input

    def prepares(self) -> bool:
        """Smoothing changes the norm before the block and all that reads it."""
        return self.options.smooths_input

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Sizes, exactly. Raises RecipeError for a target without the scheme, and for experts that it can't tile."""
        self.target.check_scheme(self.name, self.options.scheme)
        if self.options.smooths_input:
            check_reachable(self.name, shape)
        for index, layer in shape.layers.items():
            for rows, columns in _matrices(layer):
                if reason := self.scheme.misfit(rows, columns):
                    raise RecipeError(f"{self.name}: layer {index}: {reason}; {self._advice(layer)}")
        return shape.with_layers(
            {i: replace(layer, bytes=self._bytes(layer), kind="scaled") for i, layer in shape.layers.items()}
        )

    def plan(self, profile: Profile) -> Plan:
        """The same for every layer."""
        layers = {i: {"scheme": self.scheme.to_json()} for i in profile.shape.layers}
        used = sum(self._bytes(layer) for layer in profile.shape.layers.values())
        notes = left_out(profile.shape) if self.options.smooths_input else []
        return Plan(self.name, dict(layers), {"scheme": self.options.scheme, "expert_bytes": used}, notes)

    def prepare(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs) -> dict[str, Any]:
        """Smooth what a block reads, by what the server will make of it and of rounded weights."""
        scheme = Scheme(**decision["scheme"])

        def read(input_RH: Tensor) -> Tensor:
            return quantized_inputs(input_RH, scheme.inputs_share, scheme.is_float)

        return smooth_inputs(
            block,
            self.options,
            inputs,
            lambda factor_PH: scheme_errors(block, factor_PH, inputs, self._rounded, read, CHUNK_BYTES),
        )

    def _rounded(self, weight_EOK: Tensor) -> Tensor:
        """What round-to-nearest stores of matrices, dequantized."""
        scheme = self.scheme
        if scheme.is_float:
            tiles = scheme.block(weight_EOK.shape[-1])
            scale = float8_scales(weight_EOK, tiles, self.options.search)
            return decode_float8(encode_float8(weight_EOK, scale, tiles)) * spread_scales(scale, tiles)
        grid = Grid.of_width(scheme.bits, scheme.group_size, True)
        return dequantize(round_to_nearest(weight_EOK, grid, search=self.options.search), torch.float32)

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Quantize a block's experts."""
        scheme, experts = Scheme(**decision["scheme"]), FusedExperts(block.experts_module)
        report: list[dict[str, Any]] = [{"scheme": scheme.name} for _ in range(experts.num_experts)]
        made = self._floats(scheme, experts) if scheme.is_float else self._integers(scheme, experts, inputs, report)
        scale_experts(block, made)
        return {"experts": report}

    def _floats(self, scheme: Scheme, experts: FusedExperts) -> dict[str, ScaledProjection]:
        made = {}
        for name, weight_EOK in experts.weights().matrices():
            tiles = scheme.block(weight_EOK.shape[-1])
            scale = float8_scales(weight_EOK, tiles, self.options.search).to(_FLOAT_SCALE)
            made[name] = ScaledProjection(scheme, encode_float8(weight_EOK, scale, tiles), scale)
        return made

    def _integers(
        self, scheme: Scheme, experts: FusedExperts, inputs: BlockInputs | None, report: list[dict[str, Any]]
    ) -> dict[str, ScaledProjection]:
        """By the solvers of packed experts, all at one width."""
        chosen = self.options.model_dump(include={"method", "search", "damping", "shrinkage"})
        settings = SolverOptions(group_size=scheme.group_size, **chosen)
        codes: dict[str, torch.Tensor] = {}
        scales: dict[str, torch.Tensor] = {}
        for name, weight_EOK in experts.weights().matrices():
            codes[name] = torch.empty(weight_EOK.shape, dtype=scheme.code, device=weight_EOK.device)
            shape = scheme.scale_shape(*weight_EOK.shape[1:])
            scales[name] = torch.empty(len(weight_EOK), *shape, dtype=_INTEGER_SCALE, device=weight_EOK.device)
        widths: Widths = {name: [scheme.bits] * experts.num_experts for name in codes}
        for part in solve_experts(experts, widths, settings, inputs):
            # Servers have signed integers; subtracting in bytes wraps to exactly those.
            signed = (part.quantized.codes - (1 << scheme.bits - 1)).view(torch.int8)
            codes[part.projection][part.experts] = signed
            scales[part.projection][part.experts] = part.quantized.scale.to(_INTEGER_SCALE)
            for expert, values in part.report.items():
                report[expert] |= values
        return {name: ScaledProjection(scheme, codes[name], scales[name]) for name in codes}

    def _bytes(self, layer: LayerShape) -> int:
        size = (_FLOAT_SCALE if self.scheme.is_float else _INTEGER_SCALE).itemsize
        each = sum(self.scheme.matrix_bytes(*shape, size) for shape in _matrices(layer))
        return layer.num_experts * (each + layer.biases * layer.weight_bytes)

    def _advice(self, layer: LayerShape) -> str:
        if self.scheme.name == "fp8-block":
            return f"hidden size and neurons must be multiples of {BLOCK}: take the scheme fp8"
        fitting = [g for g in (128, 64, 32) if layer.hidden % g == 0 and layer.intermediate % g == 0]
        return f"set `group_size: {fitting[0] if fitting else -1}`"


def _matrices(layer: LayerShape) -> list[tuple[int, int]]:
    """Rows and columns of each projection."""
    return [(layer.intermediate, layer.hidden)] * (layer.matrices - 1) + [(layer.hidden, layer.intermediate)]
