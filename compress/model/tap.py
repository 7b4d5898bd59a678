"""Seeing what passes through a block while the model runs.

A `Tap` is one batch on its way through one block. What the experts compute is computed once, by the implementation
registered here, and everybody who looks gets the same tensors: no softmax, gate or selection is recomputed anywhere.

Letters: T tokens of the batch, K experts per token, E experts, R = rows that reach an expert, sorted by expert.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.errors import UnsupportedModelError

from . import hf
from .attention import attention_of
from .block import MoEBlock
from .dispatch import Dispatch
from .experts import Experts, FusedExperts, run_experts
from .router import read_routing
from .rules import Remap


@dataclass
class Tap:
    """One batch through one block.

    Attributes:
        layer: decoder layer.
        experts: view of the experts that ran.
        hidden_TH: input of the experts.
        index_TK, weight_TK: routing as the model used it.
        output_TH: output of the experts module (shared experts and scaling by the block not included); no rows where
            the experts didn't run.
        logits_TE: what the router returned as its logits; None where the router returns none.
        sequence_T: number of the calibration sequence that each token belongs to.
        layer_output: what the decoder layer returned; taps are handed on when it has run. None where the experts
            didn't.
        router_arguments: what the router was called with, by the names of its parameters.
        modality_T: what each token is of: 0 text, 1 image, 2 video, 3 audio; None where all are text.
        token_weight_T: what each token counts in sums over tokens, not negative; None where all count 1.
        classes: the expert that each of the router's classes means (−1: none) where a rule says so (rules.Remap); None
            where class e means expert e.
        received_T: attention that each token received (attention.py); None where the layer isn't watched for it.
    """

    layer: int
    experts: Experts
    hidden_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    output_TH: Tensor
    logits_TE: Tensor | None = None
    sequence_T: Tensor | None = None
    layer_output: Any = None
    router_arguments: dict[str, Any] = field(default_factory=dict)
    modality_T: Tensor | None = None
    token_weight_T: Tensor | None = None
    classes: Sequence[int] | None = None
    received_T: Tensor | None = None
    _parts: tuple[Dispatch, Tensor, Tensor] | None = None

    @functools.cached_property
    def parts(self) -> tuple[Dispatch, Tensor, Tensor]:
        """Dispatch, neuron activations [R, I], expert outputs [R, H]; recomputed only where the experts kept none."""
        if self._parts is not None:
            return self._parts
        return run_experts(self.experts, self.hidden_TH, self.index_TK, self.weight_TK)[1:]

    @functools.cached_property
    def inverse_residual_T(self) -> Tensor | None:
        """1 / ‖h_t‖² of each hidden state behind the decoder layer, all residual streams together, float64 on the CPU.

        Times a squared error, it says what the error is beside what it is added to. A hidden state of zero (none is
        known) would make that infinite: it then counts 0. None where the layer returns nothing of one row per token.
        """
        norms = residual_norms(self.layer_output, len(self.hidden_TH))
        return None if norms is None else norms.double().cpu().reciprocal().nan_to_num(posinf=0.0)

    @property
    def behind_TH(self) -> Tensor | None:
        """Hidden state behind the decoder layer; None where that isn't one vector per token."""
        hidden = hidden_behind(self.layer_output, len(self.hidden_TH))
        return hidden if hidden is not None and hidden.dim() == 2 else None

    @property
    def dispatch(self) -> Dispatch:
        """Rows sorted by expert."""
        return self.parts[0]

    @property
    def activation_RI(self) -> Tensor:
        """Neuron activations: inputs of the down projections."""
        return self.parts[1]

    @property
    def output_RH(self) -> Tensor:
        """Expert outputs before the routing weight."""
        return self.parts[2]

    @property
    def input_RH(self) -> Tensor:
        """Expert inputs, one row per (token, expert)."""
        return self.hidden_TH[self.dispatch.token_R]

    @property
    def counted_T(self) -> Tensor:
        """What each token counts in sums over tokens, float64: `token_weight_T`, or ones."""
        weight = self.token_weight_T
        if weight is not None:
            return weight.double()
        return torch.ones(len(self.hidden_TH), dtype=torch.float64, device=self.hidden_TH.device)


