"""Options of the merging passes, and what papers set them to."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moe_compress.counts import ExpertCounts
from moe_compress.passes import PresetOptions
from moe_compress.refit import Ridge

# Members of a group by `cluster: ream`, by default: one expert, and 16 that it takes.
REAM_SIZE = 17

# What a paper's method is in terms of the options. Where a paper leaves the router's rows in place and lets several of
# them lead to one expert, the nearest that every runtime loads is named; `router: remap` beside it is the paper's own.
PRESETS: dict[str, dict[str, Any]] = {
    "hc-smoe": {  # arXiv 2410.08589, section 3.2, on the cosine of outputs instead of the distance of mean outputs
        "grouping": "output",
        "cluster": "average",
        "weight": "frequency",
        "router": "weighted",
        "align": "none",
        "refit": "none",
    },
    "sub-moe": {  # arXiv 2506.23266, section 3.1
        "grouping": "output",
        "cluster": "kmeans",
        "weight": "frequency",
        "router": "weighted",
        "align": "none",
        "refit": "none",
    },
    "m-smoe": {  # arXiv 2310.01334, section 3.1, the same number of experts in every layer
        "grouping": "router",
        "cluster": "dominant",
        "weight": "frequency",
        "router": "dominant",
        "align": "weights",
        "refit": "none",
    },
    "mergemoe": {  # arXiv 2510.14436
        "grouping": "weights",
        "cluster": "dominant",
        "weight": "frequency",
        "router": "weighted",
        "align": "none",
        "refit": "mean",
        "ridge": 1e-4,  # the paper's pseudoinverse, as far as few tokens allow
    },
    "uncurl": {  # arXiv 2409.01483, with k-means for its spectral clustering; the row is a choice of this package's
        "grouping": "router",
        "cluster": "kmeans",
        "weight": "frequency",
        "router": "weighted",
        "align": "weights",
        "refit": "none",
    },
    "ream": {  # arXiv 2604.04356, section 3, similarity of outputs without the router's part
        "grouping": "output",
        "cluster": "ream",
        "weight": "reap",
        "router": "dominant",
        "align": "activations",
        "refit": "none",
    },
}


# The same for merge.zip.
ZIP_PRESETS: dict[str, dict[str, Any]] = {
    "zipit": {  # arXiv 2305.03053, section 4, on groups as HC-SMoE (2410.08589, section 3.3) forms them for it
        "grouping": "output",
        "cluster": "average",
        "weight": "equal",
        "router": "weighted",
        "refit": "none",
    },
}


class MergeOptions(PresetOptions, ExpertCounts):
    """Options of all merging passes; `preset` replaces the defaults of those that are not given."""

    presets: ClassVar = PRESETS

    preset: Literal["hc-smoe", "sub-moe", "m-smoe", "mergemoe", "uncurl", "ream"] | None = Field(
        default=None, description="A paper's setting, for all of the options below that are not given"
    )
    grouping: Literal["output", "router", "weights", "coactivation"] = Field(
        default="output",
        description="Experts are alike by the cosine of: outputs on the same tokens, router logits over tokens, "
        "weights (neurons as they are numbered), or the tokens that they are chosen for",
    )
    cluster: Literal["kmeans", "average", "complete", "ward", "dominant", "absorb", "ream"] = Field(
        default="ream",
        description="kmeans, or hierarchical clustering by that linkage; dominant: the most used experts stay, each "
        "other joins the one most like it; absorb: the same with the experts that REAP scores highest; ream: these, "
        "the highest first, take those most like them, up to `max_group`",
    )
    max_group: int | None = Field(
        default=None,
        ge=1,
        description="Experts that a group has at the most (default: any number; with cluster: ream 17, one that takes "
        "16); others join what is next best",
    )
    scope: Literal["uniform", "global"] = Field(
        default="uniform",
        description="uniform: the same number of experts in every layer; global: as many in all, most where merging "
        "them would lose most of the layer's output, beside the hidden state (target: native)",
    )
    minimum: int | None = Field(
        default=None,
        ge=1,
        description="scope: global: experts that a layer keeps at the least; default: twice the top-k",
    )
    weight: Literal["frequency", "gate", "equal", "reap", "energy", "fisher"] = Field(
        default="energy",
        description="Weights of a group's members: tokens routed to them, routing weight, equal, REAP's score, or "
        "the energy of their weighted outputs; fisher: every single weight by its own Fisher information (a backward "
        "sweep; what is kept of it is as large as the model's experts)",
    )
    router: Literal["weighted", "dominant", "mean", "folded", "remap"] = Field(
        default="dominant",
        description="The group's router row: rows by weight, the dominant member's row, or the mean; folded: the "
        "dominant member's row, and on its logit's bias log Σ exp of the members' (families without one are told); "
        "remap: all rows stay as they are and lead to their expert's group, the weights of a token's duplicates summed "
        "(target: native)",
    )
    align: Literal["none", "weights", "activations"] = Field(
        default="activations",
        description="Reorder members' neurons like the dominant member's before averaging: by inner products of "
        "weights, or by correlation of activations",
    )
    assignment: Literal["exact", "approximate"] = Field(
        default="exact",
        description="How neurons are matched: the best matching (CPU, pair by pair), or one near it, all pairs at once",
    )
    refit: Literal["none", "down", "mean", "layer"] = Field(
        default="layer",
        description="Solve down projections again on the calibration tokens: down: merged experts' outputs like their "
        "members' on the tokens routed to them; mean: like the members' weighted mean on a sample of all tokens; "
        "layer: all experts together, for the layer's output as it was",
    )
    ridge: Ridge = 0.25
    sample: int = Field(default=1024, ge=1, description="Tokens per layer on which outputs and neurons are compared")
    protect_super_experts: bool = Field(default=True, description="Experts with massive activations stay as they are")
    seed: int = Field(default=0, description="Seed of the k-means starts")

    @model_validator(mode="after")
    def _of_scope(self) -> Self:
        if self.minimum is not None and self.scope == "uniform":
            raise ValueError("`minimum` belongs to scope: global; in a uniform plan every layer keeps the same number")
        return self

    @property
    def bound(self) -> int | None:
        """Experts that a group has at the most, None for any number."""
        return REAM_SIZE if self.max_group is None and self.cluster == "ream" else self.max_group


class ZipOptions(MergeOptions):
    """Options of `merge.zip`."""

    presets: ClassVar = ZIP_PRESETS

    preset: Literal["zipit"] | None = Field(  # type: ignore[assignment]
        default=None, description="A paper's setting, for all of the options below that are not given"
    )
    weight: Literal["frequency", "gate", "equal", "reap", "energy"] = Field(  # type: ignore[assignment]
        default="energy", description="Weights of a group's members, as in merge.average, for whole members"
    )
    align: Literal["none"] = Field(  # type: ignore[assignment]
        default="none", description="Neurons find each other while they are joined"
    )


class SubspaceOptions(MergeOptions):
    """Options of `merge.subspace`."""

    weight: Literal["frequency", "gate", "equal", "reap", "energy"] = Field(  # type: ignore[assignment]
        default="energy", description="Weights of a group's members, as in merge.average, for whole members"
    )

    rank: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the joint output subspace that is kept (saves no bytes: weights stay dense)",
    )
    whiten: bool = Field(
        default=True, description="Find the subspace from the members' outputs on their tokens, not from the weights"
    )
