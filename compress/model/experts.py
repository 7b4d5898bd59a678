"""A layer's experts, seen alike in every family.

`FusedExperts` looks at an experts module of transformers: 3-D parameters whose layout (gate and up concatenated or
interleaved, transposed, with or without bias, gate, norm after each expert) is what the class's decorator declares.
The arithmetic between the products is the class's own. Nothing here knows a family.

Letters: E experts, I intermediate size (neurons), H hidden size of the experts, R rows sorted by expert (dispatch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .dispatch import Dispatch, grouped_linear
from .tensors import set_tensor


@dataclass(frozen=True)
class ExpertWeights:
    """Experts' matrices in the canonical orientation: all experts of a layer [E, …], or one expert without the E.

    Attributes:
        up, down: [E, I, H], [E, H, I].
        gate: [E, I, H]; None where experts have no gate.
        gate_bias, up_bias, down_bias: [E, I], [E, I], [E, H]; None where experts have no bias.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """The same with `function` applied to every tensor that is there."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return ExpertWeights(**{n: function(v) for n, v in values.items() if v is not None})

    def part(self, experts: range) -> ExpertWeights:
        """A run of consecutive experts, as views."""
        return self.map(lambda stacked: stacked[experts.start : experts.stop])

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of what is there, gate first."""
        order = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return [(name, value) for name in order if (value := getattr(self, name)) is not None]

    def matrices(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of the projections, without biases."""
        return [(name, value) for name, value in self.items() if not name.endswith("_bias")]

    @property
    def parameters(self) -> int:
        """Number of weights in the projections (biases not counted)."""
        return sum(value.numel() for _, value in self.matrices())


class Experts(Protocol):
    """What everybody may ask of a layer's experts, whatever holds them."""

    @property
    def num_experts(self) -> int:
        """Number of experts E."""

    @property
    def hidden_size(self) -> int:
        """Size H of their input and output."""

    @property
    def intermediate_size(self) -> int:
        """Number of neurons I of each expert, of the widest where they differ."""

    def weights(self) -> ExpertWeights:
        """All experts."""

    def expert(self, index: int) -> ExpertWeights:
        """One expert."""

    def activations(self, input_RH: Tensor, dispatch: Dispatch) -> Tensor:
        """Neuron activations [R, I]."""

    def outputs(self, activation_RI: Tensor, dispatch: Dispatch) -> Tensor:
        """Outputs [R, H] before the routing weight."""


class FusedExperts:
    """View of an experts module that carries transformers' experts interface; holds no weights of its own."""

    def __init__(self, module: nn.Module):
        self.module: Any = module  # its attributes are what the class declares
        self.has_gate = bool(module.has_gate)
        self.has_bias = bool(module.has_bias)
        self.transposed = bool(module.is_transposed)
        self.concatenated = bool(module.is_concatenated)
        self.has_norm = bool(getattr(module, "has_post_expert_norm", False))

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return int(self.module.down_proj.shape[0])

    @property
    def hidden_size(self) -> int:
        """Size H of the experts' input and output (smaller than the model's where experts work in a latent space)."""
        return int(self.module.down_proj.shape[2 if self.transposed else 1])

    @property
    def intermediate_size(self) -> int:
        """Number of neurons I of each expert."""
        return int(self.module.down_proj.shape[1 if self.transposed else 2])

    def weights(self) -> ExpertWeights:
        """All experts, as views: writing into them changes the module."""
        turn = (lambda w: w.transpose(-2, -1)) if self.transposed else (lambda w: w)
        down = turn(self.module.down_proj.data)
        down_bias = self.module.down_proj_bias.data if self.has_bias else None
        if not self.has_gate:
            up_bias = self.module.up_proj_bias.data if self.has_bias else None
            return ExpertWeights(turn(self.module.up_proj.data), down, up_bias=up_bias, down_bias=down_bias)
        gate, up = self._halves(turn(self.module.gate_up_proj.data), dim=-2)
        gate_bias, up_bias = self._halves(self.module.gate_up_proj_bias.data, dim=-1) if self.has_bias else (None, None)
        return ExpertWeights(up, down, gate, gate_bias, up_bias, down_bias)

    def resize(self, neurons: int, device: str | torch.device = "meta") -> None:
        """Give the module's parameters another number of neurons; what they hold is undefined."""
        rows, columns = (2, 1) if self.transposed else (1, 2)
        halves = {"gate_up_proj": (rows, 2), "gate_up_proj_bias": (1, 2), "up_proj": (rows, 1), "up_proj_bias": (1, 1)}
        for name, (dim, each) in {**halves, "down_proj": (columns, 1)}.items():
            parameter = self.module._parameters.get(name)
            if parameter is not None:
                shape = list(parameter.shape)
                shape[dim] = each * neurons
                set_tensor(self.module, name, torch.empty(shape, dtype=parameter.dtype, device=device))

    def expert(self, index: int) -> ExpertWeights:
        """One expert: gate [I, H], up [I, H], down [H, I]."""
        return self.weights().map(lambda stacked: stacked[index])

    def activations(self, input_RH: Tensor, dispatch: Dispatch) -> Tensor:
        """Neuron activations [R, I]: what the down projection reads."""
        name = "gate_up_proj" if self.has_gate else "up_proj"
        projected = self._linear(input_RH, name, dispatch)
        return self.activate(projected)

    def activate(self, projected_RO: Tensor) -> Tensor:
        """The class's own arithmetic between projections: [R, 2I] (its layout of gate and up) or [R, I] → [R, I]."""
        if self.has_gate:
            return self.module._apply_gate(projected_RO)  # type: ignore[no-any-return, operator]
        return self.module.act_fn(projected_RO)  # type: ignore[no-any-return, operator]

    def interleave(self, gate_RI: Tensor, up_RI: Tensor) -> Tensor:
        """Gate and up outputs → the layout that `activate` takes."""
        if self.concatenated:
            return torch.cat([gate_RI, up_RI], dim=-1)
        return torch.stack([gate_RI, up_RI], dim=-1).flatten(-2)

    def outputs(self, activation_RI: Tensor, dispatch: Dispatch) -> Tensor:
        """Expert outputs [R, H] before the routing weight, including the norm that some families put there."""
        output = self._linear(activation_RI, "down_proj", dispatch)
        return self.module.post_expert_norm(output) if self.has_norm else output  # type: ignore[operator]

    def with_weights(self, weights: ExpertWeights, input_RH: Tensor, dispatch: Dispatch) -> tuple[Tensor, Tensor]:
        """What experts of this class would compute with other weights.

        Args:
            weights: canonical, of the experts that `dispatch` counts.
            input_RH: rows sorted by expert.
            dispatch: which rows are whose.

        Returns:
            Neuron activations [R, I'] and outputs [R, H].
        """
        activation = self.activations_with(weights, input_RH, dispatch)
        output = _with_bias(activation, weights.down, weights.down_bias, dispatch)
        return activation, self.module.post_expert_norm(output) if self.has_norm else output  # type: ignore[operator]

    def activations_with(self, weights: ExpertWeights, input_RH: Tensor, dispatch: Dispatch) -> Tensor:
        """The activations [R, I'] of `with_weights` alone."""
        projected = _with_bias(input_RH, weights.up, weights.up_bias, dispatch)
        if weights.gate is not None:
            gate_RI = _with_bias(input_RH, weights.gate, weights.gate_bias, dispatch)
            projected = self.interleave(gate_RI, projected)
        return self.activate(projected)

    def _linear(self, input_RI: Tensor, name: str, dispatch: Dispatch) -> Tensor:
        weight = getattr(self.module, name)
        output = grouped_linear(input_RI, weight.transpose(-2, -1) if self.transposed else weight, dispatch.offsets_E)
        if self.has_bias:
            output = output + getattr(self.module, name + "_bias")[dispatch.expert_R]
        return output

    def _halves(self, fused: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Gate and up of a fused tensor, as views."""
        if self.concatenated:
            gate, up = fused.chunk(2, dim=dim)
            return gate, up
        pick = [slice(None)] * fused.dim()
        pick[dim] = slice(0, None, 2)
        gate = fused[tuple(pick)]
        pick[dim] = slice(1, None, 2)
        return gate, fused[tuple(pick)]


def _with_bias(input_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, dispatch: Dispatch) -> Tensor:
    output = grouped_linear(input_RI, weight_EOI, dispatch.offsets_E)
    return output if bias_EO is None else output + bias_EO[dispatch.expert_R]


def run_experts(
    experts: Experts, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Dispatch, Tensor, Tensor]:
    """The whole experts module from its parts.

    Returns:
        output [T, H], the dispatch, neuron activations [R, I], and expert outputs [R, H] before the routing weight.
    """
    dispatch = Dispatch.of(index_TK, weight_TK, experts.num_experts)
    activation = experts.activations(hidden_TH[dispatch.token_R], dispatch)
    output = experts.outputs(activation, dispatch)
    return dispatch.combine(output).to(hidden_TH.dtype), dispatch, activation, output
