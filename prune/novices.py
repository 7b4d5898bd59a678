"""Experts replaced by what they put out on average (MoNE's novices), the router left as it is.

A replaced expert is one of no neurons with a bias behind its down projection: experts of unequal width (ragged.py),
which the `native` format holds as it is.

Letters: E experts, T tokens, R rows (token, expert), H hidden, I neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.experts import run_experts
from moe_compress.model.shape import LayerShape

from .ragged import make_ragged, padded

# Tokens that run through their experts at a time.
_CHUNK = 2048


def mean_outputs(block: MoEBlock, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
    """Every expert's mean output over the tokens routed to it [E, H], float64, zeros where there is none; and how much
    these tokens count [E]."""
    count = block.num_experts
    total_EH = torch.zeros(count, inputs.hidden_TH.shape[1], dtype=torch.float64, device=inputs.hidden_TH.device)
    counts_E = total_EH.new_zeros(count)
    weighed = inputs.token_weight_T
    counted_T = total_EH.new_ones(inputs.tokens) if weighed is None else weighed.to(total_EH)
    parts = (inputs.hidden_TH, inputs.index_TK, inputs.weight_TK, counted_T)
    with torch.no_grad():
        for hidden, index, weight, counted in zip(*(part.split(_CHUNK) for part in parts), strict=True):
            _, dispatch, _, output_RH = run_experts(block.experts, hidden, index, weight)
            counted_R = counted[dispatch.token_R]
            total_EH.index_add_(0, dispatch.expert_R, output_RH.double() * counted_R.unsqueeze(1))
            counts_E.index_add_(0, dispatch.expert_R, counted_R)
    return total_EH / counts_E.clamp_min(1e-300).unsqueeze(1), counts_E


def put_means(block: MoEBlock, removed: Sequence[int], inputs: BlockInputs) -> list[int]:
    """Replace experts by their mean outputs on what the block reads. Returns those that no token reached: zeros.

    Raises UnsupportedModelError where a norm follows the experts, behind which no bias gives the mean.
    """
    experts = FusedExperts(block.experts_module)
    if experts.has_norm:
        raise UnsupportedModelError(
            f"layer {block.layer}: prune.experts: a norm follows its experts, so none can be replaced by a mean; use "
            "replace: nothing"
        )
    mean_EH, counts_E = mean_outputs(block, inputs)
    weights = experts.weights()
    stays_E = torch.ones(len(mean_EH), dtype=torch.bool)
    stays_E[list(removed)] = False
    before_EH = torch.zeros_like(weights.down[:, :, 0]) if weights.down_bias is None else weights.down_bias
    bias_EH = torch.where(stays_E.to(mean_EH.device).unsqueeze(1), before_EH.to(mean_EH), mean_EH)
    came = (d for n, d in inputs.stored.items() if n.startswith(block.path) and "down_proj" in n)
    dtype = next(came, before_EH.dtype) if weights.down_bias is None else before_EH.dtype
    make_ragged(block, stays_E.unsqueeze(1).expand(-1, weights.down.shape[2]), bias_EH.to(dtype))
    return [e for e in removed if counts_E[e] == 0]


def with_novices(layer: LayerShape, kept: int) -> LayerShape:
    """The shape of a layer of which `kept` experts keep their weights and the others are a vector each."""
    neurons = kept * layer.intermediate
    inner = max(0, layer.biases - layer.hidden)  # biases of gate and up
    entries = neurons * layer.matrices * layer.hidden + kept * inner + layer.num_experts * layer.hidden
    return replace(
        layer,
        kind="ragged",
        neurons=neurons,
        intermediate=padded([layer.intermediate]),
        biases=layer.biases or layer.hidden,
        bytes=entries * layer.weight_bytes,
    )
