"""Sending tokens to experts and back: the arithmetic that all experts modules share.

Letters: T tokens, K experts per token (top-k), E experts, R rows = (token, slot) pairs that reach an expert, sorted by
expert, O and I output and input size of a projection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Blocks of rows in which a symmetric product is made on a CPU, so that little is done twice: 8 leave 9/16 of it.
_BLOCKS = 8


@dataclass(frozen=True)
class Dispatch:
    """Which token goes to which expert, sorted by expert.

    Attributes:
        tokens: number of tokens T.
        slots: number of slots K per token.
        row_R: position of each row in the flattened [T·K] routing, int64.
        expert_R: expert of each row, ascending.
        offsets_E: end of each expert's rows, int32 (what grouped matrix products take).
        weight_R: routing weight of each row, as the model itself computed it.
    """

    tokens: int
    slots: int
    row_R: Tensor
    expert_R: Tensor
    offsets_E: Tensor
    weight_R: Tensor

    @classmethod
    def of(cls, index_TK: Tensor, weight_TK: Tensor, experts: int) -> Dispatch:
        """Sort a routing by expert. Slots that no expert serves are left out: indices ≥ `experts`, and weights of zero
        (some routers have a class for "no expert", which they hand on as expert 0 with weight 0)."""
        index = torch.where(weight_TK.reshape(-1) == 0, experts, index_TK.reshape(-1))
        expert, row = torch.sort(index, stable=True)
        served = int((expert < experts).sum())
        expert, row = expert[:served], row[:served]
        offsets = torch.bincount(expert, minlength=experts).cumsum(0).to(torch.int32)
        weight = weight_TK.reshape(-1)[row]
        return cls(index_TK.shape[0], index_TK.shape[1], row, expert, offsets, weight)

    @property
    def token_R(self) -> Tensor:
        """Token of each row."""
        return self.row_R // self.slots

    @property
    def counts_E(self) -> Tensor:
        """Rows per expert, int64."""
        return torch.diff(self.offsets_E.long(), prepend=self.offsets_E.new_zeros(1).long())

    @cached_property
    def counts(self) -> list[int]:
        """The same as a list: every projection of a layer asks for it."""
        return self.counts_E.tolist()  # type: ignore[no-any-return]

    def part(self, experts: range) -> tuple[slice, Dispatch]:
        """A run of consecutive experts: where their rows are, and a dispatch that counts them from 0."""
        ends = self.offsets_E.tolist()
        start, stop = ends[experts.start - 1] if experts.start else 0, ends[experts.stop - 1]
        rows = slice(start, stop)
        offsets = self.offsets_E[experts.start : experts.stop] - start
        return rows, replace(
            self,
            row_R=self.row_R[rows],
            expert_R=self.expert_R[rows] - experts.start,
            offsets_E=offsets,
            weight_R=self.weight_R[rows],
        )

    def combine(self, output_RH: Tensor) -> Tensor:
        """Σ over a token's slots of weight · output → [T, H]. The order of summation is fixed, so runs repeat."""
        row_TK = self.row_R.new_full((self.tokens * self.slots,), -1)
        row_TK[self.row_R] = torch.arange(len(self.row_R), device=self.row_R.device)
        row_TK = row_TK.view(self.tokens, self.slots)
        # Weights and sum in the wider dtype of the two, as the families do. Slot by slot: [T, K, H] would be too much.
        combined = None
        if len(self.row_R):
            served_TK = row_TK.clamp_min(0)
            weight_TK = torch.where(row_TK >= 0, self.weight_R[served_TK], 0)
            for slot in range(self.slots):
                part = output_RH[served_TK[:, slot]] * weight_TK[:, slot, None]
                combined = part if combined is None else combined.add_(part)
        return output_RH.new_zeros(self.tokens, output_RH.shape[-1]) if combined is None else combined


def grouped_linear(input_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """Each expert's rows times its own weight: [R, I] × [E, O, I]ᵀ → [R, O], in one call where the dtype allows."""
    learns = torch.is_grad_enabled() and (input_RI.requires_grad or weight_EOI.requires_grad)
    if (
        input_RI.dtype in _GROUPED_DTYPES
        and input_RI.dtype == weight_EOI.dtype
        and _aligned(weight_EOI)
        and _aligned(input_RI)
        and not (learns and weight_EOI.shape[1] * weight_EOI.element_size() % 16)
    ):
        output = F.grouped_mm(input_RI, weight_EOI.transpose(-2, -1), offs=offsets_E)
        if learns:  # the gradient goes into a grouped product too: gate and up, interleaved, hand back every other one
            output.register_hook(Tensor.contiguous)
        return output
    if learns:
        rows = input_RI.split(torch.diff(offsets_E.long(), prepend=offsets_E.new_zeros(1).long()).tolist())
        return torch.cat([r @ weight_EOI[e].T.to(r.dtype) for e, r in enumerate(rows)])
    output = input_RI.new_empty(input_RI.shape[0], weight_EOI.shape[1])
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            torch.mm(input_RI[start:end], weight_EOI[expert].T.to(input_RI.dtype), out=output[start:end])
        start = end
    return output


def grouped_gram(left_RA: Tensor, right_RB: Tensor, offsets_E: Tensor) -> Tensor:
    """Σ over each expert's rows of left ⊗ right: [R, A], [R, B] → [E, A, B]; experts without rows get zeros."""
    if left_RA.dtype in _GROUPED_DTYPES and left_RA.shape[0] and _aligned(left_RA) and _aligned(right_RB):
        return F.grouped_mm(left_RA.T, right_RB, offs=offsets_E)
    gram = left_RA.new_zeros(offsets_E.shape[0], left_RA.shape[1], right_RB.shape[1])
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            torch.mm(left_RA[start:end].T, right_RB[start:end], out=gram[expert])
        start = end
    return gram


def grouped_squares(rows_RA: Tensor, offsets_E: Tensor) -> Tensor:
    """`grouped_gram` of rows with themselves: Σ x xᵀ, [R, A] → [E, A, A].

    On a CPU only blocks on and below the diagonal are computed, the others are their mirror images.
    """
    if rows_RA.device.type != "cpu":
        return grouped_gram(rows_RA, rows_RA, offsets_E)
    size = rows_RA.shape[1]
    step = max(16, -(-size // _BLOCKS) + 15 & -16)  # whole cache lines
    gram_EAA = rows_RA.new_zeros(offsets_E.shape[0], size, size)
    start = 0
    for gram_AA, end in zip(gram_EAA, offsets_E.tolist(), strict=True):
        own_RA = rows_RA[start:end]
        start = end
        for first in range(0, size if len(own_RA) else 0, step):
            block = slice(first, first + step)
            until = min(block.stop, size)
            torch.mm(own_RA[:, block].T, own_RA[:, :until], out=gram_AA[block, :until])
            gram_AA[:first, block] = gram_AA[block, :first].T
    return gram_EAA


def _aligned(matrix: Tensor) -> bool:
    """Whether grouped products accept the matrices: one dimension contiguous, the other in whole 16-byte steps."""
    step = 16 // matrix.element_size()
    near, far = sorted(matrix.stride()[-2:])
    return near == 1 and far % step == 0 and far >= step and matrix.data_ptr() % 16 == 0
