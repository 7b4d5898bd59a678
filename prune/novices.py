"""Experts replaced by what they put out on average (MoNE's novices), the router left as it is.

A replaced expert is one of no neurons with a bias behind its down projection: experts of unequal width (ragged.py),
which the `native` format holds as it is.

Letters: E experts, T tokens, R rows (token, expert), H hidden, I neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.experts import run_experts
from moe_compress.model.shape import LayerShape
from moe_compress.refit import LayerRefit, layer_output

from .neurons import silence
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


def put_means(
    block: MoEBlock,
    removed: Sequence[int],
    inputs: BlockInputs,
    ridge: float | None = None,
    protected: Sequence[int] = (),
) -> tuple[list[int], dict[str, Any] | None]:
    """Replace experts by their mean outputs on what the block reads.

    Args:
        block: changed in place.
        removed: experts that are replaced.
        inputs: what the block reads.
        ridge: the other experts' down projections are solved again for what the means leave of the block's output (see
            compress/refit.py); None: they stay as they are.
        protected: of the others, those whose weights stay all the same.

    Returns the experts that no token reached, which become zeros, and what refitting says, None where nothing was
    solved. Raises UnsupportedModelError where a norm follows the experts, behind which no bias gives the mean.
    """
    experts = FusedExperts(block.experts_module)
    if experts.has_norm:
        raise UnsupportedModelError(
            f"layer {block.layer}: prune.experts: a norm follows its experts, so none can be replaced by a mean; use "
            "replace: nothing"
        )
    mean_EH, counts_E = mean_outputs(block, inputs)
    weights = experts.weights()
    stays_E = torch.ones(len(mean_EH), dtype=torch.bool, device=mean_EH.device)
    stays_E[list(removed)] = False
    before_EH = torch.zeros_like(weights.down[:, :, 0]) if weights.down_bias is None else weights.down_bias
    came = (d for n, d in inputs.stored.items() if n.startswith(block.path) and "down_proj" in n)
    dtype = next(came, before_EH.dtype) if weights.down_bias is None else before_EH.dtype
    bias_EH = torch.where(stays_E.unsqueeze(1), before_EH.to(mean_EH), mean_EH).to(dtype)
    kept_EI = stays_E.unsqueeze(1).expand(-1, weights.down.shape[2])
    told = None
    if ridge is not None and removed:
        told = _refit(block, kept_EI, bias_EH, inputs, ridge, [*removed, *protected])
    make_ragged(block, kept_EI, bias_EH)
    return [e for e in removed if counts_E[e] == 0], told


def _refit(
    block: MoEBlock, kept_EI: Tensor, bias_EH: Tensor, inputs: BlockInputs, ridge: float, frozen: Sequence[int]
) -> dict[str, Any]:
    """Solve for the block's output less what the means add to it, with the experts that they replace silent.

    The router goes on as it did, so this is the least-squares problem of narrower experts, some of no width at all.
    """
    experts, read = FusedExperts(block.experts_module), (inputs.hidden_TH, inputs.index_TK, inputs.weight_TK)
    target_TH = layer_output(experts, *read)
    gone_E = ~kept_EI[:, 0]
    mean_EH = torch.where(gone_E.unsqueeze(1), bias_EH, 0).float()
    # Indices beyond the last expert are no choices (see Dispatch.of): a column that is left out.
    count = len(mean_EH)
    share_TE = target_TH.new_zeros(len(target_TH), count + 1)
    share_TE.scatter_add_(1, inputs.index_TK.clamp_max(count), inputs.weight_TK.float())
    target_TH = target_TH - share_TE[:, :count] @ mean_EH
    silence(experts, kept_EI)
    down_bias = experts.weights().down_bias
    if down_bias is not None:
        down_bias[gone_E] = 0
    return LayerRefit(block, inputs, target_TH).after(block, None, ridge, frozen)


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
