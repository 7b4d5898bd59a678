"""The passes `skip.top_k`, `skip.ratio`, `skip.top_p`: experts that are there and not always run.

Weights stay as they are. Between router and experts stands a rule (compress/model/rules.py), calibrated to a wanted
number of experts per token; docs/skipping.md says what each is good for.

Letters: S tokens of a sample, K slots per token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.skipping import RandomTruncation, RankedImportance, RankedWeights, TruncationError
from moe_compress.calib.statistics import Statistic
from moe_compress.errors import RecipeError
from moe_compress.model import EXPERTS_KINDS, MoEBlock
from moe_compress.model.fewer import AS_CONFIG, renormalizes
from moe_compress.model.rules import Choice, Ratio, RouteRule, TopK, TopP, executed, importances, make_rule
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register

from .thresholds import allocate_k, median_threshold, ratio_threshold, share_threshold

_TWO_THIRDS = "two thirds of what the layer has, rounded up"


class SkipOptions(PassOptions):
    """What all these passes ask."""

    renormalize: bool = Field(
        default=True, description="Rescale the weights that are left to the sum that the token's weights had"
    )


class AverageOptions(SkipOptions):
    """Of passes that are told how many experts a token may use."""

    experts_per_token: float | None = Field(
        default=None, ge=1, description=f"Wanted average over tokens; by default {_TWO_THIRDS}"
    )


class Skip(Pass):
    """Put a rule between router and experts."""

    accepts = frozenset({"fused", *EXPERTS_KINDS})
    kind: str
    options: SkipOptions

    def statistics(self) -> Sequence[Statistic]:
        """What the rule is calibrated on, and what says how many experts it leaves."""
        return [self.ranked()]

    def ranked(self) -> RankedWeights:
        """The tokens whose weights say how many experts a rule leaves."""
        return RankedWeights()

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Sizes stay. Raises RecipeError where the target runs no rules, or there is nothing to skip."""
        for index, layer in shape.layers.items():
            self.check(index, layer)
        kind = self.kind if self.target.quantized_format == "native" else self.elsewhere(shape)
        return shape.with_layers({i: replace(s, rules=(*s.rules, kind)) for i, s in shape.layers.items()})

    def elsewhere(self, shape: ModelShape) -> str:
        """What the rule is where the target isn't native. Raises RecipeError where the target runs no such thing."""
        raise RecipeError(
            f"{self.name}: the target {self.target.name!r} runs no rules that skip experts: set `target: native`"
        )

    def check(self, index: int, layer: LayerShape) -> None:
        """Raise RecipeError where a layer can't have what is asked."""
        if layer.top_k < 2:
            raise RecipeError(f"{self.name}: layer {index} uses {layer.top_k} expert per token: nothing can be skipped")

    @abstractmethod
    def rule(self, index: int, profile: Profile) -> RouteRule:
        """The rule of one layer."""

    def left(self, index: int, profile: Profile, rule: RouteRule) -> tuple[float, float]:
        """Experts per token on calibration text: before, and with the rule."""
        measured = profile.of(index, self.ranked())
        return experts_left(measured["weights"], measured["norms"], rule, measured.get("received"))

    def plan(self, profile: Profile) -> Plan:
        """A rule for every layer, and what it leaves."""
        layers: dict[int, dict[str, Any]] = {}
        rows = []
        for index in profile.shape.layers:
            rule = self.rule(index, profile)
            before, after = self.left(index, profile, rule)
            layers[index] = {"rule": rule.describe(), "experts_per_token_before": before, "experts_per_token": after}
            settings = {k: v for k, v in rule.describe().items() if k not in ("kind", "renormalize")}
            rows.append({"layer": index, "experts per token": after, **settings})
        summary = {
            "experts_per_token": _mean([d["experts_per_token"] for d in layers.values()]),
            "experts_per_token_before": _mean([d["experts_per_token_before"] for d in layers.values()]),
            "layers": rows,
        }
        return Plan(self.name, layers, summary, self.notes(profile, layers))

    def notes(self, profile: Profile, layers: dict[int, dict[str, Any]]) -> list[str]:
        """What the user should know."""
        return []

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Put the rule in place."""
        block.add_rule(make_rule(decision["rule"]))
        return dict(decision)


class SkipToAverage(Skip):
    """Those that are calibrated to a wanted average."""

    options: AverageOptions

    @property
    def averages(self) -> bool:
        """Whether the wanted average decides, and no setting that was given in its place."""
        return True

    def wanted(self, layer: LayerShape) -> float:
        """Experts per token that a layer may use on average."""
        return self.options.experts_per_token or -(-2 * layer.top_k // 3)

    def check(self, index: int, layer: LayerShape) -> None:
        """Also where more is asked than there is, or nothing would be skipped that nobody asked to keep."""
        super().check(index, layer)
        if self.averages and self.options.experts_per_token is None and self.wanted(layer) == layer.top_k:
            raise RecipeError(
                f"{self.name}: {_TWO_THIRDS} is all of the {layer.top_k} experts that layer {index} uses: give "
                "`experts_per_token`"
            )
        if self.wanted(layer) > layer.top_k:
            raise RecipeError(
                f"{self.name}: experts_per_token is {self.wanted(layer):g}, and layer {index} uses {layer.top_k}"
            )

    def notes(self, profile: Profile, layers: dict[int, dict[str, Any]]) -> list[str]:
        """Where the average isn't what was asked."""
        if not self.averages:
            return []
        found = []
        for index, decision in layers.items():
            wanted, got = self.wanted(profile.shape.layers[index]), decision["experts_per_token"]
            if abs(got - wanted) > 0.005 * wanted:
                found.append(f"layer {index}: {got:.3f} experts per token on calibration text, wanted were {wanted:g}")
        return found


