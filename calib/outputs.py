"""What a layer's experts put out on the tokens routed to them: inner products, moments, what they turn.

Like calib/statistics.py: accumulators over taps. Letters: E experts, T tokens, K experts per token, R rows (token,
expert), H hidden. Each token counts as much as it weighs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEBlock, Tap

from .statistics import Accumulator, Result, Statistic, counted_rows

# What the rows that are worked on at a time may take.
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class OutputGram(Statistic):
    """Inner products of what experts add to the tokens that they serve together.

    Result: `gram` [E, E] float64, M_ij = Σ_t ⟨g_ti·f_i(x_t), g_tj·f_j(x_t)⟩ over tokens that both serve. For any
    set of experts, the sum of its rows and columns is Σ_t ‖Σ_{e in the set} g_te·f_e(x_t)‖²: the squared error of the
    block's output when the set is dropped and no token is routed anew. `relative` [E, E]: the same with every token's
    term divided by ‖h_t‖², h_t the hidden state behind the decoder layer: what the error is beside what it is added to,
    so that layers compare; not there where the layer returns nothing of one row per token. T·K²·H multiplications.
    """

    name: ClassVar[str] = "output_gram"
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _GramSums(block.num_experts)


class _GramSums(Accumulator):
    def __init__(self, experts: int):
        self.experts = experts
        self.gram = torch.zeros(experts * experts, dtype=torch.float64)
        self.relative: Tensor | None = torch.zeros_like(self.gram)

    def update(self, tap: Tap) -> None:
        dispatch = tap.dispatch
        scale = tap.inverse_residual_T
        if scale is None:
            self.relative, scale = None, torch.zeros(dispatch.tokens)
        counted = tap.counted_T.cpu()
        slots = dispatch.tokens * dispatch.slots
        # Slots that no expert serves point to a row of zeros behind the others, and count as expert 0.
        row = torch.full((slots,), len(dispatch.row_R), device=dispatch.row_R.device)
        row[dispatch.row_R] = torch.arange(len(dispatch.row_R), device=row.device)
        expert = torch.cat([dispatch.expert_R, dispatch.expert_R.new_zeros(1)])
        weight = torch.cat([dispatch.weight_R.float(), dispatch.weight_R.new_zeros(1).float()])
        output = torch.cat([tap.output_RH, tap.output_RH.new_zeros(1, tap.output_RH.shape[1])])
        step = max(1, _CHUNK_BYTES // (4 * dispatch.slots * output.shape[1]))
        parts = (row.view(-1, dispatch.slots), scale, counted)
        for row_TK, scale_T, counted_T in zip(*(part.split(step) for part in parts), strict=True):
            gated_TKH = output[row_TK].float() * weight[row_TK].unsqueeze(-1)
            products = torch.bmm(gated_TKH, gated_TKH.transpose(1, 2))
            expert_TK = expert[row_TK]
            pair = (expert_TK.unsqueeze(2) * self.experts + expert_TK.unsqueeze(1)).flatten().cpu()
            exact = products.double().cpu() * counted_T.view(-1, 1, 1)
            self.gram.index_add_(0, pair, exact.flatten())
            if self.relative is not None:
                self.relative.index_add_(0, pair, (exact * scale_T.view(-1, 1, 1)).flatten())

    def result(self) -> Result:
        found = {"gram": self.gram} | ({"relative": self.relative} if self.relative is not None else {})
        return {name: sums.view(self.experts, self.experts) for name, sums in found.items()}


@dataclass(frozen=True)
class OutputMoments(Statistic):
    """First and second moments of each expert's outputs f, channel by channel, over the tokens routed to it.

    Result: `counts` [E]; `sum` [E, H] Σ f; `squares` [E, H] Σ f²; float64, so that a variance can be taken of them.
    """

    name: ClassVar[str] = "output_moments"
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _OutputSums(block.num_experts)


class _OutputSums(Accumulator):
    def __init__(self, experts: int):
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.sums: Tensor | None = None

    def update(self, tap: Tap) -> None:
        output_RH, expert_R = tap.output_RH, tap.dispatch.expert_R
        counted_R = counted_rows(tap, tap.dispatch)
        self.counts.index_add_(0, expert_R.cpu(), counted_R.cpu())
        if self.sums is None:
            shape = (2, len(self.counts), output_RH.shape[1])
            self.sums = torch.zeros(shape, dtype=torch.float64, device=output_RH.device)
        step = max(1, _CHUNK_BYTES // (8 * output_RH.shape[1]))
        for rows, experts, counted in zip(*(r.split(step) for r in (output_RH, expert_R, counted_R)), strict=True):
            exact = rows.double()
            self.sums[0].index_add_(0, experts, exact * counted.unsqueeze(1))
            self.sums[1].index_add_(0, experts, exact.square_() * counted.unsqueeze(1))

    def result(self) -> Result:
        assert self.sums is not None, "no batch was seen"
        total, squares = self.sums.cpu()
        return {"counts": self.counts, "sum": total.clone(), "squares": squares.clone()}


@dataclass(frozen=True)
class TokenContribution(Statistic):
    """How much each expert adds, on tokens weighed by how far all their experts together turn the hidden state.

    Result: `turned` [E] Σ_t g_te·‖f_e(x_t)‖₂·max(0, 1 − cos(h_t − y_t, h_t)) over routed tokens, with h_t the hidden
    state behind the decoder layer and y_t = Σ_e g_te·f_e(x_t) (EASY-EP, arXiv 2504.06792: expert importance times token
    contribution; there cos(h, h + y) of the residual stream h in front of the block, which is the same where no shared
    expert adds to it). Holds for families that add y_t as it is to the residual stream; one that scales or
    normalises it on the way gets the cosine with the unscaled y_t.

    Raises UnsupportedModelError, while measuring, where the layer doesn't return one vector per token of the size of
    the experts' outputs (several residual streams, experts in a latent space).
    """

    name: ClassVar[str] = "token_contribution"
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _TurnSums(block.num_experts)


class _TurnSums(Accumulator):
    def __init__(self, experts: int):
        self.turned = torch.zeros(experts, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        behind = tap.behind_TH
        if behind is None or behind.shape != tap.output_TH.shape:
            raise UnsupportedModelError(
                f"layer {tap.layer}: token contributions (criterion easy_ep) need one hidden state per token behind "
                "the layer, as wide as what the experts put out; this family has none"
            )
        before = behind.double() - tap.output_TH.double()
        turn_T = (1 - torch.cosine_similarity(before, behind.double(), dim=-1, eps=1e-30)).clamp_min(0) * tap.counted_T
        dispatch = tap.dispatch
        size_R = torch.linalg.vector_norm(tap.output_RH, dim=-1, dtype=torch.float32).double()
        added_R = dispatch.weight_R.double() * size_R * turn_T[dispatch.token_R]
        self.turned.index_add_(0, dispatch.expert_R.cpu(), added_R.cpu())

    def result(self) -> Result:
        return {"turned": self.turned}
