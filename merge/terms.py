"""The terms that a factored projection is a sum of: W_e = Σ terms. Each computes in factored form, and says its price.

    base       W_e = S_g(e)                                one dense matrix for a group of experts, or for one; or none
    low_rank   W_e = U_e V_e                               ranks differ by expert, 0 is none; U or V may be all experts'
    basis      W_e = A_e · f(Σ_b α_eb B_b)                 shared bases, mixed; f on the mixture, element by element
    sparse     W_e = some whole rows, or columns           as many of every expert, each expert's own

Their matrices are stacks (quant/packed.py): of several experts in one encoding, converted a few at a time when they are
multiplied. A dense W_e is only ever made in `matrices`, for looking at. docs/format.md specifies the tensors.

Letters: E experts, S matrices of a stack, O/K output and input features, r rank, n bases, c rows or columns kept,
R rows by expert, T different tokens among them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from moe_compress.model.dispatch import Dispatch
from moe_compress.quant.grid import Quantized
from moe_compress.quant.run_packed import product
from moe_compress.quant.stack import Encoding, Stack, keeping_dtype

from .stack_products import grouped, numbered, once_per_token, ordered_times, picked, routed_times, spread

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"none": lambda x: x, "silu": nn.functional.silu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Load:
    """What a projection is given to do: R rows of T different tokens, for so many experts that have rows."""

    rows: int
    tokens: int
    experts: int


class Term(nn.Module):
    """One summand of a projection of all experts of a layer.

    Attributes:
        experts, out_features, in_features: E, O, K.
    """

    kind: ClassVar[str]

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        self.experts, self.out_features, self.in_features = experts, out_features, in_features

    @abstractmethod
    def forward(self, input_RK: Tensor, dispatch: Dispatch, per_token: bool) -> Tensor:
        """Each expert's rows times its own summand → [R, O]. `per_token`: rows of a token are all the same."""

    @abstractmethod
    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The summand as dense matrices of some experts: [len(experts), O, K]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON from which `build_term` rebuilds it."""

    @classmethod
    @abstractmethod
    def build(cls, entry: dict[str, Any], experts: int, out_features: int, in_features: int) -> Term:
        """What `describe` described, tensors on the meta device."""

    @abstractmethod
    def operations(self, load: Load) -> int:
        """Multiply-adds for a load (experts with rows are taken to be those with the largest share of it)."""

    @abstractmethod
    def stacks(self) -> dict[str, Stack]:
        """Its matrices, by the names of the submodules that hold them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in self.children():
            child._apply(fn)
        super()._apply(keeping_dtype(fn), recurse=False)
        return self


