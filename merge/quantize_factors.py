"""The pass `quantize.factors`: the matrices of factored experts as packed integers, rounded to nearest or by HQQ.

Factors are linear layers too: what a row of U or V is multiplied with is a plain product. So every stack of a factored
block (bases, left and right factors, rows kept whole) gets codes and scales in place of weights, and runs and is stored
like a packed one. A stack whose rows no group divides has a scale per row, as left factors of low ranks do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.errors import RecipeError
from moe_compress.model import MoEBlock
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register
from moe_compress.quant.grid import Grid, GroupSize, Quantized, dequantize
from moe_compress.quant.hqq import half_quadratic
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.stack import Stack

from .terms import Term

_CHUNK_BYTES = 512 << 20


class FactorOptions(PassOptions):
    """Options of `quantize.factors`."""

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(default=8, description="Width of every factor")
    group_size: GroupSize = Field(default=64, description="Weights of a row that share a scale, -1 for the whole row")
    symmetric: bool = Field(default=True, description="No zero points")
    method: Literal["rtn", "hqq"] = Field(default="rtn", description="Round to nearest, or half-quadratic (HQQ)")


@register
class QuantizeFactors(Pass):
    """Pack the factors of `merge.factorise`."""

    name = "quantize.factors"
    summary = "quantize the factors that merge.factorise made: every width the same, rounded to nearest or by HQQ"
    paper = "the order of D2-MoE (arXiv 2502.17298) and BitsMoE (2606.00079): factors first; HQQ (Badri and Shaji 2023)"
    Options = FactorOptions
    accepts = frozenset({"factored"})
    options: FactorOptions

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Sizes by the width alone: how factors are shaped is known when they are there."""
        if self.target.quantized_format != "native":
            raise RecipeError(
                f"{self.name}: the target {self.target.name!r} loads no factored experts: take target: native"
            )
        group = self.options.group_size
        bits = self.options.bits + (16 / group if group > 0 else 0)
        layers = {
            i: replace(layer, bytes=round(layer.bytes * bits / (8 * layer.weight_bytes)))
            for i, layer in shape.layers.items()
        }
        return shape.with_layers(layers)

    def plan(self, profile: Profile) -> Plan:
        """The same for all."""
        return Plan(self.name, {i: {"bits": self.options.bits} for i in profile.shape.layers})

    @torch.no_grad()
    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Put packed stacks in the place of the block's dense ones."""
        module: Any = block.experts_module
        told: dict[str, Any] = {}
        for name, projection in module.projections.items():
            for term in projection.terms:
                for where, stack in term.stacks().items():
                    if stack.encoding.bits:
                        raise RecipeError(f"{self.name}: the factors of layer {block.layer} are quantized already")
                    packed, error = self._packed(stack, decision["bits"])
                    _put(term, where, packed)
                    told[f"{name}.{term.kind}.{where}"] = {"group_size": packed.encoding.group_size, "error": error}
        return {"factors": told}

    def _packed(self, stack: Stack, bits: int) -> tuple[Stack, float]:
        """The stack in codes, and ‖ΔW‖² / ‖W‖²."""
        group = self.options.group_size
        group = group if group > 0 and stack.in_features % group == 0 else -1
        grid = Grid.of_width(bits, group, self.options.symmetric)
        quantize = round_to_nearest if self.options.method == "rtn" else half_quadratic
        parts: list[Quantized] = []
        lost, size = 0.0, 0.0
        for chunk in chunks([16 * stack.out_features * stack.in_features] * len(stack.weight), _CHUNK_BYTES):
            weight: Tensor = stack.weight[chunk.start : chunk.stop].float()
            parts.append(quantize(weight, grid))
            lost += float((weight - dequantize(parts[-1], torch.float32)).double().square().sum())
            size += float(weight.double().square().sum())
        zero = None if parts[0].zero is None else torch.cat([p.zero for p in parts if p.zero is not None])
        whole = Quantized(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]), zero, grid)
        return Stack.holding(whole), lost / max(size, 1e-300)


def _put(term: Term, where: str, stack: Stack) -> None:
    parent, _, name = where.rpartition(".")
    setattr(term.get_submodule(parent), name, stack)
