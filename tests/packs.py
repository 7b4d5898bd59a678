"""Packed experts made by hand: any width, group size, zero points or none, per expert and projection.

Promise: `pack_block` returns the values that were packed, computed here from codes, scales and zero points; nothing of
it goes through the packed module.
"""

import torch
from torch import Tensor

from moe_compress.model import MoEModel
from moe_compress.quant.grid import Grid
from moe_compress.quant.packed import pack_experts
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.stack import Stack

DENSE = (0, -1, True)  # (bits, group size, symmetric)


def pack_block(block, choose, dense_dtype=torch.bfloat16, scale_dtype=torch.bfloat16) -> dict[str, Tensor]:
    """Pack a block's experts; `choose(projection, expert)` → (bits, group size, symmetric).

    Returns projection → float32 [E, O, K], what the packed weights stand for.
    """
    matrices, values = {}, {}
    for name, stacked in block.experts.weights().matrices():
        kinds: dict[tuple, list[int]] = {}
        for expert in range(block.num_experts):
            kinds.setdefault(choose(name, expert), []).append(expert)
        matrices[name], values[name] = [], stacked.float().clone()
        for (bits, group, symmetric), experts in kinds.items():
            own = stacked[experts].float()
            if bits == 0:
                own = own.to(dense_dtype)
                matrices[name].append((experts, Stack.holding(own)))
                values[name][experts] = own.float()
                continue
            quantized = round_to_nearest(own, Grid(bits, group, symmetric), scale_dtype=scale_dtype)
            matrices[name].append((experts, Stack.holding(quantized)))
            zero = {1: 0.5, 1.58: 1.0}.get(bits) or float(1 << (bits - 1))
            if quantized.zero is not None:
                zero = spread(quantized.zero.float(), own.shape[-1])
            values[name][experts] = (quantized.codes.float() - zero) * spread(quantized.scale.float(), own.shape[-1])
    pack_experts(block, matrices)
    return values


def spread(per_group: Tensor, columns: int) -> Tensor:
    """[…, G] → […, K]."""
    return per_group.repeat_interleave(columns // per_group.shape[-1], dim=-1)


def put(block, values: dict[str, Tensor]) -> None:
    """Write dense values into a block's fused experts."""
    for name, stacked in block.experts.weights().matrices():
        stacked.copy_(values[name])


def mixture(projection: str, expert: int) -> tuple[float, int, bool]:
    """Every width from 1 to 8, ternary, dense weights, three group sizes, with and without zero points."""
    position = expert + 3 * ("gate", "up", "down").index(projection)
    bits = 1.58 if position % 10 == 9 else position % 10
    return bits, (4, -1, 2)[position % 3], bits < 2 or position % 2 == 0


class Packed:
    """An overlay: a folder's blocks packed by `choose`, the layers in `fewer` without every fourth expert."""

    def __init__(self, model: MoEModel, choose, fewer=()):
        self.states, self.values = {}, {}
        for index in model.moe_layers:
            with model.layer(index, stored=True) as live:
                if index in fewer:
                    live.block.keep(three_quarters(live.block))
                self.values[index] = pack_block(live.block, choose)
                tensors, description = live.block.state()
                dtypes = {n: d for n, d in model.stored_dtypes(index).items() if n in tensors}
                tensors = {n: t.to(dtypes.get(n, t.dtype), copy=True) for n, t in tensors.items()}
                self.states[index] = (tensors, description)

    def get(self, layer):
        return self.states.get(layer)


def three_quarters(block) -> list[int]:
    """Experts to keep, as many of every routing group."""
    return [e for e in range(block.num_experts) if e % 4 != 1]


def layout(*encodings, out_features=32, in_features=64, biases=()):
    """The layout of experts without a gate, in these encodings, of the same shape up and down."""
    names = [e.name for e in encodings]
    entry = {"out_features": out_features, "in_features": in_features, "experts": names}
    return {
        "encodings": {e.name: e.to_json() for e in encodings},
        "projections": {"up": entry, "down": entry},
        "biases": dict.fromkeys(biases, "bfloat16"),
    }