def experts_left(
    weight_SK: Tensor, norm_S: Tensor, rule: RouteRule, received_S: Tensor | None = None
) -> tuple[float, float]:
    """Experts per token before and after a rule that looks at ranked weights, at norms of inputs and at the attention
    that tokens receive alone."""
    slots = torch.arange(weight_SK.shape[1]).expand_as(weight_SK)
    served = executed(slots, weight_SK, weight_SK.shape[1])
    _, after = rule(Choice(norm_S.unsqueeze(-1), slots, weight_SK, weight_SK.shape[1], received_T=received_S))
    left = executed(slots, after, weight_SK.shape[1])
    return float(served.sum()) / len(served), float(left.sum()) / len(served)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


# --- top-k -----------------------------------------------------------------------------------------------------------


class TopKOptions(AverageOptions):
    """Options of `skip.top_k`."""

    layers: Literal["uniform", "error", "random"] = Field(
        default="error",
        description="The same number in every layer; or numbers whose mean is the wanted one, at the least total error "
        "of the layers' routed outputs, on calibration text (beside the hidden state behind the layer; Alloc-MoE) or "
        "on random inputs (LExI)",
    )
    minimum: int = Field(default=1, ge=1, description="Experts per token that every layer keeps")
    seed: int = Field(default=0, ge=0, description="Of random inputs")


@register
class SkipTopK(SkipToAverage):
    """Fewer experts per token, the same for every token of a layer."""

    name = "skip.top_k"
    kind = "top_k"
    summary = "use fewer experts per token, uniformly or per layer by measured error"
    paper = "LExI, arXiv 2509.02753; Alloc-MoE (Alloc-L), arXiv 2604.08133"
    Options = TopKOptions
    options: TopKOptions

    def statistics(self) -> Sequence[Statistic]:
        """The error of every number of experts, unless all layers get the same."""
        return [*super().statistics(), *self._measured()]

    def check(self, index: int, layer: LayerShape) -> None:
        """Also where a number is no number of experts."""
        super().check(index, layer)
        wanted = self.wanted(layer)
        if self.options.layers == "uniform" and wanted != int(wanted):
            raise RecipeError(f"{self.name}: `layers: uniform` takes a whole number of experts, not {wanted:g}")
        if self.options.minimum > wanted:
            raise RecipeError(
                f"{self.name}: minimum is {self.options.minimum}, more than the {wanted:g} that are wanted"
            )

    def elsewhere(self, shape: ModelShape) -> str:
        """A number in config.json, or in the GGUF's metadata, where it is the same for all layers."""
        if self.options.layers != "uniform" or len({s.top_k for s in shape.layers.values()}) > 1:
            raise RecipeError(
                f"{self.name}: the target {self.target.name!r} has one number of experts per token for all layers: set "
                "`layers: uniform`, or `target: native`"
            )
        return AS_CONFIG

    def plan(self, profile: Profile) -> Plan:
        """The program over all layers first."""
        if self.target.quantized_format != "native":
            self._check_sums(profile)
        wanted = {i: self.wanted(layer) for i, layer in profile.shape.layers.items()}
        self._counts = {i: int(k) for i, k in wanted.items()}
        if self.options.layers != "uniform":
            self._counts = allocate_k(self._costs(profile), _mean([*wanted.values()]), self.options.minimum)
        return super().plan(profile)

    def rule(self, index: int, profile: Profile) -> RouteRule:
        """See Skip."""
        return TopK(self._counts[index], self.options.renormalize)

    def notes(self, profile: Profile, layers: dict[int, dict[str, Any]]) -> list[str]:
        """What layers were compared by, if not by what is best."""
        if self.options.layers == "error" and not self._relative(profile):
            return ["layers return no hidden state per token: errors are relative to the routed outputs instead"]
        return []

    def _check_sums(self, profile: Profile) -> None:
        """Raise RecipeError where a smaller top-k in config.json would weigh experts differently from the rule."""
        for index in profile.shape.layers:
            found = renormalizes(profile.of(index, RankedWeights())["weights"])
            if found != self.options.renormalize:
                does = "normalises" if found else "doesn't normalise"
                raise RecipeError(
                    f"{self.name}: this family {does} the weights of the chosen experts (layer {index}), and "
                    f"{self.target.name!r} runs what the family does: set `renormalize: {str(found).lower()}`"
                )

    def _measured(self) -> list[Statistic]:
        renormalize = self.options.renormalize
        if self.options.layers == "uniform":
            return []
        if self.options.layers == "error":
            return [TruncationError(renormalize)]
        return [RandomTruncation(renormalize, seed=self.options.seed)]

    def _relative(self, profile: Profile) -> bool:
        return all("relative" in profile.of(i, self._measured()[0]) for i in profile.shape.layers)

    def _costs(self, profile: Profile) -> dict[int, list[float]]:
        """Layer → cost of each number of experts: relative squared error, or (LExI) the norm on random inputs."""
        found = {i: profile.of(i, self._measured()[0]) for i in profile.shape.layers}
        if self.options.layers == "random":
            return {i: result["error"].sqrt().tolist() for i, result in found.items()}
        if self._relative(profile):
            return {i: result["relative"].tolist() for i, result in found.items()}
        return {i: (result["error"] / result["energy"].clamp_min(1e-300)).tolist() for i, result in found.items()}


