"""Experts of unequal width: the module that runs them, and that the `native` format stores as it is.

The neurons of all experts of a layer lie one after the other, expert by expert, without padding: row n of each of the
matrices [N, H] is one neuron (the down projection's column, too, is a row here). While running, the experts that got
tokens are spread to the widest of the layer, a few at a time, so that the products stay batched; what lies beyond an
expert's own width is masked, whatever the activation makes of it. docs/format.md specifies the tensors.

Letters: E experts, N neurons of all experts, I neurons of the widest, H hidden, R rows by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock
from moe_compress.model.dispatch import Dispatch
from moe_compress.quant.packed import PackedExperts, PackedProjection, fused_module
from moe_compress.quant.run_packed import by_chunks
from moe_compress.quant.stack import keeping_dtype

# The width that products see is a multiple of this: grouped products want rows of whole 16 bytes.
_STEP = 8


class RaggedProjection(PackedProjection):
    """One projection of all experts of a layer.

    Parameters (never trained): `rows` [N, H].

    Args:
        rows_NH: neurons of all experts.
        widths: of each expert; their sum is N.
        down: whether neurons are columns of the matrices, not rows.
    """

    def __init__(self, rows_NH: Tensor, widths: Sequence[int], down: bool):
        nn.Module.__init__(self)
        self.assignment = ["ragged"] * len(widths)
        self.down, self.widths = down, list(widths)
        widest, hidden = padded(widths), rows_NH.shape[1]
        self.out_features, self.in_features = (hidden, widest) if down else (widest, hidden)
        self.rows = nn.Parameter(rows_NH, requires_grad=False)

    def forward(self, experts: Tensor) -> Tensor:
        """The neurons of some experts, rows of others or of none beyond their widths: [len(experts), I, H]. A call, so
        that offloading hooks see it."""
        ends = torch.tensor(self.widths).cumsum(0)
        first = (ends - torch.tensor(self.widths))[experts.cpu()]
        place = first.unsqueeze(1) + torch.arange(padded(self.widths))
        return self.rows[place.clamp_max(len(self.rows) - 1).to(self.rows.device)]

    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The matrices of some experts, zeros beyond their widths: [len(experts), O, K]."""
        neurons_CIH = self(torch.tensor(list(experts))).to(dtype)
        inside = within([self.widths[e] for e in experts], neurons_CIH.shape[1]).to(neurons_CIH.device)
        neurons_CIH = neurons_CIH * inside.unsqueeze(2)
        matrices: Tensor = neurons_CIH.transpose(1, 2) if self.down else neurons_CIH
        return matrices

    def products(self, input_RK: Tensor, dispatch: Dispatch, backward: bool = False) -> Tensor:
        """Rows times matrices (`backward`: transposed); of the experts with rows, some at a time."""
        return by_chunks(self, input_RK, dispatch, backward)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        nn.Module._apply(self, keeping_dtype(fn), recurse)
        return self


class RaggedExperts(PackedExperts):
    """Dense experts of unequal width; otherwise like `PackedExperts`. Biases of gate and up are [N] as well."""

    kind = "ragged"

    @property
    def widths(self) -> list[int]:
        """Neurons of each expert."""
        down: Any = self.projections["down"]
        return list(down.widths)

    def activations(self, input_RH: Tensor, dispatch: Dispatch) -> Tensor:
        """Neuron activations [R, I], zeros beyond an expert's width."""
        activation_RI = super().activations(input_RH, dispatch)
        inside_EI = within(self.widths, activation_RI.shape[1]).to(activation_RI.device)
        return torch.where(inside_EI[dispatch.expert_R], activation_RI, 0)

    def expert(self, index: int) -> ExpertWeights:
        """One expert, as wide as it is."""
        width = self.widths[index]
        cut = {
            name: value[:, :width] if name == "down" else value if name == "down_bias" else value[:width]
            for name, value in super().expert(index).items()
        }
        return ExpertWeights(**cut)

    def describe(self) -> dict[str, Any]:
        """JSON from which `build_ragged` rebuilds the module."""
        rows: Any = self.projections["down"].get_parameter("rows")
        return {
            "widths": self.widths,
            "hidden_size": int(rows.shape[1]),
            "dtype": _name(rows.dtype),
            "projections": list(self.projections),
            "biases": {n: _name(p.dtype) for n, p in self._parameters.items() if p is not None},
        }

    def _weights(self, experts: Sequence[int]) -> ExpertWeights:
        matrices = {n: p.matrices(experts, torch.float32) for n, p in self.projections.items()}
        index = torch.tensor(list(experts))
        biases = {n: self._bias(n, p)[index] for n, p in self._parameters.items() if p is not None}
        return ExpertWeights(**matrices, **biases)

    def _project(self, name: str, input_RK: Tensor, dispatch: Dispatch) -> Tensor:
        output = self.projections[name].linear(input_RK, dispatch)
        bias = self._parameters.get(f"{name}_bias")
        return output if bias is None else output + self._bias(f"{name}_bias", bias)[dispatch.expert_R].to(output.dtype)

    def _bias(self, name: str, stored: Tensor) -> Tensor:
        """A bias per expert: [E, I], zeros beyond an expert's width, or [E, H]."""
        if name == "down_bias":
            return stored
        inside_EI = within(self.widths, padded(self.widths)).to(stored.device)
        spread = stored.new_zeros(inside_EI.shape)
        spread[inside_EI] = stored
        return spread


def build_ragged(block: MoEBlock, layout: Mapping[str, Any]) -> RaggedExperts:
    """The module that `describe` described, for a block's experts, tensors on the meta device."""
    widths, hidden = layout["widths"], layout["hidden_size"]

    def empty(dtype: str, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")

    projections = {
        name: RaggedProjection(empty(layout["dtype"], sum(widths), hidden), widths, name == "down")
        for name in layout["projections"]
    }
    biases = {
        name: empty(dtype, len(widths), hidden) if name == "down_bias" else empty(dtype, sum(widths))
        for name, dtype in layout["biases"].items()
    }
    return RaggedExperts(fused_module(block), dict(projections), biases)


def make_ragged(block: MoEBlock, kept_EI: Tensor, down_bias_EH: Tensor | None = None) -> RaggedExperts:
    """Replace a block's fused experts by those with only the neurons that `kept_EI` [E, I] says.

    `down_bias_EH`: what is added to their outputs, in place of the biases that they have.
    """
    original = fused_module(block)
    weights = FusedExperts(original).weights()
    kept_EI = kept_EI.to(weights.down.device)
    widths = kept_EI.sum(dim=1).tolist()
    projections, biases = {}, {}
    for name, value in weights.items():
        if name == "down_bias":
            biases[name] = value.clone()
        elif name.endswith("_bias"):
            biases[name] = value[kept_EI]
        else:
            rows_NH = (value.transpose(1, 2) if name == "down" else value)[kept_EI]
            projections[name] = RaggedProjection(rows_NH, widths, name == "down")
    if down_bias_EH is not None:
        biases["down_bias"] = down_bias_EH
    module = RaggedExperts(original, dict(projections), biases)
    block.replace_experts(module)
    return module


def padded(widths: Sequence[int]) -> int:
    """The width that products see."""
    return -(-max(widths) // _STEP) * _STEP


def within(widths: Sequence[int], neurons: int) -> Tensor:
    """Which of `neurons` places belong to an expert: [E, neurons]."""
    return torch.arange(neurons) < torch.tensor(list(widths)).unsqueeze(1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
