"""Experts as servers run them in 8 bits: a number per weight, scales, and activations that are quantized on the way.

Each projection of all experts of a layer is one stack of int8 or e4m3 numbers and one of scales. A forward does what
the server does: the rows that a projection reads are quantized, token by token, with a scale that they decide
themselves, and multiplied with what the weights stand for. So whatever is measured here (scores, the probe, what later
layers read) holds the errors of weights and activations. Weights are made float32 for the experts that got tokens only,
a few at a time.

docs/format.md specifies the tensors; compress/export/schemes.py the schemes.

Letters: E experts, O/K output and input features of a projection, R rows by expert, M × N blocks of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_compress.export.schemes import Scheme
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.dispatch import Dispatch

from .float8 import decode_float8, quantized_inputs, spread_scales
from .packed import PackedExperts, PackedProjection, fused_module
from .run_packed import by_chunks
from .stack import keeping_dtype, name_of


class ScaledProjection(PackedProjection):
    """One projection of all experts of a layer.

    Parameters (never trained): `codes` [E, O, K] in the scheme's dtype, `scale` [E, M, N].
    """

    def __init__(self, scheme: Scheme, codes_EOK: Tensor, scale_EMN: Tensor):
        nn.Module.__init__(self)
        self.scheme = scheme
        experts, self.out_features, self.in_features = codes_EOK.shape
        self.assignment = [scheme.name] * experts
        self.codes = nn.Parameter(codes_EOK, requires_grad=False)
        self.scale = nn.Parameter(scale_EMN, requires_grad=False)

    def forward(self, experts: Tensor) -> Tensor:
        """The matrices of some experts in float32 [len(experts), O, K]. A call, so that offloading hooks see it."""
        experts = experts.to(self.codes.device)
        scale = spread_scales(self.scale[experts].float(), self.scheme.block(self.in_features))
        codes = self.codes[experts]
        return (decode_float8(codes) if self.scheme.is_float else codes.float()).mul_(scale)

    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The matrices of some experts: [len(experts), O, K], the exact products rounded once."""
        return self(torch.tensor(list(experts))).to(dtype)  # type: ignore[no-any-return]

    def linear(self, input_RK: Tensor, dispatch: Dispatch) -> Tensor:
        """Each expert's rows, quantized, times its own matrix → [R, O]; in float32, as servers accumulate."""
        read = quantized_inputs(input_RK, self.scheme.inputs_share, self.scheme.is_float)
        return super().linear(read, dispatch).to(input_RK.dtype)

    def products(self, input_RK: Tensor, dispatch: Dispatch, backward: bool = False) -> Tensor:
        """Rows times matrices (`backward`: transposed); of the experts with rows, some at a time."""
        return by_chunks(self, input_RK, dispatch, backward)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        nn.Module._apply(self, keeping_dtype(fn), recurse)
        return self


class ScaledExperts(PackedExperts):
    """Experts in one scheme of servers; otherwise like `PackedExperts`."""

    kind = "scaled"

    def describe(self) -> dict[str, Any]:
        """JSON from which `build_scaled` rebuilds the module."""
        projections: dict[str, Any] = self.projections
        down: ScaledProjection = projections["down"]
        return {
            "scheme": down.scheme.to_json(),
            "scale_dtype": name_of(down.scale.dtype),
            "num_experts": self.num_experts,
            "projections": {
                name: {"out_features": p.out_features, "in_features": p.in_features} for name, p in projections.items()
            },
            "biases": {n: name_of(p.dtype) for n, p in self._parameters.items() if p is not None},
        }


def build_scaled(block: MoEBlock, layout: Mapping[str, Any]) -> ScaledExperts:
    """The module that `describe` described, for a block's experts, tensors on the meta device."""
    scheme, count = Scheme(**layout["scheme"]), int(layout["num_experts"])
    projections = {}
    biases = {}
    for name, entry in layout["projections"].items():
        shape = entry["out_features"], entry["in_features"]
        codes = torch.empty(count, *shape, dtype=scheme.code, device="meta")
        dtype = getattr(torch, layout["scale_dtype"])
        scale = torch.empty(count, *scheme.scale_shape(*shape), dtype=dtype, device="meta")
        projections[name] = ScaledProjection(scheme, codes, scale)
        if f"{name}_bias" in layout["biases"]:
            dtype = getattr(torch, layout["biases"][f"{name}_bias"])
            biases[f"{name}_bias"] = torch.empty(count, shape[0], dtype=dtype, device="meta")
    return ScaledExperts(fused_module(block), dict(projections), biases)


def scale_experts(block: MoEBlock, projections: Mapping[str, ScaledProjection]) -> ScaledExperts:
    """Replace a block's fused experts. Returns the module now in place."""
    original = fused_module(block)
    biases = {n: v.clone() for n, v in FusedExperts(original).weights().items() if n.endswith("_bias")}
    module = ScaledExperts(original, dict(projections), biases)
    block.replace_experts(module)
    return module
