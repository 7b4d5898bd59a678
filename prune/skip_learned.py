"""The pass `skip.learned`: a small router per layer that says how many of its chosen experts a token runs.

Layer by layer: each is taught on what reaches it through the layers before it, which skip already, towards what its
block makes of the same inputs with all experts. Nothing else is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.skipping import RankedWeights, prefix_errors
from moe_compress.calib.statistics import Statistic, evenly
from moe_compress.model import MoEBlock
from moe_compress.model.experts import run_experts
from moe_compress.model.rules import Choice, Learned, RouteRule, executed, learned_features, ranked
from moe_compress.model.shape import ModelShape
from moe_compress.passes import register

from .otp import train_prefixes
from .skip import AverageOptions, SkipToAverage

# Tokens that run through all their experts at a time.
_CHUNK = 2048


class LearnedOptions(AverageOptions):
    """Options of `skip.learned`."""

    epochs: int = Field(default=20, ge=1, description="Times that the tokens are gone through")
    rate: float = Field(default=0.01, gt=0, description="Adam's step")
    batch: int = Field(default=512, ge=1, description="Tokens of one step")
    tokens: int = Field(default=1 << 14, ge=1, description="Calibration tokens that teach, evenly from all")
    seed: int = Field(default=0, ge=0, description="Order of the tokens, and noise")


@register
class SkipLearned(SkipToAverage):
    """Learn how many experts a token needs."""

    name = "skip.learned"
    kind = "learned"
    summary = "learn a small router per layer that says how many of its experts a token needs"
    paper = "OTP in MC#, arXiv 2510.10962"
    Options = LearnedOptions
    options: LearnedOptions

    def statistics(self) -> Sequence[Statistic]:
        """None but how many experts there are to skip."""
        return [RankedWeights()]

    def needs_inputs(self) -> bool:
        """What it learns on."""
        return True

    def forecast(self, shape: ModelShape) -> ModelShape:
        """The small routers are float32."""
        shape = super().forecast(shape)
        added = sum(4 * s.top_k * (s.hidden + s.top_k + 1) for s in shape.layers.values())
        return replace(shape, other_bytes=shape.other_bytes + added)

    def rule(self, index: int, profile: Profile) -> RouteRule:
        """Its settings; what it learns comes when the layer is changed."""
        layer = profile.shape.layers[index]
        return Learned(layer.hidden, layer.top_k, self.options.renormalize)

    def left(self, index: int, profile: Profile, rule: RouteRule) -> tuple[float, float]:
        """The average is set on the tokens that teach, after teaching."""
        weights = profile.of(index, RankedWeights())["weights"]
        before = float((weights > 0).sum()) / len(weights)
        return before, min(before, self.wanted(profile.shape.layers[index]))

    def notes(self, profile: Profile, layers: dict[int, dict[str, Any]]) -> list[str]:
        """What is reached is in the layers' reports."""
        return []

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Teach, and put the rule in place."""
        assert inputs is not None
        options = self.options
        wanted = decision["experts_per_token"]
        taken = evenly(0, inputs.tokens, options.tokens, inputs.tokens).to(inputs.hidden_TH.device)
        choice = Choice(inputs.hidden_TH[taken], inputs.index_TK[taken], inputs.weight_TK[taken], block.num_experts)
        served = executed(choice.index_TK, choice.weight_TK, choice.experts)
        choice = choice._replace(weight_TK=choice.weight_TK * served)
        error_TK, energy_T = _errors(block, choice, options.renormalize)
        features_TF = learned_features(choice.hidden_TH, ranked(choice.weight_TK)[0]).cpu()
        weight, bias = train_prefixes(
            features_TF,
            error_TK,
            wanted,
            epochs=options.epochs,
            rate=options.rate,
            batch=options.batch,
            seed=options.seed,
        )
        rule = Learned(choice.hidden_TH.shape[1], choice.weight_TK.shape[1], options.renormalize)
        device = inputs.hidden_TH.device
        rule.weight = nn.Parameter(weight.to(device), requires_grad=False)
        rule.bias = nn.Parameter(bias.to(device), requires_grad=False)
        block.add_rule(rule)
        _, after = rule(choice)
        kept_T = executed(choice.index_TK, after, choice.experts).sum(-1).cpu()
        left = error_TK.gather(1, (kept_T - 1).clamp_min(0).unsqueeze(1))
        return {
            **decision,
            "rule": rule.describe(),
            "experts_per_token": float(kept_T.double().mean()),
            "relative_error": float(left.sum() / energy_T.sum().clamp_min(1e-300)),
        }


def _errors(block: MoEBlock, choice: Choice, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`prefix_errors` of many tokens, a chunk at a time, on the CPU."""
    found = []
    with torch.no_grad():
        for rows in torch.arange(len(choice.hidden_TH), device=choice.hidden_TH.device).split(_CHUNK):
            weight_TK = choice.weight_TK[rows]
            _, dispatch, _, output_RH = run_experts(
                block.experts, choice.hidden_TH[rows], choice.index_TK[rows], weight_TK
            )
            found.append(prefix_errors(dispatch, output_RH, weight_TK, renormalize))
    errors, energies = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return errors, energies
