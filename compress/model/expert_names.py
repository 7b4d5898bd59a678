"""What the experts of a layer are called on disk, one by one.

transformers stacks all experts of a layer in two tensors; most families store them one by one, under names of their
own (`mlp.experts.3.gate_proj.weight`, `block_sparse_moe.experts.3.w1.weight`). No table says which: small tensors with
a number of its own for every expert and projection are sent through the checkpoint's own conversion, and where each
number comes out is the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .block import MoEBlock
from .experts import FusedExperts

# Sizes of the small tensors: different ones, so that a transposed matrix is seen.
_HIDDEN, _NEURONS = 3, 2


@dataclass(frozen=True)
class ExpertNames:
    """Names of a layer's expert projections, each a linear layer of its own.

    Attributes:
        experts: module path of the experts on disk ("model.layers.0.mlp.experts").
        leaves: projection ("gate", "up", "down") → last part of its name ("gate_proj", or "w1").
    """

    experts: str
    leaves: dict[str, str]

    def linear(self, expert: int, projection: str) -> str:
        """Module path of one expert's projection; its dense tensor is this and ".weight"."""
        return f"{self.experts}.{expert}.{self.leaves[projection]}"


def find_expert_names(
    block: MoEBlock, prefix: str, count: int, to_disk: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> ExpertNames | None:
    """How a layer's experts are called one by one, or None where they are stored together.

    Args:
        block: its experts may be fused or packed; only their layout is read.
        prefix: what stands before the names of the layer's tensors ("model.layers.0.").
        count: number of experts.
        to_disk: runtime tensors → tensors as the checkpoint holds them.
    """
    module = block.experts_module
    view: FusedExperts = getattr(module, "_original", None) or FusedExperts(module)
    projections = ["gate", "up", "down"] if view.has_gate else ["up", "down"]
    found: dict[str, str] = {}
    try:
        stored = to_disk({f"{prefix}{block.path}.{n}": t for n, t in numbered(view, count).items()})
    except (RuntimeError, ValueError, KeyError, IndexError):
        return None  # the conversion works on the whole tensor: blocks, tiles
    for name, tensor in stored.items():
        numbers = tensor.unique()
        shape = (_HIDDEN, _NEURONS) if int(numbers[0]) % 3 == 2 else (_NEURONS, _HIDDEN)
        if len(numbers) != 1 or tuple(tensor.shape) != shape or not name.endswith(".weight"):
            return None
        expert, projection = divmod(int(numbers), 3)
        found[f"{expert} {projections[projection - 3 + len(projections)]}"] = name.removesuffix(".weight")
    if found.keys() != {f"{e} {p}" for e in range(count) for p in projections}:
        return None
    names = ExpertNames(
        found["0 down"].rpartition(".0.")[0], {p: found[f"0 {p}"].rpartition(".")[2] for p in projections}
    )
    regular = all(found[f"{e} {p}"] == names.linear(e, p) for e in range(count) for p in projections)
    return names if names.experts and regular else None


def numbered(view: FusedExperts, count: int) -> dict[str, Tensor]:
    """Small experts in the layout of the family: expert e's gate, up and down are filled with 3e, 3e + 1, 3e + 2."""
    first = 3 * torch.arange(count, dtype=torch.float32).view(-1, 1, 1)
    gate, up = (first + i + torch.zeros(count, _NEURONS, _HIDDEN) for i in (0, 1))
    down = first + 2 + torch.zeros(count, _HIDDEN, _NEURONS)
    turn: Callable[[Tensor], Tensor] = (
        (lambda w: w.transpose(-2, -1).contiguous()) if view.transposed else (lambda w: w)
    )
    if not view.has_gate:
        return {"up_proj": turn(up), "down_proj": turn(down)}
    both = torch.cat([gate, up], 1) if view.concatenated else torch.stack([gate, up], 2).flatten(1, 2)
    return {"gate_up_proj": turn(both), "down_proj": turn(down)}
