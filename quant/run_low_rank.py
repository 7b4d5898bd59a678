"""Matrices of low rank beside packed ones, at run time: x → A (B x), never A B.

docs/format.md specifies the tensors. Experts of one rank are one stack, so that each product is one call for all of
them; a shared pair is added to every expert's rows.

Letters: E experts, S experts of a stack, O/K output and input features, r rank, R rows by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_compress.model.dispatch import Dispatch, grouped_linear

from .low_rank import Pair
from .stack import keeping_dtype, name_of


class Factors(nn.Module):
    """Pairs of one rank. Parameters (never trained): `left` [S, O, r], `right` [S, r, K]; shared ones lack S."""

    def __init__(self, pair: Pair):
        super().__init__()
        self.left = nn.Parameter(pair.left.contiguous(), requires_grad=False)
        self.right = nn.Parameter(pair.right.contiguous(), requires_grad=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Both. A call, so that offloading hooks see it."""
        return self.left, self.right

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keeping_dtype(fn), recurse)
        return self


class LowRank(nn.Module):
    """What is added to the packed matrices of one projection.

    Args:
        ranks: of every expert's own pair, 0 where it has none.
        routed: rank → the pairs of the experts that have it, ascending: [S, O, r] and [S, r, K].
        shared: the pair that every expert gets, [O, r] and [r, K], if there is one.
    """

    def __init__(self, ranks: Sequence[int], routed: Mapping[int, Pair], shared: Pair | None = None):
        super().__init__()
        self.ranks = list(ranks)
        for rank, pair in sorted(routed.items()):
            self.add_module(f"r{rank}", Factors(pair))
        self.shared = None if shared is None else Factors(shared)

    @classmethod
    def from_json(cls, values: dict[str, Any], out_features: int, in_features: int) -> LowRank:
        """As `to_json` described it, tensors on the meta device."""
        dtype = getattr(torch, values["dtype"])

        def pair(rank: int, *count: int) -> Pair:
            return Pair(
                torch.empty(*count, out_features, rank, dtype=dtype, device="meta"),
                torch.empty(*count, rank, in_features, dtype=dtype, device="meta"),
            )

        ranks, shared = values["ranks"], values["shared_rank"]
        routed = {rank: pair(rank, ranks.count(rank)) for rank in set(ranks) - {0}}
        return cls(ranks, routed, pair(shared) if shared else None)

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        factors: Factors = next(iter(self.children()))  # type: ignore[assignment]
        shared = 0 if self.shared is None else self.shared.left.shape[-1]
        return {"ranks": self.ranks, "shared_rank": shared, "dtype": name_of(factors.left.dtype)}

    def matrices(self, experts: Sequence[int]) -> Tensor:
        """What is added to the matrices of some experts, float32 [len(experts), O, K]."""
        some: Factors = next(iter(self.children()))  # type: ignore[assignment]
        left, right = some()
        added = torch.zeros(len(experts), left.shape[-2], right.shape[-1], device=left.device)
        if self.shared is not None:
            added += Pair(*self.shared()).product
        for place, expert in enumerate(experts):
            if rank := self.ranks[expert]:
                left_SOr, right_SrK = self.get_submodule(f"r{rank}")()
                slot = self.ranks[:expert].count(rank)
                added[place] += Pair(left_SOr[slot], right_SrK[slot]).product
        return added

    def add(self, output: Tensor, input_RK: Tensor, dispatch: Dispatch, backward: bool = False) -> Tensor:
        """`output` [R, O] and what the pairs give for the rows [R, K]; `backward`: the other way around.

        Sums are float32 on a CPU, and rounded once more to the dtype of `output`.
        """
        wide = input_RK.dtype in (torch.bfloat16, torch.float16) and input_RK.device.type == "cpu"
        rows_RK = input_RK.float() if wide else input_RK
        if self.shared is not None:
            first, second = self._ordered(self.shared, rows_RK.dtype, backward)
            output = output + (rows_RK @ first.T @ second.T).to(output.dtype)
        counts_E = dispatch.counts_E.cpu()
        for rank in sorted(set(self.ranks) - {0}):
            mine_E = torch.tensor([own == rank for own in self.ranks])
            rows = mine_E.repeat_interleave(counts_E).nonzero().flatten().to(input_RK.device)
            if not len(rows):
                continue
            first_S, second_S = self._ordered(self.get_submodule(f"r{rank}"), rows_RK.dtype, backward)
            ends_S = counts_E[mine_E].cumsum(0).to(input_RK.device, torch.int32)
            inner = grouped_linear(rows_RK[rows], first_S, ends_S)
            added = grouped_linear(inner, second_S, ends_S)
            output = output.index_add(0, rows, added.to(output.dtype))
        return output

    @staticmethod
    def _ordered(factors: nn.Module, dtype: torch.dtype, backward: bool) -> tuple[Tensor, Tensor]:
        """The factor that reads rows, and the one that reads what that gives."""
        left, right = (factor.to(dtype) for factor in factors())
        return (left.transpose(-2, -1), right.transpose(-2, -1)) if backward else (right, left)
