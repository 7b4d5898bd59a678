"""What the single neurons of a layer's experts do: sizes, projections, gradients, and what solving again would leave.

A neuron (e, j) of an expert is row j of its gate and up projections and column w_j of its down projection; what it adds
to the output f_e is a_j·w_j, whatever the others do. Like calib/statistics.py: accumulators over taps. Each token
counts as much as it weighs. Results are [E, I].

Letters: E experts, I neurons of each, H hidden, T tokens, R rows (token, expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import FusedExperts, GradientTap, MoEBlock, Tap
from moe_compress.model.dispatch import grouped_linear, grouped_squares
from moe_compress.model.experts import Experts

from .statistics import Accumulator, Result, Statistic, counted_rows

# What the rows that are worked on at a time, and matrices that are inverted at a time, may take.
_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class NeuronWeights(Statistic):
    """Size of each neuron's weights. Reads no text.

    Result, each [E, I] float64: `down` ‖w_j‖², column of the down projection; `whole` the same with the rows of up and
    gate added.
    """

    name: ClassVar[str] = "neuron_weights"
    reads_text: ClassVar[bool] = False
    weighs_tokens: ClassVar[bool] = True  # there are none

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Weights(block)


class _Weights(Accumulator):
    def __init__(self, block: MoEBlock):
        self.block = block

    def update(self, tap: Tap) -> None:
        """Nothing passes through."""

    def result(self) -> Result:
        weights = self.block.experts.weights()
        down = column_squares(weights.down)
        rows = [w.square().sum(dim=2, dtype=torch.float64).cpu() for w in (weights.up, weights.gate) if w is not None]
        return {"down": down, "whole": down + sum(rows)}


@dataclass(frozen=True)
class NeuronSums(Statistic):
    """Size of each neuron's activations a on the tokens routed to its expert.

    Result: `counts` [E]; each [E, I] float64: `gated_squares` Σ (g·a_j)², `gated_maximum` max (g·a_j)² (CAMERA, arXiv
    2508.02322); a token counts in the maximum if it weighs anything.
    """

    name: ClassVar[str] = "neuron_sums"
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Sums(block.num_experts)


class _Sums(Accumulator):
    def __init__(self, experts: int):
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.squares, self.maximum = _ByExpert(experts), _ByExpert(experts)

    def update(self, tap: Tap) -> None:
        dispatch, counted_R = tap.dispatch, counted_rows(tap, tap.dispatch)
        self.counts.index_add_(0, dispatch.expert_R.cpu(), counted_R.cpu())
        squares_RI = (tap.activation_RI.float() * dispatch.weight_R.float().unsqueeze(1)).square()
        self.squares.add(squares_RI, dispatch.expert_R, counted_R)
        self.maximum.raise_to(squares_RI * (counted_R > 0).unsqueeze(1), dispatch.expert_R)

    def result(self) -> Result:
        found = {"gated_squares": self.squares.result(), "gated_maximum": self.maximum.result()}
        return {"counts": self.counts, **found}


@dataclass(frozen=True)
class NeuronProjections(Statistic):
    """How far each neuron goes in the direction of its expert's whole output (TENP, arXiv 2606.09885).

    Result: `counts` [E]; `projected` [E, I] float64, Σ over routed tokens of ⟨a_j·w_j, f⟩ / ‖f‖, with sign; f is what
    the down projection puts out, without bias or norm. Costs one product the size of the down projection.
    """

    name: ClassVar[str] = "neuron_projections"
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Projections(block.num_experts)


class _Projections(Accumulator):
    def __init__(self, experts: int):
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.projected = _ByExpert(experts)

    def update(self, tap: Tap) -> None:
        dispatch, counted_R = tap.dispatch, counted_rows(tap, tap.dispatch)
        self.counts.index_add_(0, dispatch.expert_R.cpu(), counted_R.cpu())
        output_RH = grouped_linear(tap.activation_RI, tap.experts.weights().down, dispatch.offsets_E)
        unit_RH = torch.nn.functional.normalize(output_RH.float(), dim=1, eps=1e-30)
        along_RI = on_columns(unit_RH.to(output_RH.dtype), tap.experts, dispatch.offsets_E)
        self.projected.add(tap.activation_RI.float() * along_RI.float(), dispatch.expert_R, counted_R)

    def result(self) -> Result:
        return {"counts": self.counts, "projected": self.projected.result()}


@dataclass(frozen=True)
class NeuronGradients(Statistic):
    """What removing single neurons does to the next token's loss, to second order.

    With δ_t the gradient at the expert's own output f_e(x_t) (so the routing weight is in it) of the loss summed over
    the text: removing neuron j changes f_e(x_t) by −a_tj·w_j, and the loss by about −Σ_t a_tj·(δ_t·w_j) + ½ Σ_t
    (a_tj·δ_t·w_j)².

    Result: `counts` [E]; each [E, I] float64, sums over routed tokens: `squares` Σ a²; `projected` Σ (δ·w_j)²: n_e
    times w_jᵀ G w_j with HEAPr's G = E[δ δᵀ] (arXiv 2509.22299), without making any G [H, H]; `joint` Σ (a·δ·w_j)², the
    Fisher along the very change, with the correlation of a and δ; `slope` Σ a·(δ·w_j). `tokens` []: tokens of the text.
    Halves of `joint` over `tokens` are nats per token. Costs one product the size of the down projection on the way
    back.

    Raises UnsupportedModelError where a norm follows the experts: a neuron's part is then no sum.
    """

    name: ClassVar[str] = "neuron_gradients"
    gradients: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        refuse_norm(block, "gradients of single neurons")
        return _Gradients(block.num_experts, tokens)


class _Gradients(Accumulator):
    def __init__(self, experts: int, tokens: int):
        self.tokens = tokens
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.sums = {name: _ByExpert(experts) for name in ("squares", "projected", "joint", "slope")}

    def update(self, tap: Tap) -> None:
        assert isinstance(tap, GradientTap)
        dispatch = tap.dispatch
        ones_R = torch.ones(len(dispatch.row_R), dtype=torch.float64, device=dispatch.row_R.device)
        self.counts.index_add_(0, dispatch.expert_R.cpu(), ones_R.cpu())
        # The sweep's loss is a mean: times T it is a sum over the text, of the size of one token's.
        delta_RH = tap.expert_gradient_RH * self.tokens
        along_RI = on_columns(delta_RH, tap.experts, dispatch.offsets_E).float()
        activation_RI = tap.activation_RI.float()
        added = {
            "squares": activation_RI.square(),
            "projected": along_RI.square(),
            "joint": (activation_RI * along_RI).square(),
            "slope": activation_RI * along_RI,
        }
        for name, values_RI in added.items():
            self.sums[name].add(values_RI, dispatch.expert_R, ones_R)

    def result(self) -> Result:
        tokens = torch.tensor(self.tokens, dtype=torch.float64)
        return {"counts": self.counts, "tokens": tokens, **{n: s.result() for n, s in self.sums.items()}}


@dataclass(frozen=True)
class NeuronRemoval(Statistic):
    """Squared error of an expert's weighted outputs when a neuron goes and the down projection is solved again.

    Without neuron j the best the others can do is W_jᵀW_j / (H⁻¹)_jj worse (optimal brain surgeon, a whole column at a
    time), H = Σ g² a aᵀ + λ over routed tokens, with refit.py's ridge: λ = ridge · (I / rows) · mean of H's
    diagonal. Result, each [E, I] float64: `alone`, every neuron on its own; `in_turn`, the cheapest neuron of what is
    left removed again and again, with W and H⁻¹ after each removal as it leaves them: what its removal cost, not less
    than the one before. In that order sets of any size are chosen by what they lose together. 0 for an expert that saw
    no token.

    Memory: E·I²·4 bytes. `in_turn` costs 4·E·I³ multiplications.
    """

    name: ClassVar[str] = "neuron_removal"
    weighs_tokens: ClassVar[bool] = True
    ridge: float = 0.25

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Removal(block, self.ridge)


class _Removal(Accumulator):
    def __init__(self, block: MoEBlock, ridge: float):
        self.block, self.ridge = block, ridge
        self.counts = torch.zeros(block.num_experts, dtype=torch.float64)
        self.moment_EII: Tensor | None = None

    def update(self, tap: Tap) -> None:
        dispatch, counted_R = tap.dispatch, counted_rows(tap, tap.dispatch)
        self.counts.index_add_(0, dispatch.expert_R.cpu(), counted_R.cpu())
        weight_R = dispatch.weight_R.float() * counted_R.sqrt().float()
        feature_RI = tap.activation_RI.float() * weight_R.unsqueeze(1)
        gram = grouped_squares(feature_RI, dispatch.offsets_E)
        self.moment_EII = gram if self.moment_EII is None else self.moment_EII.add_(gram)

    def result(self) -> Result:
        assert self.moment_EII is not None, "no batch was seen"
        down_EHI = self.block.experts.weights().down
        step = max(1, _CHUNK_BYTES // (40 * self.moment_EII[0].numel()))
        parts = []
        for moment, down, counts in zip(
            self.moment_EII.split(step), down_EHI.split(step), self.counts.split(step), strict=True
        ):
            mean = moment.diagonal(dim1=1, dim2=2).double().mean(dim=1)
            scale = self.ridge * moment.shape[1] / counts.to(mean.device).clamp_min(1) * mean
            eye = torch.eye(moment.shape[1], dtype=torch.float64, device=moment.device)
            seen = mean > 0
            ridged = moment.double() + torch.where(seen, scale, 1)[:, None, None] * eye
            found = removal_costs(ridged, down.double().transpose(1, 2) @ down.double())
            parts.append(torch.stack(found) * seen[:, None])
        alone, in_turn = torch.cat(parts, dim=1).cpu()
        return {"alone": alone.clone(), "in_turn": in_turn.clone()}


def removal_costs(moment_EII: Tensor, gram_EII: Tensor) -> tuple[Tensor, Tensor]:
    """What removing neurons costs when the others are solved again, see NeuronRemoval: (alone, in turn), each [E, I].

    Args:
        moment_EII: H, positive definite.
        gram_EII: WᵀW of the down projections' columns.
    """
    experts, neurons = moment_EII.shape[:2]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment_EII))
    gram = gram_EII.clone()
    alone = gram.diagonal(dim1=1, dim2=2) / inverse.diagonal(dim1=1, dim2=2)
    left = torch.ones(experts, neurons, dtype=torch.bool, device=gram.device)
    in_turn = torch.zeros_like(alone)
    each = torch.arange(experts, device=gram.device)
    last = torch.zeros(experts, dtype=gram.dtype, device=gram.device)
    for _ in range(neurons):
        pivots = torch.where(left, inverse.diagonal(dim1=1, dim2=2), 1)
        costs = torch.where(left, gram.diagonal(dim1=1, dim2=2) / pivots, float("inf"))
        cost, j = costs.min(dim=1)
        last = torch.maximum(last, cost)
        in_turn[each, j] = last
        left[each, j] = False
        # W's other columns take over: W ← W − w_j cᵀ with c = H⁻¹ e_j / (H⁻¹)_jj; both sides of WᵀW follow.
        row, moved = inverse[each, j], gram[each, j]
        share = row / pivots[each, j].unsqueeze(1)
        size = moved[each, j]
        gram -= share.unsqueeze(2) * moved.unsqueeze(1) + moved.unsqueeze(2) * share.unsqueeze(1)
        gram += size[:, None, None] * share.unsqueeze(2) * share.unsqueeze(1)
        inverse -= share.unsqueeze(2) * row.unsqueeze(1)
    return alone, in_turn


def on_columns(value_RH: Tensor, experts: Experts, offsets_E: Tensor) -> Tensor:
    """Each row's inner products with the columns of its expert's down projection: [R, I]."""
    down_EHI = experts.weights().down
    return grouped_linear(value_RH.to(down_EHI.dtype), down_EHI.transpose(1, 2), offsets_E)


def column_squares(down_EHI: Tensor) -> Tensor:
    """‖w_j‖² of every neuron, [E, I] float64 on the CPU."""
    return down_EHI.square().sum(dim=1, dtype=torch.float64).cpu()


def refuse_norm(block: MoEBlock, what: str) -> None:
    """Raise UnsupportedModelError where a norm follows the experts."""
    experts = block.experts
    if isinstance(experts, FusedExperts) and experts.has_norm:
        raise UnsupportedModelError(
            f"layer {block.layer}: a norm follows its experts, and {what} need outputs that are sums over neurons"
        )


class _ByExpert:
    """Rows [R, I] gathered per expert, [E, I] float64."""

    def __init__(self, experts: int):
        self.experts = experts
        self.total: Tensor | None = None

    def add(self, values_RI: Tensor, expert_R: Tensor, counted_R: Tensor) -> None:
        total = self._there(values_RI)
        step = max(1, _CHUNK_BYTES // (8 * values_RI.shape[1]))
        for rows, experts, counted in zip(*(v.split(step) for v in (values_RI, expert_R, counted_R)), strict=True):
            total.index_add_(0, experts, rows.double() * counted.unsqueeze(1))

    def raise_to(self, values_RI: Tensor, expert_R: Tensor) -> None:
        total = self._there(values_RI)
        total.scatter_reduce_(0, expert_R.unsqueeze(1).expand_as(values_RI), values_RI.double(), "amax")

    def result(self) -> Tensor:
        assert self.total is not None, "no batch was seen"
        return self.total.cpu()

    def _there(self, values_RI: Tensor) -> Tensor:
        if self.total is None:
            shape = (self.experts, values_RI.shape[1])
            self.total = torch.zeros(shape, dtype=torch.float64, device=values_RI.device)
        return self.total
