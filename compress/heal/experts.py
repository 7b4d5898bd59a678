"""The pass `heal.experts`: train each layer's experts to put out what the original's did, one layer after another.

After pruning, merging or zeros inside experts. Each layer reads what the healed layers before it hand on; a layer whose
held-out tokens gain nothing stays as it was, bit for bit. Two layers are in memory, the original's and the changed one,
and an optimizer's state of one (distil.py).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_compress.calib.batches import held_out
from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.errors import RunError, UnsupportedModelError
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass, PassOptions, Plan, register

from .distil import Wanted, distil


class ExpertOptions(PassOptions):
    """Options of `heal.experts`."""

    reads: Literal["own", "same"] = Field(
        default="own",
        description="What the original's block reads, to say what is wanted: what its own layers hand on, "
        "or the same as the changed block reads",
    )
    epochs: int = Field(default=4, ge=1, description="Times that the tokens are gone through")
    rate: float = Field(
        default=0.01, gt=0, description="AdamW's first step, relative to the root mean square of each projection"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's, per step and rate")
    tokens_per_step: int = Field(default=512, ge=1, description="Tokens of one step")
    projections: list[Literal["gate", "up", "down"]] = Field(
        default=["gate", "up", "down"], min_length=1, description="Which matrices of an expert are trained"
    )
    keep_zeros: bool | None = Field(
        default=None,
        description="Whether weights that are zero stay zero; default: in each matrix of which a tenth is zero",
    )
    held_out: float = Field(default=0.125, gt=0, lt=1, description="Share of the sequences that judges, never teaches")
    seed: int = Field(default=0, ge=0, description="Order of the tokens")


# Share of zeros from which they are taken for a pattern that somebody wants.
_PATTERN = 0.1


@register
class HealExperts(Pass):
    """Train experts towards the original, layer by layer."""

    name = "heal.experts"
    summary = "train each layer's experts, after pruning or merging, to put out what the original's did"
    paper = "expert-wise distillation as in MoE-Pruner, arXiv 2410.12013, here block by block and streamed"
    Options = ExpertOptions
    options: ExpertOptions

    def needs_inputs(self) -> bool:
        """They are trained on what they read."""
        return True

    def beside_original(self) -> Literal["own", "same"]:
        """What is wanted of them."""
        return self.options.reads

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Nothing changes in size."""
        return shape

    def plan(self, profile: Profile) -> Plan:
        """The same for every layer."""
        return Plan(self.name, {index: {} for index in profile.shape.layers})

    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Train one layer's experts. Errors are of the experts' output, squared, relative to what is wanted."""
        if inputs is None or inputs.original_TH is None:
            raise RunError("heal.experts needs what the experts read, and what the original's put out")
        sequence_T = inputs.sequence_T
        if sequence_T is None or len(inputs.original_TH) != inputs.tokens:
            raise UnsupportedModelError(
                f"layer {block.layer}: its experts see other tokens than the sequences hold, so none can be held out"
            )
        experts = FusedExperts(block.experts_module)
        weights = experts.weights()
        projections = [name for name, _ in weights.matrices() if name in self.options.projections]
        held = torch.tensor(held_out(int(sequence_T.max()) + 1, self.options.held_out))
        counted_T = inputs.token_weight_T
        ones_T = torch.ones(inputs.tokens, dtype=torch.float64, device=inputs.hidden_TH.device)
        wanted = Wanted(
            inputs.hidden_TH,
            inputs.index_TK,
            inputs.weight_TK,
            inputs.original_TH,
            ones_T if counted_T is None else counted_T,
        )
        zeros = self._zeros(dict(weights.matrices()))
        share = [_share_of_zeros(weights)]
        done = distil(
            experts,
            wanted,
            torch.isin(sequence_T.cpu(), held).to(inputs.hidden_TH.device),
            zeros,
            {name: _stored(block, name, inputs) for name in projections},
            self.options,
            projections,
        )
        share.append(_share_of_zeros(weights))
        return {
            "error_before": done.held[0],
            "error_after": done.held[1],
            "taught_error_before": done.taught[0],
            "taught_error_after": done.taught[1],
            "kept": done.kept,
            "zeros_before": share[0],
            "zeros_after": share[1],
            "experts": [{"moved": moved} for moved in done.moved_E],
        }

    def _zeros(self, matrices: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where weights stay zero, by projection."""
        if self.options.keep_zeros is False:
            return {}
        found = {name: value == 0 for name, value in matrices.items()}
        if self.options.keep_zeros is None:
            found = {n: z & (z.double().mean(dim=(1, 2), keepdim=True) >= _PATTERN) for n, z in found.items()}
        return {name: zero for name, zero in found.items() if bool(zero.any())}


def _share_of_zeros(weights: ExpertWeights) -> float:
    return sum(int((value == 0).sum()) for _, value in weights.matrices()) / weights.parameters


def _stored(block: MoEBlock, projection: str, inputs: BlockInputs) -> torch.dtype:
    """The dtype in which a projection will be stored: gate and up are one tensor, where there is a gate."""
    module = block.experts_module
    name = f"{projection}_proj" if projection == "down" or not hasattr(module, "gate_up_proj") else "gate_up_proj"
    value: Tensor = getattr(module, name)
    return inputs.stored.get(f"{block.path}.{name}", value.dtype)