# --- by the weights --------------------------------------------------------------------------------------------------


class RatioOptions(AverageOptions):
    """Options of `skip.ratio`."""

    threshold: float | Literal["average", "median"] = Field(
        default="average",
        description="Least share of the token's largest weight that an expert needs: found for the wanted average; "
        "NAEE's median of second over first weight; or a number",
    )
    protect: Literal["none", "norm", "attention"] = Field(
        default="none",
        description="Tokens that keep all their experts: those whose input has the largest L1 norm, or (ODP) that norm "
        "times the attention that they receive from the tokens behind them. The latter reads the text as a whole: "
        "while a model writes, one token at a time, none is protected",
    )
    protected: float = Field(default=0.02, gt=0, lt=1, description="Share of tokens that `protect` means")


@register
class SkipRatio(SkipToAverage):
    """Skip experts whose weight is small beside the token's largest."""

    name = "skip.ratio"
    kind = "ratio"
    summary = "skip experts whose weight is small beside the token's largest"
    paper = "NAEE, arXiv 2402.14800 (dynamic skipping, here for any top-k); ODP, arXiv 2410.06270 (protect)"
    Options = RatioOptions
    options: RatioOptions

    @property
    def averages(self) -> bool:
        """See SkipToAverage."""
        return self.options.threshold == "average"

    def check(self, index: int, layer: LayerShape) -> None:
        """Also where two things decide the same."""
        super().check(index, layer)
        if not self.averages and self.options.experts_per_token is not None:
            raise RecipeError(
                f"{self.name}: only `threshold: average` reaches `experts_per_token`: leave one of them out"
            )

    def ranked(self) -> RankedWeights:
        """See Skip."""
        return RankedImportance() if self.options.protect == "attention" else RankedWeights()

    def rule(self, index: int, profile: Profile) -> RouteRule:
        """See Skip."""
        measured = profile.of(index, self.ranked())
        weights = measured["weights"]
        protect, safe = None, torch.zeros(len(weights), dtype=torch.bool)
        if self.options.protect != "none":
            importance = importances(measured["norms"], measured.get("received"))
            count = max(1, round(self.options.protected * len(importance)))
            protect = float(importance.sort(descending=True).values[count - 1])
            safe = importance >= protect
        threshold = self.options.threshold
        if threshold == "average":
            threshold = ratio_threshold(weights, safe, self.wanted(profile.shape.layers[index]))
        elif threshold == "median":
            threshold = median_threshold(weights)
        by = "attention" if self.options.protect == "attention" else "norm"
        return Ratio(float(threshold), protect, self.options.renormalize, by)


class TopPOptions(AverageOptions):
    """Options of `skip.top_p`."""

    share: float | None = Field(
        default=None, gt=0, le=1, description="Of the token's weights, instead of one found for the wanted average"
    )


@register
class SkipTopP(SkipToAverage):
    """The fewest experts that hold a share of the token's weights."""

    name = "skip.top_p"
    kind = "top_p"
    summary = "use the fewest experts that hold a share of the token's routing weights"
    paper = "Dynamic_MoE, arXiv 2403.07652 (at inference, over the experts that the router chose)"
    Options = TopPOptions
    options: TopPOptions

    @property
    def averages(self) -> bool:
        """See SkipToAverage."""
        return self.options.share is None

    def check(self, index: int, layer: LayerShape) -> None:
        """Also where two things decide the same."""
        super().check(index, layer)
        if not self.averages and self.options.experts_per_token is not None:
            raise RecipeError(f"{self.name}: `share` decides how many experts run: leave `experts_per_token` out")

    def rule(self, index: int, profile: Profile) -> RouteRule:
        """See Skip."""
        share = self.options.share
        if share is None:
            weights = profile.of(index, RankedWeights())["weights"]
            share = share_threshold(weights, self.wanted(profile.shape.layers[index]))
        return TopP(share, self.options.renormalize)