class Base(Term):
    """`group[e]`: which of the matrices is expert e's, −1 for none.

    Tensors: `matrix` a stack [S, O, K].
    """

    kind = "base"

    def __init__(self, matrix: Stack, group: Sequence[int]):
        super().__init__(len(group), matrix.out_features, matrix.in_features)
        self.matrix, self.group = matrix, list(group)

    @classmethod
    def holding(cls, matrix_SOK: Tensor | Quantized, group: Sequence[int]) -> Base:
        """With these matrices."""
        return cls(Stack.holding(matrix_SOK), group)

    def forward(self, input_RK: Tensor, dispatch: Dispatch, per_token: bool) -> Tensor:
        """See Term. Where all experts share one matrix, a token is multiplied once."""
        if per_token and not any(self.group):
            return once_per_token(self.matrix, input_RK, dispatch)
        return routed_times(self.matrix, self.group, input_RK, dispatch)

    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Term."""
        return picked(self.matrix, [self.group[e] for e in experts], dtype)

    def describe(self) -> dict[str, Any]:
        """See Term."""
        return {"kind": self.kind, "group": self.group, "matrix": self.matrix.encoding.to_json()}

    @classmethod
    def build(cls, entry: dict[str, Any], experts: int, out_features: int, in_features: int) -> Base:
        """See Term."""
        count = max(entry["group"]) + 1
        return cls(Stack(Encoding(**entry["matrix"]), count, out_features, in_features), entry["group"])

    def operations(self, load: Load) -> int:
        """See Term."""
        held = sum(g >= 0 for g in self.group) / len(self.group)
        times = load.tokens if not any(self.group) else round(load.rows * held)
        return times * self.out_features * self.in_features

    def stacks(self) -> dict[str, Stack]:
        """See Term."""
        return {"matrix": self.matrix}


class _Factors(nn.Module):
    """The factors of all experts of a rank."""

    def __init__(self, left: Stack, right: Stack):
        super().__init__()
        self.left, self.right = left, right


class LowRank(Term):
    """`ranks[e]`: rank of expert e, 0 for none. `shared`: "left" or "right" where that factor is all experts'.

    Tensors: `r{r}.left` a stack [S, O, r] and `r{r}.right` [S, r, K] for every rank r > 0, of the experts of that rank
    in ascending order; a shared factor is one matrix, and all ranks are the same.
    """

    kind = "low_rank"

    def __init__(
        self, factors: dict[int, tuple[Stack, Stack]], ranks: Sequence[int], size: tuple[int, int], shared: str
    ):
        super().__init__(len(ranks), *size)
        self.ranks, self.shared = list(ranks), shared
        for rank, (left, right) in sorted(factors.items()):
            self.add_module(f"r{rank}", _Factors(left, right))
        self._slots = {rank: numbered([own == rank for own in ranks]) for rank in factors}

    @classmethod
    def holding(cls, left_EOr: Tensor, right_ErK: Tensor, ranks: Sequence[int], shared: str = "") -> LowRank:
        """With these factors, of which expert e takes the first `ranks[e]` columns and rows.

        A shared factor is [1, …]. Directions are taken to be ordered by what they matter.
        """
        factors = {}
        for rank in sorted({*ranks} - {0}):
            own = torch.tensor([e for e, r in enumerate(ranks) if r == rank], device=left_EOr.device)
            if shared and len(own) < len(ranks):
                raise ValueError(f"with a shared factor all experts have one rank, not {sorted({*ranks})}")
            left = left_EOr[:, :, :rank] if shared == "left" else left_EOr[own, :, :rank]
            right = right_ErK[:, :rank] if shared == "right" else right_ErK[own, :rank]
            factors[rank] = Stack.holding(left), Stack.holding(right)
        return cls(factors, ranks, (left_EOr.shape[1], right_ErK.shape[2]), shared)

    def factors(self, rank: int) -> Any:
        """The module with the factors of a rank."""
        return self.get_submodule(f"r{rank}")

    def forward(self, input_RK: Tensor, dispatch: Dispatch, per_token: bool) -> Tensor:
        """See Term."""
        output: Tensor | None = None
        everyone = [0] * self.experts
        for rank, slots in self._slots.items():
            own = self.factors(rank)
            if self.shared == "right":
                between = once_per_token(own.right, input_RK, dispatch) if per_token else None
                if between is None:
                    between = routed_times(own.right, everyone, input_RK, dispatch)
                return routed_times(own.left, slots, between, dispatch)
            if self.shared == "left":
                return routed_times(own.left, everyone, routed_times(own.right, slots, input_RK, dispatch), dispatch)
            rows = grouped(slots, dispatch)
            if not rows.slots:
                continue
            between = ordered_times(own.right, rows, input_RK if rows.index is None else input_RK[rows.index])
            part = spread(ordered_times(own.left, rows, between), rows, len(input_RK))
            output = part if output is None else output + part
        return input_RK.new_zeros(len(input_RK), self.out_features) if output is None else output

    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Term."""
        total = torch.zeros(len(experts), self.out_features, self.in_features, dtype=dtype)
        for rank, slots in self._slots.items():
            own, mine = self.factors(rank), [slots[e] for e in experts]
            left = [0 if slot >= 0 else -1 for slot in mine] if self.shared == "left" else mine
            right = [0 if slot >= 0 else -1 for slot in mine] if self.shared == "right" else mine
            value = picked(own.left, left, dtype) @ picked(own.right, right, dtype)
            total = total.to(value.device) + value
        return total

    def describe(self) -> dict[str, Any]:
        """See Term."""
        encodings = {str(r): [s.encoding.to_json() for s in (f.left, f.right)] for r, f in self._by_rank().items()}
        return {"kind": self.kind, "ranks": self.ranks, "shared": self.shared, "factors": encodings}

    @classmethod
    def build(cls, entry: dict[str, Any], experts: int, out_features: int, in_features: int) -> LowRank:
        """See Term."""
        factors = {}
        for key, (left, right) in entry["factors"].items():
            rank, shared = int(key), entry["shared"]
            count = entry["ranks"].count(rank)
            factors[rank] = (
                Stack(Encoding(**left), 1 if shared == "left" else count, out_features, rank),
                Stack(Encoding(**right), 1 if shared == "right" else count, rank, in_features),
            )
        return cls(factors, entry["ranks"], (out_features, in_features), entry["shared"])

    def operations(self, load: Load) -> int:
        """See Term."""
        if self.shared == "right":
            rank = max(self.ranks)
            return rank * (load.tokens * self.in_features + load.rows * self.out_features)
        return round(load.rows * sum(self.ranks) / self.experts * (self.out_features + self.in_features))

    def stacks(self) -> dict[str, Stack]:
        """See Term."""
        found: dict[str, Stack] = {}
        for rank, factors in self._by_rank().items():
            found |= {f"r{rank}.left": factors.left, f"r{rank}.right": factors.right}
        return found

    def _by_rank(self) -> dict[int, Any]:
        return {rank: self.factors(rank) for rank in self._slots}


