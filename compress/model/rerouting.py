"""How a block would route with fewer experts: by the family's own router and block, without copying its weights.

Letters: T tokens, K experts per token, E experts, N experts that are left.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .block import MoEBlock
from .tensors import get_tensor, set_tensor


class Rerouting:
    """A block's routing, asked again with only some of its experts.

    Works on a copy of the decoder layer that shares all tensors with it but the experts', which it has no need of; the
    block itself is never touched. The block's tensors must be readable while this is used.
    """

    def __init__(self, block: MoEBlock):
        shared: dict[int, Any] = {id(t): t for t in [*block.module.parameters(), *block.module.buffers()]}
        for name in block.axes.tensors:
            if name.startswith(block.path + "."):
                tensor = get_tensor(block.module, name)
                shared[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        for module in block.module.modules():
            for name in ("config", "_hf_hook"):
                if hasattr(module, name):
                    shared[id(getattr(module, name))] = getattr(module, name)
        layer = copy.deepcopy(block.module, shared)
        for module in layer.modules():
            if hasattr(module, "_hf_hook"):  # accelerate's hooks would bring back the whole router
                module.forward = module._old_forward  # type: ignore[assignment]
                del module._hf_hook
        self._block = MoEBlock(block.layer, layer, block.path, block.axes)
        self._block.experts_module.forward = _nothing  # type: ignore[method-assign]
        self._count = block.num_experts
        self._whole = {name: get_tensor(layer, name) for name in block.axes.tensors}
        self._table = getattr(self._block.router, "tid2eid", None)

    def coefficients(self, kept: list[int], router_arguments: dict[str, Tensor]) -> Tensor:
        """The weight of each expert for each token: [T, E] float64, 0 where it isn't chosen or isn't kept.

        Args:
            kept: experts that are left, ascending.
            router_arguments: what the router reads, one row per token, first what it routes (see `rows`).
        """
        block = self._block
        if len(kept) < self._count:
            block.keep(kept)
        try:
            (_, hidden_TH), *rest = router_arguments.items()
            if type(block.router).__name__ in families.ROUTERS_OF_SEQUENCES:
                rest = [(name, value.unsqueeze(0)) for name, value in rest]
            routing = block.route(hidden_TH, **dict(rest))
        finally:
            if len(kept) < self._count:
                self._restore()
        weight_TK = routing.weight_TK.double()
        # Zero weights and indices behind the last expert are slots that nobody serves (see Dispatch.of).
        served = (weight_TK != 0) & (routing.index_TK < len(kept))
        expert_N = torch.tensor(kept, device=weight_TK.device)
        expert_TK = expert_N[routing.index_TK.clamp_max(len(kept) - 1)]
        coefficients = weight_TK.new_zeros(len(weight_TK), self._count)
        return coefficients.scatter_add_(1, expert_TK, weight_TK * served)

    def _restore(self) -> None:
        for name, tensor in self._whole.items():
            set_tensor(self._block.module, name, tensor)
        if self._table is not None:
            set_tensor(self._block.module, f"{self._block.router_path}.tid2eid", self._table)
        self._block._set_count(self._count)


def rows(router_arguments: dict[str, Any], tokens: int, taken_T: Tensor) -> dict[str, Tensor]:
    """Of what a router was called with, what it reads per token, for the tokens that are taken ([T] booleans)."""
    found = {}
    for name, value in router_arguments.items():
        if not isinstance(value, Tensor) or not value.dim():
            continue
        flat = value.flatten(0, 1) if value.dim() > 1 and value.shape[0] * value.shape[1] == tokens else value
        if flat.shape[0] == tokens:
            found[name] = flat[taken_T.to(flat.device)]
    return found


def _nothing(hidden_TH: Tensor, *_: Tensor) -> Tensor:
    """In place of the experts, whose outputs nobody asks for."""
    return torch.zeros_like(hidden_TH)
