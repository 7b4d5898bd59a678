"""What weights and routing alone say of how much precision something deserves: statistics behind score-driven costs.

Letters: E experts, M matrices of an expert (gate, up, down), O and K output and input features, N eigenvalues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.statistics import Accumulator, Result, Statistic
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import FusedExperts, MoEBlock, Tap

# Blocks of weights in float32, and their Gram matrices, made at a time.
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class WeightSpectrum(Statistic):
    """Heavy tails of the experts' matrices (AlphaQ, arXiv 2606.04980).

    Result: `alpha` [E, M] Hill's estimate of the power-law exponent of a matrix' squared singular values, and
    `variance` [E, M] the population variance of its entries. The spectrum is that of blocks of `block` × `block`
    (smaller where the matrix is), side by side, at most `sample` of them, the same for all matrices of a shape; what
    is left over at the edges is not looked at. Of N eigenvalues together the k = max(10, ⌊tail·N⌋) largest are the
    tail, and alpha = 1 + k / Σ ln(λ_i / λ_{k+1}). Reads weights only.
    """

    name: ClassVar[str] = "weight_spectrum"
    weighs_tokens: ClassVar[bool] = True  # no token is read
    reads_text: ClassVar[bool] = False
    block: int = 128
    sample: int = 256
    tail: float = 0.1

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Spectra(self, experts_of(block))


class _Spectra(Accumulator):
    def __init__(self, settings: WeightSpectrum, experts: FusedExperts):
        self.settings, self.experts = settings, experts

    def update(self, tap: Tap) -> None:
        """Nothing of the text matters."""

    def result(self) -> Result:
        matrices = [matrix for _, matrix in self.experts.weights().matrices()]
        own = self.settings
        alpha = [hill(spectrum(m, own.block, own.sample), own.tail) for m in matrices]
        variance = [torch.stack([w.double().var(correction=0) for w in m]) for m in matrices]
        return {"alpha": torch.stack(alpha, 1).cpu(), "variance": torch.stack(variance, 1).cpu()}


def spectrum(weight_EOK: Tensor, block: int, sample: int) -> Tensor:
    """Squared singular values of blocks of each matrix, all together, [E, N] float64, in no order."""
    height, width = (min(block, side) for side in weight_EOK.shape[1:])
    down, right = (side // step for side, step in zip(weight_EOK.shape[1:], (height, width), strict=True))
    order = torch.randperm(down * right, generator=torch.Generator().manual_seed(0))[:sample].sort().values
    rows, columns = order // right * height, order % right * width
    experts = max(1, _CHUNK_BYTES // (4 * len(order) * (height * width + min(height, width) ** 2)))
    found = []
    for part in weight_EOK.split(experts):
        places = zip(rows.tolist(), columns.tolist(), strict=True)
        blocks = torch.stack([part[:, r : r + height, c : c + width].float() for r, c in places], 1)
        blocks = blocks if height <= width else blocks.mT
        found.append(torch.linalg.eigvalsh(blocks @ blocks.mT).double().flatten(1))
    return torch.cat(found).clamp_min(0)


def hill(eigenvalues_EN: Tensor, tail: float) -> Tensor:
    """Hill's estimate of the exponent for each row, [E]; where the tail is flat, a very large number."""
    number = eigenvalues_EN.shape[1]
    k = min(max(10, int(tail * number)), number - 1)
    top = eigenvalues_EN.sort(dim=1, descending=True).values[:, : k + 1].clamp_min(torch.finfo(torch.float32).tiny)
    logs = top.log()
    return 1 + k / (logs[:, :k] - logs[:, k:]).sum(dim=1).clamp_min(1e-9)


@dataclass(frozen=True)
class WeightOutliers(Statistic):
    """How far single weights stand out of their input channel (QuantMoE-Bench, arXiv 2406.08155, outlier scorer).

    Result: `score` [E, M] max over input channels j of max_i |W_ij| / mean_i |W_ij|. Reads weights only.
    """

    name: ClassVar[str] = "weight_outliers"
    weighs_tokens: ClassVar[bool] = True  # no token is read
    reads_text: ClassVar[bool] = False

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Outliers(experts_of(block))


class _Outliers(Accumulator):
    def __init__(self, experts: FusedExperts):
        self.experts = experts

    def update(self, tap: Tap) -> None:
        """Nothing of the text matters."""

    def result(self) -> Result:
        matrices = self.experts.weights().matrices()
        scores = [torch.stack([_outlier(matrix) for matrix in stacked]) for _, stacked in matrices]
        return {"score": torch.stack(scores, dim=1).double().cpu()}


def _outlier(weight_OK: Tensor) -> Tensor:
    size = weight_OK.float().abs()
    return (size.amax(dim=0) / size.mean(dim=0).clamp_min(torch.finfo(torch.float32).tiny)).amax()


@dataclass(frozen=True)
class BlockTurn(Statistic):
    """How far a block's experts turn the residual stream (QuantMoE-Bench, arXiv 2406.08155, block importance).

    Result: `importance` [] 1 − mean over tokens of cos(h_t − y_t, h_t), h the hidden state behind the decoder layer, y
    what the experts add. The paper trains a network per block that predicts this cosine; here it is measured.
    Raises UnsupportedModelError, while measuring, where the layer doesn't return one vector per token of that size.
    """

    name: ClassVar[str] = "block_turn"

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Turns()


class _Turns(Accumulator):
    def __init__(self) -> None:
        self.cosine, self.tokens = 0.0, 0

    def update(self, tap: Tap) -> None:
        behind = tap.behind_TH
        if behind is None or behind.shape != tap.output_TH.shape:
            raise UnsupportedModelError(
                f"layer {tap.layer}: the cost block_importance needs one hidden state per token behind the layer, as "
                "wide as what the experts put out; this family has none"
            )
        behind = behind.double()
        cosine_T = torch.cosine_similarity(behind - tap.output_TH.double(), behind, dim=-1, eps=1e-30)
        self.cosine += float(cosine_T.sum())
        self.tokens += len(cosine_T)

    def result(self) -> Result:
        return {"importance": torch.tensor(1 - self.cosine / max(1, self.tokens), dtype=torch.float64)}


def experts_of(block: MoEBlock) -> FusedExperts:
    """View of a block's experts, whose weights may be read once the layer's are there.

    Raises UnsupportedModelError where they aren't dense.
    """
    if block.kind != "fused":
        raise UnsupportedModelError(f"layer {block.layer}: its experts are {block.kind} already")
    return FusedExperts(block.experts_module)