class Basis(Term):
    """`activation`: f, a name in ACTIVATIONS.

    Tensors: `left` a stack [E, O, r], `bases` a stack [n, r, K], `mixture` α [E, n].
    """

    kind = "basis"

    def __init__(self, left: Stack, bases: Stack, mixture_En: Tensor, activation: str):
        super().__init__(len(mixture_En), left.out_features, bases.in_features)
        self.left, self.bases, self.activation = left, bases, activation
        self.mixture = nn.Parameter(mixture_En, requires_grad=False)

    @classmethod
    def holding(cls, left_EOr: Tensor, bases_nrK: Tensor, mixture_En: Tensor, activation: str) -> Basis:
        """With these matrices."""
        return cls(Stack.holding(left_EOr), Stack.holding(bases_nrK), mixture_En.contiguous(), activation)

    def forward(self, input_RK: Tensor, dispatch: Dispatch, per_token: bool) -> Tensor:
        """See Term. Of experts with rows the mixture [r, K] is made, which is what f acts on."""
        everyone = grouped(range(self.experts), dispatch)
        if not everyone.slots:
            return input_RK.new_zeros(len(input_RK), self.out_features)
        between = product(input_RK, self._mixed(everyone.slots, input_RK.dtype), everyone.counts)
        return ordered_times(self.left, everyone, between)

    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Term."""
        return picked(self.left, list(experts), dtype) @ self._mixed(list(experts), dtype)

    def _mixed(self, experts: list[int], dtype: torch.dtype) -> Tensor:
        # In float32 or better: f is applied to what is stored, not to a rounded sum of it.
        wide = torch.promote_types(dtype, torch.float32)
        bases = self.bases(list(range(self.bases_count)), wide)
        mixture = self.mixture[torch.tensor(experts, device=self.mixture.device)].to(wide)
        return ACTIVATIONS[self.activation](torch.einsum("en,nrk->erk", mixture, bases)).to(dtype)

    @property
    def bases_count(self) -> int:
        """Bases n."""
        return int(self.mixture.shape[1])

    def describe(self) -> dict[str, Any]:
        """See Term."""
        return {
            "kind": self.kind,
            "bases": self.bases_count,
            "rank": self.bases.out_features,
            "activation": self.activation,
            "mixture": str(self.mixture.dtype).removeprefix("torch."),
            "factors": [self.left.encoding.to_json(), self.bases.encoding.to_json()],
        }

    @classmethod
    def build(cls, entry: dict[str, Any], experts: int, out_features: int, in_features: int) -> Basis:
        """See Term."""
        left, bases = (Encoding(**values) for values in entry["factors"])
        dtype = getattr(torch, entry["mixture"])
        mixture = torch.empty(experts, entry["bases"], dtype=dtype, device="meta")
        return cls(
            Stack(left, experts, out_features, entry["rank"]),
            Stack(bases, entry["bases"], entry["rank"], in_features),
            mixture,
            entry["activation"],
        )

    def operations(self, load: Load) -> int:
        """See Term: the mixing is paid once per expert with rows, however many these are."""
        rank = self.bases.out_features
        mixing = load.experts * self.bases_count * rank * self.in_features
        return mixing + load.rows * rank * (self.out_features + self.in_features)

    def stacks(self) -> dict[str, Stack]:
        """See Term."""
        return {"left": self.left, "bases": self.bases}


class Sparse(Term):
    """`axis`: "rows" (of output features) or "columns" (of input features) that are kept.

    Tensors: `index` int32 [E, c], ascending; `kept` a stack [E, c, K] of rows, or [E, O, c] of columns.
    """

    kind = "sparse"

    def __init__(self, kept: Stack, index_Ec: Tensor, axis: str, size: tuple[int, int]):
        super().__init__(len(index_Ec), *size)
        self.kept, self.axis = kept, axis
        self.index = nn.Parameter(index_Ec.to(torch.int32), requires_grad=False)

    @classmethod
    def holding(cls, weight_EOK: Tensor, index_Ec: Tensor, axis: str) -> Sparse:
        """With these rows or columns of dense matrices."""
        size = tuple(weight_EOK.shape[1:])
        index = index_Ec.long().unsqueeze(-1 if axis == "rows" else 1)
        kept = weight_EOK.gather(1 if axis == "rows" else 2, index.expand(-1, *_spanned(index, size, axis)))
        return cls(Stack.holding(kept), index_Ec, axis, (size[0], size[1]))

    def forward(self, input_RK: Tensor, dispatch: Dispatch, per_token: bool) -> Tensor:
        """See Term."""
        everyone = grouped(range(self.experts), dispatch)
        index_Rc = self.index[dispatch.expert_R].long()
        if self.axis == "columns":
            return ordered_times(self.kept, everyone, input_RK.gather(1, index_Rc))
        part = ordered_times(self.kept, everyone, input_RK)
        return part.new_zeros(len(part), self.out_features).scatter_add(1, index_Rc, part)

    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Term."""
        kept = picked(self.kept, list(experts), dtype)
        index = self.index[torch.tensor(list(experts), device=self.index.device)].long()
        index = index.unsqueeze(-1 if self.axis == "rows" else 1).expand(kept.shape)
        dense = kept.new_zeros(len(experts), self.out_features, self.in_features)
        return dense.scatter_(1 if self.axis == "rows" else 2, index, kept)

    def describe(self) -> dict[str, Any]:
        """See Term."""
        kept = int(self.index.shape[1])
        return {"kind": self.kind, "axis": self.axis, "count": kept, "kept": self.kept.encoding.to_json()}

    @classmethod
    def build(cls, entry: dict[str, Any], experts: int, out_features: int, in_features: int) -> Sparse:
        """See Term."""
        count = entry["count"]
        shape = (count, in_features) if entry["axis"] == "rows" else (out_features, count)
        index = torch.empty(experts, count, dtype=torch.int32, device="meta")
        return cls(Stack(Encoding(**entry["kept"]), experts, *shape), index, entry["axis"], (out_features, in_features))

    def operations(self, load: Load) -> int:
        """See Term."""
        return load.rows * self.kept.out_features * self.kept.in_features

    def stacks(self) -> dict[str, Stack]:
        """See Term."""
        return {"kept": self.kept}


TERMS: dict[str, type[Term]] = {t.kind: t for t in (Base, LowRank, Basis, Sparse)}


def build_term(entry: dict[str, Any], experts: int, out_features: int, in_features: int) -> Term:
    """The term that `describe` described, tensors on the meta device. Raises KeyError for a kind that isn't known."""
    return TERMS[entry["kind"]].build(entry, experts, out_features, in_features)


def _spanned(index: Tensor, size: tuple[int, ...], axis: str) -> tuple[int, int]:
    return (index.shape[1], size[1]) if axis == "rows" else (size[0], index.shape[2])
