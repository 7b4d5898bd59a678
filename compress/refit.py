"""A layer's down projections solved again after a change, in closed form on the calibration tokens.

An expert's output is linear in its down projection, so the best one for what is asked of it is a least-squares problem.
Here all experts of a layer are solved together, on the routing as it is after the change, so that the layer puts out
what it did. This also repairs what no single expert sees: tokens that the router now sends elsewhere, as after pruning.
(What each merged expert is asked alone is in merge/refit.py.)

The problem has E·I unknowns per output; it is solved by conjugate gradients, preconditioned by each expert's own second
moment, so nothing larger than [E, I, max(I, H)] is made (five of [E, I, H] and two of [E, I, I] at a time, float32).
Each of at most 50 steps costs as much as all rows through the down projections, there and back; where the weighted
neurons of all rows take more than 1 GB they are computed again in every step.

Squares count a token by what the layer puts out for it, and in many models a few tokens have outputs a hundred times as
large. Where the experts that make those are gone, all others would be bent towards them. So a token's error is also
looked at evened, with the weight m / (‖y_t‖² + m), m the median of ‖y_t‖²: where solving raises that sum, tokens are
solved for with these weights instead, under which it can't rise.

The ridge λ is relative: λ = ridge · (unknowns per output / rows) · mean of the Gram matrix's diagonal. The weights that
are there know more than few tokens do; that λ grows with unknowns per row keeps one setting right for little and much
text.

Letters: E experts, T tokens, K experts per token, R rows (token, expert), H hidden, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.dispatch import Dispatch, grouped_gram, grouped_linear, grouped_squares
from moe_compress.model.experts import ExpertWeights
from moe_compress.model.offload import runnable
from moe_compress.model.rules import Choice

# The option of that name of every pass that refits.
Ridge = Annotated[
    float,
    Field(
        gt=0,
        description="How strongly refitting holds on to the weights that are there; the fewer tokens, the stronger",
    ),
]

_CHUNK_BYTES = 512 << 20
_KEPT_BYTES = 1 << 30
_TOKENS_AT_ONCE = 4096
_PROBED = 64
_ITERATIONS = 50
# Of the residual, relative. On the demo checkpoint that takes 5 steps; 1e-3 takes 9 and loses the same on held-out
# text, to four digits (REAP, 25 and 50 %: 0.0333 and 0.1281); 1e-1 takes 2 and loses 5 % more.
_TOLERANCE = 1e-2
# What a router raises that is handed less than it reads, or what it can't read.
_NOT_ASKED = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, UnsupportedModelError)


@dataclass(frozen=True)
class RefitError:
    """Squared error of what is put out, relative to the square of what should be, before and after refitting."""

    before: float
    after: float


@dataclass(frozen=True)
class LayerError(RefitError):
    """The same of a layer; `before` and `after` are of tokens as they are.

    Attributes:
        evened_before, evened_after: with tokens evened (see the file's head).
        tokens: how they counted in what was solved: "as they are" or "evened".
    """

    evened_before: float
    evened_after: float
    tokens: str


def refit_layer(
    experts: FusedExperts, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, target_TH: Tensor,
    ridge: float, frozen: Sequence[int] = (), count_T: Tensor | None = None,
) -> LayerError:  # fmt: skip
    """Solve all down projections of a layer together, in place.

    min over all W_e of Σ_t c_t ‖y_t − Σ_e g_te·(W_e·a_te + b_e)‖² + λ Σ_e ‖W_e − W_e0‖².

    Args:
        experts: after the change; no norm behind them.
        hidden_TH, index_TK, weight_TK: what they read, and their routing.
        target_TH: y, what they should put out together.
        ridge: see the file's head; rows are tokens.
        frozen: experts whose weights stay.
        count_T: c, how much each token counts; None: all the same. Where that bends the layer, c is evened.
    """
    if experts.has_norm:
        raise ValueError("a norm follows the experts: their outputs are not linear in the down projections")
    root_T1 = torch.ones(len(hidden_TH), 1) if count_T is None else count_T.float().sqrt().unsqueeze(-1)
    root_T1 = root_T1.to(hidden_TH.device)
    target_TH = root_T1 * target_TH.float()
    size_T = target_TH.double().square().sum(dim=1)
    even_T = _evening(size_T)
    size, even_size = max(float(size_T.sum()), 1e-30), max(float(even_T @ size_T), 1e-30)

    def errors(left_TH: Tensor) -> tuple[float, float]:
        """Relative squared error with tokens as they are, and evened."""
        left_T = left_TH.double().square().sum(dim=1)
        return float(left_T.sum()) / size, float(even_T @ left_T) / even_size

    before_TH = target_TH - root_T1 * layer_output(experts, hidden_TH, index_TK, weight_TK)
    step, after_TH = _solved(_Layer(experts, hidden_TH, index_TK, weight_TK * root_T1), before_TH, ridge, frozen)
    before, after, tokens = errors(before_TH), errors(after_TH), "as they are"
    if after[1] > before[1]:
        del step
        even_T1 = even_T.float().sqrt().unsqueeze(-1)
        evened = _Layer(experts, hidden_TH, index_TK, weight_TK * root_T1 * even_T1)
        step, after_TH = _solved(evened, even_T1 * before_TH, ridge, frozen)
        after, tokens = errors(after_TH / even_T1), "evened"
    down = experts.weights().down
    down += step.transpose(1, 2).to(down)
    return LayerError(before[0], after[0], before[1], after[1], tokens)


def _evening(size_T: Tensor) -> Tensor:
    """What evens tokens whose outputs have these squares, in (0, 1]: half at the median, less above it."""
    some_T = size_T[size_T > 0]
    return some_T.median() / (size_T + some_T.median()) if len(some_T) else torch.ones_like(size_T)


def _solved(problem: _Layer, left_TH: Tensor, ridge: float, frozen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Conjugate gradients.

    Args:
        problem: Φ.
        left_TH: what Φ D should be.
        ridge: see the file's head.
        frozen: experts whose weights stay.

    Returns D, the steps of the down projections [E, I, H], and what is left, left_TH − Φ D.
    """
    residual = problem.correlated(left_TH)
    step = torch.zeros_like(residual)
    moments = problem.moments()
    diagonal = moments.diagonal(dim1=1, dim2=2)
    scale = ridge * diagonal.numel() / len(left_TH) * float(diagonal.mean())
    if scale <= 0:
        return step, left_TH
    free = torch.ones(len(moments), 1, 1, device=moments.device)
    free[list(frozen)] = 0
    diagonal.add_(scale)
    inverse = _inverses(moments)
    del moments
    residual *= free
    goal = torch.linalg.vector_norm(residual) * _TOLERANCE
    search = free * (inverse @ residual)
    product = (residual * search).sum(dim=(0, 1))
    for _ in range(_ITERATIONS):
        if float(torch.linalg.vector_norm(residual)) <= float(goal):
            break
        applied = free * (problem.correlated(problem.put_out(search)) + scale * search)
        length = product / (search * applied).sum(dim=(0, 1)).clamp_min(1e-30)  # every output is a problem of its own
        step += length * search
        residual -= length * applied
        turned = free * (inverse @ residual)
        following = (residual * turned).sum(dim=(0, 1))
        search = turned + following / product.clamp_min(1e-30) * search
        product = following
    return step, left_TH - problem.put_out(step)


def layer_output(experts: FusedExperts, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What a layer's experts put out together, [T, H] float32, a chunk of experts at a time."""
    total = torch.zeros(len(hidden_TH), experts.hidden_size, device=hidden_TH.device)
    for part, own in _parts(experts, index_TK, weight_TK):
        output = experts.with_weights(own, hidden_TH[part.token_R], part)[1]
        total.index_add_(0, part.token_R, output.float() * part.weight_R.float().unsqueeze(-1))
    return total


class LayerRefit:
    """`refit_layer` around a change of a block: made before it, `after` solves for what the layer put out then.

    Tokens count as much as they weigh. Memory: the outputs [T, H], float32.

    Args:
        block: before the change.
        inputs: what it reads.
        target_TH: what the experts are to put out together; None: what they do now.

    Attributes:
        skipped: why nothing can be solved for; None where it can.
    """

    def __init__(self, block: MoEBlock, inputs: BlockInputs, target_TH: Tensor | None = None):
        self.skipped: str | None = None
        if FusedExperts(block.experts_module).has_norm:
            self.skipped = "experts end in a norm: their outputs are not linear in the down projections"
            return
        read = (inputs.hidden_TH, inputs.index_TK, inputs.weight_TK)
        self._hidden_TH = inputs.hidden_TH
        self._count_T = inputs.token_weight_T
        self._target_TH = layer_output(FusedExperts(block.experts_module), *read) if target_TH is None else target_TH
        self._routing = NewRouting(block, *read)

    def needs_router(self) -> None:
        """Skip where the routing after the change wouldn't be the router's own (see NewRouting)."""
        if self.skipped is None and not self._routing.known:
            self.skipped = "the router reads more than the experts do: whom it chooses instead isn't known here"

    def after(
        self, block: MoEBlock, slots: Sequence[int] | None, ridge: float, frozen: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Solve the changed block's down projections, in place. Returns what to report.

        Args:
            block: changed.
            slots: where each former expert is now, −1 if it is gone; None where every expert is where it was, and the
                router as it was.
            ridge: see the file's head.
            frozen: slots whose weights stay.
        """
        if self.skipped is not None:
            return {"skipped": self.skipped}
        index_TK, weight_TK = self._routing.before if slots is None else self._routing.after(block, slots)
        experts = FusedExperts(block.experts_module)
        read = (self._hidden_TH, index_TK, weight_TK)
        error = refit_layer(experts, *read, self._target_TH, ridge, frozen, self._count_T)
        return {**asdict(error), "routing": "unchanged" if slots is None else self._routing.told(block)}


class NewRouting:
    """What the router will decide after a change of the block, on the tokens that it read before.

    Only where the router can be asked: it must give the recorded routing back when it reads what the experts read. Some
    routers read other things too (token ids, earlier layers' states, the hidden state before a projection). There every
    token's choices are taken to go where their experts went, and those of experts that are gone to none. Where the
    change put a rule behind the router (`MoEBlock.remap`), what it chose is as recorded, and goes through the rule.

    Args:
        block: before the change.
        hidden_TH, index_TK, weight_TK: what its experts read, and the routing.
    """

    def __init__(self, block: MoEBlock, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor):
        self._hidden_TH, self.before = hidden_TH, (index_TK, weight_TK)
        self._rules = len(block.rules)
        self.known = not block.rules and self._asked(block)  # what was recorded is what rules made of its choices

    def after(self, block: MoEBlock, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Index and weight [T, K] of the changed block, with the slots that its experts went to."""
        hidden, (index, weight) = self._hidden_TH, self.before
        if added := block.rules[self._rules :]:
            for rule in added:
                index, weight = rule(Choice(hidden, index, weight, block.num_experts))
            return index, weight
        if not self.known:
            table = torch.tensor([*slots, -1], device=index.device)  # behind the experts: choices of none
            slot = table[index.clamp_max(len(slots))]
            return slot.clamp_min(0), torch.where(slot >= 0, weight, 0)
        with runnable(block.module):
            routed = [block.route(part) for part in hidden.split(_TOKENS_AT_ONCE)]
        return torch.cat([r.index_TK for r in routed]), torch.cat([r.weight_TK for r in routed])

    def told(self, block: MoEBlock) -> str:
        """How `after` knows, for the report."""
        if len(block.rules) > self._rules:
            return "unchanged"
        return "asked" if self.known else "former choices"

    def _asked(self, block: MoEBlock) -> bool:
        hidden, index, weight = (t[:_PROBED] for t in (self._hidden_TH, *self.before))
        try:
            with runnable(block.module):
                routed = block.route(hidden)
        except torch.OutOfMemoryError:
            raise
        except _NOT_ASKED:
            return False
        if routed.index_TK.shape != index.shape:
            return False
        same = routed.index_TK == index
        close = torch.isclose(routed.weight_TK.to(weight), weight, rtol=0.02, atol=1e-3)
        return bool(same.float().mean() > 0.98) and bool(close[same].all())


class _Layer:
    """Products with the matrix Φ of the layer's problem, whose rows are tokens and columns (expert, neuron)."""

    def __init__(self, experts: FusedExperts, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor):
        self.experts, self.hidden_TH = experts, hidden_TH
        self.routing = (index_TK, weight_TK)
        rows = int((weight_TK != 0).sum())
        fits = 4 * rows * experts.intermediate_size <= _KEPT_BYTES
        self.kept = list(self._features()) if fits else None

    def moments(self) -> Tensor:
        """Φ_eᵀ Φ_e of every expert, [E, I, I]."""
        return torch.cat([grouped_squares(f, part.offsets_E) for part, f, _ in self._all()])

    def correlated(self, value_TH: Tensor) -> Tensor:
        """Φᵀ v: [E, I, H]."""
        return torch.cat([grouped_gram(f, value_TH[part.token_R], part.offsets_E) for part, f, _ in self._all()])

    def put_out(self, step_EIH: Tensor) -> Tensor:
        """Φ D: [T, H]."""
        total = torch.zeros(len(self.hidden_TH), step_EIH.shape[2], device=step_EIH.device)
        for part, feature, chunk in self._all():
            own = step_EIH[chunk.start : chunk.stop].transpose(1, 2)
            total.index_add_(0, part.token_R, grouped_linear(feature, own, part.offsets_E))
        return total

    def _all(self) -> Iterator[tuple[Dispatch, Tensor, range]]:
        return iter(self.kept) if self.kept is not None else self._features()

    def _features(self) -> Iterator[tuple[Dispatch, Tensor, range]]:
        """Experts a chunk at a time: their rows, weighted neurons [R, I], and which experts."""
        start = 0
        for part, own in _parts(self.experts, *self.routing):
            activation = self.experts.with_weights(own, self.hidden_TH[part.token_R], part)[0]
            count = own.up.shape[0]
            yield part, activation.float() * part.weight_R.float().unsqueeze(-1), range(start, start + count)
            start += count


def _parts(experts: FusedExperts, index_TK: Tensor, weight_TK: Tensor) -> Iterator[tuple[Dispatch, ExpertWeights]]:
    """Experts a chunk at a time: their rows and weights."""
    weights = experts.weights()
    dispatch = Dispatch.of(index_TK, weight_TK, experts.num_experts)
    row = 3 * experts.hidden_size + 4 * weights.up.shape[1]
    for chunk in chunks([4 * rows * row for rows in dispatch.counts], _CHUNK_BYTES):
        yield dispatch.part(chunk)[1], weights.part(chunk)


def _inverses(moments_EII: Tensor) -> Tensor:
    """Inverses of positive definite matrices, made in float64 a chunk at a time, kept in float32, symmetric."""
    count = max(1, _CHUNK_BYTES // (24 * moments_EII[0].numel()))
    parts = []
    for part in moments_EII.split(count):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(part.double()))
        parts.append(((inverse + inverse.transpose(1, 2)) / 2).float())
    return torch.cat(parts)
