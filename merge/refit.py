"""Down projections of merged experts solved again, each on its own, in closed form on the calibration tokens.

An expert's output is linear in its down projection, so the best one for what is asked of it is a least-squares problem
(MergeMoE, arXiv 2510.14436, section 4, solves it with a pseudoinverse, which few tokens make ill-conditioned; here a
ridge holds on to the weights that are there, relative as in compress/refit.py, which solves all of a layer together).

`refit_down`: on its group's tokens each merged expert puts out what the members did. Rows count by the square of their
routing weight.

`refit_mean`: the same on tokens of the whole layer, for the members' weighted mean: MergeMoE's own problem.

Letters: E experts, T tokens, K experts per token, R rows (token, expert), S sample tokens, H hidden, I neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.calib.inputs import chunks
from moe_compress.model import FusedExperts
from moe_compress.model.dispatch import Dispatch, grouped_gram, grouped_linear, grouped_squares
from moe_compress.model.experts import ExpertWeights
from moe_compress.refit import RefitError

from .align import activations_on

_CHUNK_BYTES = 512 << 20


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
        ridge: see compress/refit.py.
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
        for rows, s in zip(dispatch.counts, slot_E.tolist(), strict=True)
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
        gram.index_add_(0, at, grouped_squares(feature, part.offsets_E)[slot_C >= 0].double())
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
        ridge: see compress/refit.py; rows are tokens.
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
