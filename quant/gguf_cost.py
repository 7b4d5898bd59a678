"""What a block type costs a projection of a layer: measured on the calibration text, before anything is quantized.

Letters: E experts, P projections (gate, up, down), B types, T tokens, R rows by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import KeepsInputs, chunks
from moe_compress.calib.statistics import Accumulator, Result, Statistic
from moe_compress.model import FusedExperts, MoEBlock, Tap
from moe_compress.model.dispatch import Dispatch

from .gguf_blocks import dequantize, find_type
from .gguf_quantize import quantize
from .importance import channel_squares
from .scores import experts_of

# Bytes of rows and re-quantized weights at a time.
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class BlockTypeError(Statistic):
    """Error at the block's output when one projection of the layer's experts alone is quantized.

    Result: `relative` [P, B] Σ over tokens of ‖z_t − z'_t‖² / ‖h_t‖², z the block's output and h the hidden state
    behind the decoder layer, comparable between layers; `squared` [P, B] without the division. Experts' changes are
    summed as if they were orthogonal. A type that doesn't fit the rows has −1. `sample` experts of a layer are
    measured, evenly from the most to the least used, and stand for the others by their rows (0: all). Each token counts
    as much as it weighs, in errors, importances and rows.
    """

    name: ClassVar[str] = "block_type_error"
    weighs_tokens: ClassVar[bool] = True
    types: tuple[str, ...]
    weighted: bool = True
    search: bool = True
    sample: int = 16

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic. Raises UnsupportedModelError for experts that aren't dense."""
        return _Errors(self, experts_of(block))


class _Errors(KeepsInputs):
    """Keeps the block's inputs; errors are computed at the end, so that each expert is quantized once per type."""

    def __init__(self, settings: BlockTypeError, experts: FusedExperts):
        super().__init__()
        self.settings, self.experts = settings, experts
        self.scales: list[Tensor] | None = []

    def update(self, tap: Tap) -> None:
        self.inputs.observe(tap)
        if tap.inverse_residual_T is None:
            self.scales = None
        elif self.scales is not None:
            self.scales.append(tap.inverse_residual_T)

    def result(self) -> Result:
        weights = self.experts.weights()
        names = [name for name, _ in weights.matrices()]
        squares = channel_squares(self.inputs, self.experts) if self.settings.weighted else None
        members, share = self._members()
        weights = weights.map(lambda stacked: stacked[members])
        slot_E = torch.full((self.experts.num_experts,), len(members), device=members.device)
        slot_E[members] = torch.arange(len(members), device=members.device)
        # Experts that aren't measured get a number that no expert has, which a dispatch leaves out.
        dispatch = Dispatch.of(slot_E[self.inputs.index_TK], self.inputs.weight_TK, len(members))
        scale_T = None if self.scales is None else torch.cat(self.scales)
        errors = torch.zeros(2, len(names), len(self.settings.types), dtype=torch.float64)
        row = 3 * self.experts.hidden_size + 4 * weights.up.shape[1]
        sizes = [16 * weights.parameters // len(members) + 4 * rows * row for rows in dispatch.counts]
        for chunk in chunks(sizes, _CHUNK_BYTES):
            _, part = dispatch.part(chunk)
            if not len(part.row_R):
                continue
            own = weights.part(chunk)
            input_RH = self.inputs.hidden_TH[part.token_R]
            exact = self.experts.with_weights(own, input_RH, part)[1]
            squared_R = part.weight_R.double().square() * self.inputs.counted(part)
            for p, projection in enumerate(names):
                matrix = getattr(own, projection)
                importance = None
                if squares is not None:
                    importance = squares.importance(projection)[members[chunk.start : chunk.stop]]
                for b, name in enumerate(self.settings.types):
                    kind = find_type(name)
                    if not kind.fits(matrix.shape[-1]):
                        continue
                    blocks = quantize(matrix, kind, importance, search=self.settings.search)
                    rounded = replace(own, **{projection: dequantize(blocks, kind).to(matrix.dtype)})
                    change = exact - self.experts.with_weights(rounded, input_RH, part)[1]
                    change_R = (change.float().square().sum(-1).double() * squared_R).cpu()
                    errors[0, p, b] += change_R.sum()
                    if scale_T is not None:
                        errors[1, p, b] += (change_R * scale_T[part.token_R.cpu()]).sum()
        errors *= share
        for p, projection in enumerate(names):
            for b, name in enumerate(self.settings.types):
                if not find_type(name).fits(getattr(weights, projection).shape[-1]):
                    errors[:, p, b] = -1
        return {"squared": errors[0], **({"relative": errors[1]} if scale_T is not None else {})}

    def _members(self) -> tuple[Tensor, float]:
        """Experts that are measured, and how many times their rows all rows are."""
        dispatch = Dispatch.of(self.inputs.index_TK, self.inputs.weight_TK, self.experts.num_experts)
        rows_E = torch.zeros(self.experts.num_experts, dtype=torch.float64, device=dispatch.row_R.device)
        rows_E.index_add_(0, dispatch.expert_R, self.inputs.counted(dispatch))
        sample = self.settings.sample
        order = rows_E.argsort(descending=True, stable=True)
        if sample and sample < len(order):
            order = order[(torch.arange(sample, device=order.device) * len(order)) // sample]
        members = order.sort().values
        seen = float(rows_E[members].sum())
        return members, float(rows_E.sum()) / seen if seen else 1.0
