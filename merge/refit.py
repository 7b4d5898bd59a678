"""Down projections solved again after a change, in closed form on the calibration tokens.

An expert's output is linear in its down projection, so the best one for what is asked of it is a least-squares problem
(MergeMoE, arXiv 2510.14436, section 4, solves it with a pseudoinverse, which few tokens make ill-conditioned; here a
ridge holds on to the weights that are there). Three problems are solved:

`refit_down`: each merged expert on its own, so that on its group's tokens it puts out what the members did. Rows count
by the square of their routing weight.

`refit_mean`: the same on tokens of the whole layer, for the members' weighted mean: MergeMoE's own problem.

`refit_layer`: all experts of a layer together, on the routing as it is after the change, so that the layer puts out
what it did. This also repairs what no group sees: tokens that the router now sends elsewhere, as after pruning. The
problem has E·I unknowns per output; it is solved by conjugate gradients, preconditioned by each expert's own second
moment, so nothing larger than [E, I, max(I, H)] is made (five of [E, I, H] and two of [E, I, I] at a time, float32).
Each of at most 50 steps costs as much as all rows through the down projections, there and back; where the weighted
neurons of all rows take more than 512 MB they are computed again in every step.

The ridge λ is relative: λ = ridge · (unknowns per output / rows) · mean of the Gram matrix's diagonal. The weights that
are there know more than few tokens do; that λ grows with unknowns per row keeps one setting right for little and much
text.

Letters: E experts, T tokens, K experts per token, R rows (token, expert), H hidden, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.dispatch import Dispatch, grouped_gram, grouped_linear
from moe_compress.model.experts import ExpertWeights
from moe_compress.model.offload import runnable
from moe_compress.model.rules import Choice

from .align import activations_on

_CHUNK_BYTES = 512 << 20
_TOKENS_AT_ONCE = 4096
_PROBED = 64
_ITERATIONS = 50
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class RefitError:
    """Squared error of what is put out, relative to the square of what should be, before and after refitting."""

    before: float
    after: float


def refit_down(
    experts: FusedExperts, merged: ExpertWeights, groups: Sequence[Sequence[int]], hidden_TH: Tensor,
    index_TK: Tensor, weight_TK: Tensor, ridge: float,
) -> RefitError:  # fmt: skip
    """Solve the down projections of merged experts, in place.

    min over W of Σ_r g_r²·‖f_r − b − W·a_r‖² + λ‖W − W₀‖², r over the rows of all members of a group, f_r what the
    member put out there (before the norm that some families have), a_r the merged expert's neurons, b its bias.

    Args:
        experts: before the merge.
        merged: group j's weights in slot j; `down` is changed where a group has more than one member.
        groups: members of each slot.
        hidden_TH, index_TK, weight_TK: what the experts read, and the routing before the merge.
        ridge: see the file's head.
    """
    own = experts.weights()
    slot_E = torch.full((experts.num_experts,), -1, device=own.down.device)
    for slot, members in enumerate(groups):
        if len(members) > 1:
            slot_E[torch.tensor(list(members), device=slot_E.device)] = slot
    changed = torch.tensor([s for s, g in enumerate(groups) if len(g) > 1], device=slot_E.device, dtype=torch.int64)
    number_S = torch.full((len(groups),), -1, device=slot_E.device)
    number_S[changed] = torch.arange(len(changed), device=slot_E.device)
    hidden, neurons = own.down.shape[1:]
    gram = torch.zeros(len(changed), neurons, neurons, dtype=torch.float64, device=own.down.device)
    cross = torch.zeros(len(changed), neurons, hidden, dtype=torch.float64, device=own.down.device)
    rows = torch.zeros(len(changed), dtype=torch.float64, device=own.down.device)
    error, size = 0.0, 0.0
    dispatch = Dispatch.of(index_TK, weight_TK, experts.num_experts)
    sizes = [
        4 * (neurons**2 + 4 * neurons * hidden + rows * (4 * hidden + 8 * neurons)) if s >= 0 else 0
        for rows, s in zip(dispatch.counts_E.tolist(), slot_E.tolist(), strict=True)
    ]
    for chunk in chunks(sizes, _CHUNK_BYTES):
        slot_C = slot_E[chunk.start : chunk.stop]
        if not bool((slot_C >= 0).any()):
            continue
        _, part = dispatch.part(chunk)
        input_RH = hidden_TH[part.token_R]
        was, now = own.part(chunk), merged.map(lambda w, s=slot_C: w[s.clamp_min(0).to(w.device)])  # type: ignore[misc]
        gate_R = part.weight_R.float().unsqueeze(-1)
        gate_R = gate_R * (slot_C >= 0)[part.expert_R].unsqueeze(-1)
        wanted = _down(experts.with_weights(was, input_RH, part)[0], was, part).float()
        activation = experts.with_weights(now, input_RH, part)[0]
        left = gate_R * (wanted - _down(activation, now, part).float())
        feature = gate_R * activation.float()
        at = number_S[slot_C[slot_C >= 0]]
        rows.index_add_(0, at, part.counts_E[slot_C >= 0].double())
        gram.index_add_(0, at, grouped_gram(feature, feature, part.offsets_E)[slot_C >= 0].double())
        cross.index_add_(0, at, grouped_gram(feature, left, part.offsets_E)[slot_C >= 0].double())
        error += float(left.double().square().sum())
        size += float((gate_R * wanted).double().square().sum())
    gained = 0.0
    for part in changed.split(max(1, _CHUNK_BYTES // (24 * neurons * (neurons + hidden)))):
        at = number_S[part]
        step = _ridge_solve(gram[at], cross[at], ridge * neurons / rows[at].clamp_min(1))
        merged.down[part.to(merged.down.device)] += step.transpose(1, 2).to(merged.down)
        gained += float(2 * (step * cross[at]).sum() - (step * (gram[at] @ step)).sum())
    return RefitError(error / max(size, 1e-30), (error - gained) / max(size, 1e-30))


def refit_mean(
    experts: FusedExperts, merged: ExpertWeights, groups: Sequence[Sequence[int]], weights: Sequence[Tensor],
    hidden_SH: Tensor, ridge: float,
) -> RefitError:  # fmt: skip
    """Solve the down projections of merged experts, in place, as MergeMoE does (arXiv 2510.14436, section 4).

    min over W of Σ_s ‖Σ_i w_i f_i(x_s) − b − W·a(x_s)‖² + λ‖W − W₀‖², w the members' shares, over the same tokens for
    all members, whoever they are routed to. With the members' down projections side by side, W' = [w_1 W_1 … w_n W_n],
    their neurons Q one above the other and the merged expert's P, the paper's W'·T1 with T1 = Q P⁺ is this solution
    without ridge. `refit_down` asks every member for its own outputs on its own tokens; where all members see the same
    tokens with the same weights, both are the same.

    Args:
        experts: before the merge.
        merged: group j's weights in slot j; `down` is changed where a group has more than one member.
        groups, weights: members of each slot, and their weights.
        hidden_SH: tokens.
        ridge: see the file's head; rows are tokens.
    """
    own = experts.weights()
    tokens, neurons = len(hidden_SH), own.up.shape[1]
    error, gained, size = 0.0, 0.0, 0.0
    changed = [s for s, g in enumerate(groups) if len(g) > 1]
    numbers = [len(groups[s]) + 1 for s in changed]
    row = 2 * experts.hidden_size + 4 * neurons
    for part in chunks([4 * n * tokens * row + 24 * neurons**2 for n in numbers], _CHUNK_BYTES):
        slots = changed[part.start : part.stop]
        members = torch.tensor([e for s in slots for e in groups[s]], device=own.down.device)
        place = torch.tensor([p for p, s in enumerate(slots) for _ in groups[s]], device=own.down.device)
        share = torch.cat([weights[s] / weights[s].sum() for s in slots]).to(own.down.device)
        _, output = _on_all(experts, own.map(lambda w, m=members: w[m.to(w.device)]), hidden_SH)  # type: ignore[misc]
        wanted = output.new_zeros(len(slots), *output.shape[1:])
        wanted.index_add_(0, place, output * share.to(output)[:, None, None])
        at = torch.tensor(slots, device=own.down.device)
        now = merged.map(lambda w, s=at: w[s.to(w.device)])  # type: ignore[misc]
        activation, output = _on_all(experts, now, hidden_SH)
        left, feature = (wanted - output).double(), activation.double()
        gram, cross = feature.transpose(1, 2) @ feature, feature.transpose(1, 2) @ left
        step = _ridge_solve(gram, cross, torch.full((len(slots),), ridge * neurons / tokens).to(gram))
        merged.down[at.to(merged.down.device)] += step.transpose(1, 2).to(merged.down)
        error, size = error + float(left.square().sum()), size + float(wanted.double().square().sum())
        gained += float(2 * (step * cross).sum() - (step * (gram @ step)).sum())
    return RefitError(error / max(size, 1e-30), (error - gained) / max(size, 1e-30))


def refit_layer(
    experts: FusedExperts, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, target_TH: Tensor,
    ridge: float, frozen: Sequence[int] = (),
) -> RefitError:  # fmt: skip
    """Solve all down projections of a layer together, in place.

    min over all W_e of Σ_t ‖y_t − Σ_e g_te·(W_e·a_te + b_e)‖² + λ Σ_e ‖W_e − W_e0‖².

    Args:
        experts: after the change; no norm behind them.
        hidden_TH, index_TK, weight_TK: what they read, and their routing.
        target_TH: y, what they should put out together.
        ridge: see the file's head; rows are tokens.
        frozen: experts whose weights stay.
    """
    if experts.has_norm:
        raise ValueError("a norm follows the experts: their outputs are not linear in the down projections")
    problem = _Layer(experts, hidden_TH, index_TK, weight_TK)
    left_TH = target_TH.float() - problem.output()
    right = problem.correlated(left_TH)
    moments = problem.moments()
    diagonal = moments.diagonal(dim1=1, dim2=2)
    scale = ridge * diagonal.numel() / len(hidden_TH) * float(diagonal.mean())
    size = float(target_TH.double().square().sum())
    before = float(left_TH.double().square().sum()) / max(size, 1e-30)
    if scale <= 0:
        return RefitError(before, before)
    free = torch.ones(len(moments), 1, 1, device=moments.device)
    free[list(frozen)] = 0
    diagonal.add_(scale)
    inverse = _inverses(moments)
    del moments
    step = torch.zeros_like(right)
    residual = right * free
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
    left_TH = left_TH - problem.put_out(step)
    down = experts.weights().down
    down += step.transpose(1, 2).to(down)
    return RefitError(before, float(left_TH.double().square().sum()) / max(size, 1e-30))


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
        block: before the change; no norm behind its experts.
        inputs: what it reads.
        target_TH: what the experts are to put out together; None: what they do now.
    """

    def __init__(self, block: MoEBlock, inputs: BlockInputs, target_TH: Tensor | None = None):
        read = (inputs.hidden_TH, inputs.index_TK, inputs.weight_TK)
        self._hidden_TH = inputs.hidden_TH
        counted = inputs.token_weight_T
        self._root_T1 = None if counted is None else counted.float().sqrt().unsqueeze(-1)
        self._target_TH = layer_output(FusedExperts(block.experts_module), *read) if target_TH is None else target_TH
        self._routing = NewRouting(block, *read)

    @property
    def known(self) -> bool:
        """Whether the routing after the change is the router's own (see NewRouting)."""
        return self._routing.known

    def after(self, block: MoEBlock, slots: Sequence[int], ridge: float, frozen: Sequence[int] = ()) -> dict[str, Any]:
        """Solve the changed block's down projections, in place. Returns what to report.

        Args:
            block: changed.
            slots: where each former expert is now, −1 if it is gone.
            ridge: see the file's head.
            frozen: slots whose weights stay.
        """
        index_TK, weight_TK = self._routing.after(block, slots)
        target_TH = self._target_TH
        if self._root_T1 is not None:  # on both sides of the least squares
            weight_TK, target_TH = weight_TK * self._root_T1, target_TH * self._root_T1
        experts = FusedExperts(block.experts_module)
        error = refit_layer(experts, self._hidden_TH, index_TK, weight_TK, target_TH, ridge, frozen)
        return {**asdict(error), "routing": self._routing.told(block)}


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
        self._before = (hidden_TH, index_TK, weight_TK)
        self._rules = len(block.rules)
        self.known = not block.rules and self._asked(block)  # what was recorded is what rules made of its choices

    def after(self, block: MoEBlock, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Index and weight [T, K] of the changed block, with the slots that its experts went to."""
        hidden, index, weight = self._before
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
        hidden, index, weight = (t[:_PROBED] for t in self._before)
        try:
            with runnable(block.module):
                routed = block.route(hidden)
        except Exception:  # a family's own code, handed what it may not expect: whatever it raises says no
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
        fits = 4 * rows * experts.intermediate_size <= _CHUNK_BYTES
        self.kept = list(self._features()) if fits else None

    def output(self) -> Tensor:
        return layer_output(self.experts, self.hidden_TH, *self.routing)

    def moments(self) -> Tensor:
        """Φ_eᵀ Φ_e of every expert, [E, I, I]."""
        return torch.cat([grouped_gram(f, f, part.offsets_E) for part, f, _ in self._all()])

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
    for chunk in chunks([4 * rows * row for rows in dispatch.counts_E.tolist()], _CHUNK_BYTES):
        yield dispatch.part(chunk)[1], weights.part(chunk)


def _on_all(experts: FusedExperts, weights: ExpertWeights, hidden_SH: Tensor) -> tuple[Tensor, Tensor]:
    """Every given expert on every token: neurons [C, S, I] and outputs before a norm [C, S, H], float32."""
    activation = activations_on(experts, weights, hidden_SH).float()
    output = activation @ weights.down.float().transpose(1, 2)
    return activation, output if weights.down_bias is None else output + weights.down_bias.float().unsqueeze(1)


def _down(activation_RI: Tensor, weights: ExpertWeights, part: Dispatch) -> Tensor:
    output = grouped_linear(activation_RI, weights.down, part.offsets_E)
    return output if weights.down_bias is None else output + weights.down_bias[part.expert_R]


def _ridge_solve(gram_GII: Tensor, cross_GIH: Tensor, ridge_G: Tensor) -> Tensor:
    """(G + λ)⁻¹ C with λ = ridge · mean of G's diagonal; zero where no token says anything."""
    scale = (ridge_G * gram_GII.diagonal(dim1=1, dim2=2).mean(dim=1))[:, None, None]
    eye = torch.eye(gram_GII.shape[1], dtype=gram_GII.dtype, device=gram_GII.device)
    solved: Tensor = torch.linalg.solve(gram_GII + torch.where(scale > 0, scale, 1) * eye, cross_GIH)
    return solved


def _inverses(moments_EII: Tensor) -> Tensor:
    """Inverses of positive definite matrices, made in float64 a chunk at a time, kept in float32, symmetric."""
    count = max(1, _CHUNK_BYTES // (24 * moments_EII[0].numel()))
    parts = []
    for part in moments_EII.split(count):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(part.double()))
        parts.append(((inverse + inverse.transpose(1, 2)) / 2).float())
    return torch.cat(parts)