@dataclass
class GradientTap(Tap):
    """One batch through one block in a backward sweep: what a Tap has, and the gradient of the loss.

    The loss is a mean over the predicted tokens of the whole sweep; gradients are this batch's part. Nothing here holds
    on to the graph.

    Attributes:
        gradient_TH: at `output_TH`, what the experts module returned. Whatever the block and the layer do with that
            output (scale it, norm it, project it, mix it into residual streams) is part of the gradient. In a layer
            that just adds it to the hidden state this is the gradient at the layer's output as well.
        weight_gradient_TK: at the routing weights; 0 in slots that no expert serves.
        layer_gradient: at `layer_output`, in its structure.
        parameters: at the parameters that were asked for, by their names relative to the layer, in their dtype.
    """

    gradient_TH: Tensor = field(default_factory=lambda: torch.empty(0))
    weight_gradient_TK: Tensor = field(default_factory=lambda: torch.empty(0))
    layer_gradient: Any = None
    parameters: dict[str, Tensor] = field(default_factory=dict)

    @property
    def behind_gradient_TH(self) -> Tensor | None:
        """At `behind_TH`; None where that is None."""
        hidden = hidden_behind(self.layer_gradient, len(self.hidden_TH))
        return hidden if hidden is not None and hidden.dim() == 2 else None

    @property
    def expert_gradient_RH(self) -> Tensor:
        """Gradient at each row's expert output (before the routing weight, behind the expert's norm if it has one)."""
        dispatch = self.dispatch
        return self.gradient_TH[dispatch.token_R] * dispatch.weight_R.unsqueeze(-1).to(self.gradient_TH.dtype)


Observer = Callable[[Tap], None]


def hidden_behind(output: Any, tokens: int) -> Tensor | None:
    """What a decoder layer returned, hidden states or a tuple with them in front, as [T, …]; None if it's neither."""
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor) or hidden.dim() < 3 or hidden.shape[0] * hidden.shape[1] != tokens:
        return None
    return hidden.reshape(tokens, *hidden.shape[2:])


def residual_norms(output: Any, tokens: int) -> Tensor | None:
    """Squared norm per token, [T], of what a decoder layer returned: hidden states, or a tuple with them in front."""
    hidden = hidden_behind(output, tokens)
    return None if hidden is None else hidden.reshape(tokens, -1).float().square().sum(dim=-1)


# Experts module → who looks at it now, and whether it runs. Only ever filled inside `observe`.
_WATCHED: dict[int, tuple[Callable[..., None], bool]] = {}


def _forward(module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The registered experts implementation: any fused experts class, from its declared layout."""
    experts = FusedExperts(module)
    watcher, runs = _WATCHED.get(id(module), (None, True))
    if watcher is not None and not runs:
        watcher(experts, hidden_TH, index_TK, weight_TK, hidden_TH[:0], None)
        return torch.zeros_like(hidden_TH)
    output, *parts = run_experts(experts, hidden_TH, index_TK, weight_TK)
    if watcher is not None:
        watcher(experts, hidden_TH, index_TK, weight_TK, output, tuple(parts))
    return output


hf.register_implementation(_forward)


@contextmanager
def observe(
    block: MoEBlock,
    observer: Observer,
    sequence_T: Tensor | None = None,
    modality_T: Tensor | None = None,
    token_weight_T: Tensor | None = None,
    *,
    inputs_only: bool = False,
) -> Iterator[None]:
    """Within the context, every forward of the block's experts hands a `Tap` to `observer`.

    The model must run under `hf.implementation`. `sequence_T`, `modality_T` and `token_weight_T` are passed on into the
    taps. With `inputs_only` fused experts don't run: they put out zeros. Raises UnsupportedModelError, in the forward,
    where experts see other tokens than those that have weights.
    """
    module = block.experts_module
    returned: list[Any] = [None, {}]  # by the router, and what it was called with

    def routed(router: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        returned[:] = output, inspect.signature(router.forward).bind(*arguments, **keywords).arguments

    def watch(experts: Experts, hidden: Tensor, index: Tensor, weight: Tensor, output: Tensor, parts: Any) -> None:
        routing = read_routing(returned[0], len(hidden))
        scores = routing.logits_TE if routing is not None else returned[0]
        logits = scores.reshape(len(hidden), -1) if isinstance(scores, Tensor) else None
        sequence, modality, counted = (
            label if label is not None and len(label) == len(hidden) else None
            for label in (sequence_T, modality_T, token_weight_T)
        )
        if counted is None and token_weight_T is not None:
            raise UnsupportedModelError(
                f"layer {block.layer}: its experts see {len(hidden)} tokens of {len(token_weight_T)} that were read: "
                "this family can't weigh tokens by modality"
            )
        with torch.no_grad():
            tap = Tap(block.layer, experts, hidden, index, weight, output, logits, sequence, _parts=parts)
            tap.modality_T, tap.token_weight_T = modality, counted
            tap.classes = next((rule.experts for rule in block.rules if isinstance(rule, Remap)), None)
            if (attention := attention_of(block.module)) is not None:
                tap.received_T = attention.read(len(hidden))
            tap.router_arguments = dict(returned[1])
            observer(tap)

    def ran(packed: nn.Module, arguments: Any, output: Tensor) -> None:
        hidden, index, weight = arguments[:3]
        watch(packed, hidden, index, weight, output, None)  # type: ignore[arg-type]

    handles = [block.router.register_forward_hook(routed, with_kwargs=True)]
    if hf.is_fused_experts(module):
        _WATCHED[id(module)] = watch, not inputs_only
    else:
        handles.append(module.register_forward_hook(ran))
    try:
        yield
    finally:
        _WATCHED.pop(id(module), None)
        for handle in handles:
            handle.remove()
