"""The few families that need a word said about them, and why.

Everything else follows from what transformers' classes declare. Each rule here is small and named; a family that
can't be handled is refused with its reason, by name, before anything is loaded.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

# Model types that can't be handled, mostly because no experts interface declares how their experts are laid out.
REFUSED: dict[str, str] = {
    "diffusion_gemma": "its encoder and decoder share their experts' weights, and text reaches them on two paths",
    "ernie4_5_vl_moe": "its text and vision experts are one set on disk, and text says nothing of the vision experts",
    "dbrx": "its experts are flat [experts·neurons, hidden] matrices outside transformers' experts interface",
    "doge": "its experts are rank-1 embeddings chosen by product keys, not projections",
    "jetmoe": "its experts (also in attention) are outside transformers' experts interface",
    "llama4": "its experts multiply the score into their input, outside the experts interface",
    "llama4_text": "its experts multiply the score into their input, outside the experts interface",
    "longcat_flash": "its identity experts share the router with real ones, outside the experts interface",
    "nllb_moe": "it is an encoder-decoder with capacity-limited routing",
    "switch_transformers": "it is an encoder-decoder with capacity-limited routing",
}

# Routers that read their input as [batch, sequence, hidden] instead of [tokens, hidden].
ROUTERS_OF_SEQUENCES = ("AfmoeTokenChoiceRouter", "ZayaRouter")

# Routers that read the number of experts from their config while they run: they get a config of their own.
ROUTERS_READING_CONFIG = {"ZayaRouter": "num_experts"}

# Where top-k isn't the router's `top_k`: the name in the router's config.
TOP_K_IN_CONFIG = {"Gemma4TextRouter": "top_k_experts", "DiffusionGemmaTextRouter": "top_k_experts"}


def refusal(model_type: str) -> str | None:
    """Why a model type isn't handled, or None."""
    return REFUSED.get(model_type)


def top_k(router: nn.Module, parent: nn.Module) -> int:
    """Experts per token: the router's own number, its config's, or (routers that only score) the block's."""
    key = TOP_K_IN_CONFIG.get(type(router).__name__)
    if key:
        return int(getattr(router.config, key))
    return int(router.top_k if hasattr(router, "top_k") else parent.top_k)  # type: ignore[arg-type]


def routing_groups(router: nn.Module) -> tuple[int, int] | None:
    """(number of groups, groups that a token may use) of group-limited routing; None where routing isn't limited."""
    groups = getattr(router, "num_group", None)
    if not groups or groups == 1 or getattr(router, "topk_method", "") == "greedy":
        return None
    return int(groups), int(router.topk_group)  # type: ignore[arg-type]


def infeasible(top_k: int, groups: tuple[int, int] | None, count: int) -> str | None:
    """Why routing can't work with that many experts, or None. A wrong count can run without error, and be wrong."""
    if count < top_k:
        return f"routes each token to {top_k} experts, and {count} would be left"
    if groups is None:
        return None
    number, used = groups
    if count % number:
        return f"routes in {number} groups of equal size, and {count} experts don't divide into them"
    if count // number < 2:
        return f"scores each of its {number} routing groups by two experts, and {count} would leave fewer"
    if used * (count // number) < top_k:
        return f"picks {top_k} experts from {used} of its {number} routing groups, and {count} are too few"
    return None


def remap_hash_table(table_VK: Tensor, kept: Tensor, experts: int, slots_E: Tensor | None = None) -> Tensor:
    """Hash routing (first layers of DeepSeek-V4) after removing experts: token id → kept experts, renumbered.

    A removed expert's tokens go to kept experts in turn (by token id), never twice to the same one, so that load stays
    even; nothing in the model says which kept expert would serve them best.

    Args:
        table_VK: expert ids per token id.
        kept: ids of the kept experts, ascending.
        experts: number of experts before.
        slots_E: place of each expert of before, where several became one; without, only those kept have one.

    Returns:
        Table of the same shape, ids counted among the kept.
    """
    renumber = torch.full((experts,), -1, dtype=table_VK.dtype, device=table_VK.device)
    renumber[kept] = torch.arange(len(kept), dtype=table_VK.dtype, device=table_VK.device)
    table = (renumber if slots_E is None else slots_E.to(renumber))[table_VK]
    for slot in range(1, table.shape[1]):  # two experts of a token that became one: the second place is free
        again = (table[:, :slot] == table[:, slot : slot + 1]).any(dim=1)
        table[:, slot] = table[:, slot].masked_fill(again, -1)
    token = torch.arange(table.shape[0], device=table.device)
    for slot in range(table.shape[1]):
        missing = table[:, slot] < 0
        candidate = (token + slot) % len(kept)
        for _ in range(table.shape[1]):
            taken = (table == candidate.unsqueeze(1)).any(dim=1)
            candidate = torch.where(taken, (candidate + 1) % len(kept), candidate)
        table[:, slot] = torch.where(missing, candidate.to(table.dtype), table[:, slot])
    return table


def installed() -> dict[str, str]:
    """Modelling folders of the installed transformers with MoE layers → 'supported', or the reason why not."""
    root = Path(inspect.getfile(transformers)).parent / "models"
    found: dict[str, str] = {}
    for file in sorted(root.glob("*/modeling_*.py")):
        if "@use_experts_implementation" in file.read_text(encoding="utf-8"):
            found[file.parent.name] = "supported"
    found.update({name: reason for name, reason in REFUSED.items() if (root / name).is_dir()})
    return dict(sorted(found.items()))
