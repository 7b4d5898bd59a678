"""How much the next token's loss feels each single weight of the experts: the diagonal of an empirical Fisher matrix.

Letters: E experts, R rows (token, expert) sorted by expert, I neurons, H hidden size of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.model import ExpertWeights, FusedExperts, GradientTap, MoEBlock, Tap
from moe_compress.model.dispatch import Dispatch, grouped_gram, grouped_linear

from .statistics import Accumulator, Result, Statistic


@dataclass(frozen=True)
class WeightFisher(Statistic):
    """Σ over the rows of an expert of the squared gradient that the row alone gives each weight (and bias).

    The loss is the next token's cross-entropy, summed over the text. A row's gradient at a matrix is the product of the
    gradient at the matrix's output and its input, so its square is one too, and the sum over rows a product of two
    matrices: no gradient of a weight is ever formed, and nothing depends on how sequences are batched. (Squares of
    whole sequences' gradients, as D2-MoE, arXiv 2502.17298, takes them, also hold the products between tokens, which
    vanish in the mean of a true Fisher matrix.) An expert counts more the more rows it sees.

    Result: what the experts have of `gate`, `up` [E, I, H], `down` [E, H, I], `gate_bias`, `up_bias` [E, I],
    `down_bias` [E, H], as bfloat16: relative sizes are what is asked. Memory: two layers' experts as float32 while
    measuring; what is kept is as large as the model's experts in bfloat16.
    """

    name: ClassVar[str] = "weight_fisher"
    gradients: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Squares(tokens)


class _Squares(Accumulator):
    def __init__(self, tokens: int):
        self.tokens = tokens
        self.sums: dict[str, Tensor] = {}

    def update(self, tap: Tap) -> None:
        assert isinstance(tap, GradientTap)
        # The sweep's loss is a mean: times the tokens it is a sum.
        for name, value in squared_gradients(
            tap.experts, tap.dispatch, tap.input_RH, tap.expert_gradient_RH * self.tokens
        ).items():
            self.sums[name] = self.sums[name].add_(value) if name in self.sums else value

    def result(self) -> Result:
        return {name: value.to("cpu", torch.bfloat16) for name, value in self.sums.items()}


def squared_gradients(experts: object, dispatch: Dispatch, input_RH: Tensor, gradient_RH: Tensor) -> dict[str, Tensor]:
    """Weight's name → Σ over rows of the squared gradient, float32 (float64 stays), given that at each row's output."""
    if not isinstance(experts, FusedExperts):
        raise TypeError("the Fisher matrix is of dense experts' weights: measure before quantizing")
    weights, offsets = experts.weights(), dispatch.offsets_E
    with torch.enable_grad():
        ends = {n: _through(input_RH, w, weights, n, dispatch) for n, w in weights.matrices() if n != "down"}
        if weights.gate is not None:
            activation = experts.activate(experts.interleave(ends["gate"], ends["up"]))
        else:
            activation = experts.activate(ends["up"])
        if experts.has_norm:
            output = _through(activation.detach(), weights.down, weights, "down", dispatch)
            normed = experts.module.post_expert_norm(output)
            (gradient_RH,) = torch.autograd.grad(normed, output, gradient_RH.to(normed.dtype))
        behind = grouped_linear(gradient_RH.to(weights.down.dtype), weights.down.transpose(1, 2), offsets)
        inward = torch.autograd.grad(activation, list(ends.values()), behind.to(activation.dtype))
    at = {**dict(zip(ends, inward, strict=True)), "down": gradient_RH}
    read = {name: activation.detach() if name == "down" else input_RH for name in at}
    found = {}
    for name, gradient in at.items():
        left, right = (_wide(v).square() for v in (gradient, read[name]))
        found[name] = grouped_gram(left, right, offsets)
        if getattr(weights, f"{name}_bias") is not None:
            found[f"{name}_bias"] = left.new_zeros(len(offsets), left.shape[1]).index_add_(0, dispatch.expert_R, left)
    return found


def _through(input_RI: Tensor, weight: Tensor, weights: ExpertWeights, name: str, dispatch: Dispatch) -> Tensor:
    """A projection's output as a leaf."""
    with torch.no_grad():
        output = grouped_linear(input_RI, weight, dispatch.offsets_E)
        bias = getattr(weights, f"{name}_bias")
        return (output if bias is None else output + bias[dispatch.expert_R]).requires_grad_()


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
