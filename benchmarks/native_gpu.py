"""Packed experts on a GPU: the kernel that unpacks inside the product, beside bfloat16 grouped products.

    python benchmarks/native_gpu.py

Needs a GPU and Triton. One layer with Qwen3-30B-A3B's shapes and random weights, bfloat16 activations, at 1, 32 and
1024 tokens: milliseconds per call (median of 50, the first calls, which compile, not counted) of the whole experts
module with the kernel, of the same without it (unpacked by torch, then multiplied), and of dense bfloat16 experts.
`GB/s` is what is read of packed weights per second with the kernel, `error` the distance between the two results.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from native_runtime import CHOSEN, EXPERTS, HIDDEN, MIXTURES, dense_experts, experts_like

from moe_compress.quant import packed, run_packed


def milliseconds(module: Callable[..., Any], values: tuple[torch.Tensor, ...]) -> float:
    for _ in range(5):
        module(*values)
    taken = []
    for _ in range(50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        module(*values)
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


@torch.no_grad()
def main() -> None:
    if not torch.cuda.is_available() or run_packed.fused_kernel("cuda") is None:
        raise SystemExit("needs a GPU that torch sees, and Triton")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'experts':22}{'tokens':>7}{'kernel ms':>11}{'torch ms':>10}{'bf16 ms':>9}{'GB/s':>7}{'error':>10}")
    dense = dense_experts(torch.bfloat16).cuda()
    for name, widths in MIXTURES.items():
        module = experts_like(widths).cuda()
        stored = sum(p.numel() * p.element_size() for p in module.parameters()) / EXPERTS
        for tokens in (1, 32, 1024):
            hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
            index = torch.rand(tokens, EXPERTS, device="cuda").topk(CHOSEN).indices
            values = hidden, index, torch.full(index.shape, 1 / CHOSEN, device="cuda", dtype=torch.bfloat16)
            fused, found = milliseconds(module, values), module(*values)
            with patch.object(packed, "fused_kernel", lambda _: None):
                plain, expected = milliseconds(module, values), module(*values)
            reference = milliseconds(dense, values)
            rate = stored * len(index.unique()) / fused / 1e6
            error = float((found - expected).float().norm() / expected.float().norm())
            print(f"{name:22}{tokens:7}{fused:11.3f}{plain:10.3f}{reference:9.3f}{rate:7.0f}{error:10.1e}", flush=True)


if __name__ == "__main__":
    main()
