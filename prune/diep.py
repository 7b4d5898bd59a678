"""The criterion `diep`: one mix of all experts for all tokens, learned so that it comes nearest to the block's output.

What has to be known of the text are inner products between outputs, so they are measured once, one layer in memory, and
the learning itself runs no model. Letters: T tokens, E experts, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.statistics import Accumulator, Result, Statistic, all_outputs, evenly
from moe_compress.errors import RunError
from moe_compress.model import MoEBlock, Tap

from .criteria import Measured, Selection, criterion

# Rounds, Adam's steps on α in each (the paper's three to one on β), and the first of their sizes: enough that the error
# comes within a thousandth of the least there is.
_ROUNDS, _STEPS, _RATE = 500, 3, 0.1
# A mix that points away from the output keeps this share of its size, else α would have no gradient.
_LEAST = 1e-3


@dataclass(frozen=True)
class MixtureMoments(Statistic):
    """What the squared error of any fixed mix of all experts is made of.

    Result, float64, sums over tokens: `gram` [E, E] Σ_t ⟨f_i(x_t), f_j(x_t)⟩; `cross` [E] Σ_t ⟨f_e(x_t), y_t⟩, y_t what
    the routed experts put out; `energy` [] Σ_t ‖y_t‖². So Σ_t ‖Σ_e w_e·f_e(x_t) − y_t‖² = wᵀ·gram·w − 2·wᵀ·cross +
    energy for any w [E]. Every expert runs on these tokens, so only a sample is taken, T·E²·H multiplications; each
    token counts as much as it weighs.

    Attributes:
        sample: tokens per layer, taken evenly from all batches.
        chunk: tokens that all experts run on at a time (memory: E·chunk·H·8 bytes).
    """

    name: ClassVar[str] = "mixture_moments"
    weighs_tokens: ClassVar[bool] = True
    sample: int = 1024
    chunk: int = 64

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _MixtureSums(self, block.num_experts, tokens)


class _MixtureSums(Accumulator):
    def __init__(self, settings: MixtureMoments, experts: int, tokens: int):
        self.settings, self.tokens = settings, tokens
        self.seen = 0
        self.gram = torch.zeros(experts, experts, dtype=torch.float64)
        self.cross = torch.zeros(experts, dtype=torch.float64)
        self.energy = torch.zeros((), dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        count = len(tap.hidden_TH)
        taken = evenly(self.seen, count, self.settings.sample, self.tokens).to(tap.hidden_TH.device)
        self.seen += count
        chosen = (tap.hidden_TH[taken], tap.output_TH[taken], tap.counted_T[taken])
        for hidden, output, counted in zip(*(rows.split(self.settings.chunk) for rows in chosen), strict=True):
            if not len(hidden):
                continue
            root_T1 = counted.sqrt().unsqueeze(1)
            each_EN = (all_outputs(tap, hidden).double() * root_T1).flatten(1)  # N: all channels of all tokens
            whole_N = (output.double() * root_T1).flatten()
            self.gram += (each_EN @ each_EN.T).cpu()
            self.cross += (each_EN @ whole_N).cpu()
            self.energy += whole_N.square().sum().cpu()

    def result(self) -> Result:
        return {"gram": self.gram, "cross": self.cross, "energy": self.energy}


def error_of(alpha_E: Tensor, beta: float, moments: Result) -> tuple[Tensor, Tensor]:
    """‖Y' − Y‖_F / ‖Y‖_F for Y' = β·Σ_e softmax(α)_e·f_e(X), and its gradient by α [E]."""
    gram, cross, energy = (moments[key] for key in ("gram", "cross", "energy"))
    mix_E = alpha_E.softmax(dim=0)
    through_E = gram @ mix_E
    squared = beta**2 * (mix_E @ through_E) - 2 * beta * (mix_E @ cross) + energy
    error = (squared / energy).clamp_min(1e-30).sqrt()
    by_mix_E = beta * (beta * through_E - cross) / (error * energy)
    return error, mix_E * (by_mix_E - mix_E @ by_mix_E)


def learn_mix(moments: Result) -> tuple[Tensor, float]:
    """α [E] and β of the mix that comes nearest to the output: Adam on α from zero, β at its best every three steps.

    As β·softmax(α) is any vector of positive numbers, this is non-negative least squares, and has no other minima. An
    expert that the best mix leaves out gets ever less, the sooner the more it harms.
    """
    gram, cross, energy = (moments[key].double() for key in ("gram", "cross", "energy"))
    exact = {"gram": gram, "cross": cross, "energy": energy}
    alpha_E = torch.zeros(len(cross), dtype=torch.float64)
    adam = torch.optim.Adam([alpha_E], lr=_RATE, foreach=False)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, _ROUNDS)
    beta = _best_scale(alpha_E, exact)
    for _ in range(_ROUNDS):
        for _ in range(_STEPS):
            alpha_E.grad = error_of(alpha_E, beta, exact)[1]
            adam.step()
        beta = _best_scale(alpha_E, exact)
        cosine.step()
    return alpha_E, beta


def _best_scale(alpha_E: Tensor, moments: Result) -> float:
    mix_E = alpha_E.softmax(dim=0)
    size = float(mix_E @ moments["gram"] @ mix_E)
    if size <= 0:
        return 1.0
    least = _LEAST * math.sqrt(float(moments["energy"]) / size)
    best: float = float(mix_E @ moments["cross"]) / size
    return max(best, least)


@criterion(
    "diep",
    "DiEP (arXiv 2509.16105), layer by layer: β·softmax(α)_e, all experts mixed by softmax(α), for all tokens alike, "
    "in place of the router, and α, β learned on its reconstruction term ‖β·Σ_e softmax(α)_e·f_e(X) − Y‖_F",
    MixtureMoments(),
    comparable=True,
)
def diep(measured: Measured, _: Selection) -> Tensor:
    """Each expert's part β·softmax(α)_e in the mix; 0 for one that puts out nothing, which has no gradient.

    Differs from the paper: of its loss CE + 0.01·‖F' − F‖_F the second term alone, which is a layer's own (the first
    needs the whole model, with all experts of all layers running); so layers are learned one by one, each on what it
    reads in the model as it is. β takes its best value where the paper takes a gradient step. As there, layers compete
    by these scores (scope: global).
    """
    moments = measured["mixture_moments"]
    if not float(moments["energy"]) > 0:
        raise RunError(
            "criterion 'diep': a layer's experts put out nothing on the calibration text, so no mix is better"
        )
    alpha_E, beta = learn_mix(moments)
    return beta * alpha_E.softmax(dim=0) * (moments["gram"].diagonal() > 0)
