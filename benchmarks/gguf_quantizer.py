"""Weighted squared error and speed of the GGUF quantizers, beside llama.cpp's own where its library is given.

    python benchmarks/gguf_quantizer.py [--library .../llama_cpp/lib/libggml-base.so]

Rows of random weights (normal, and Student-t with four degrees of freedom) and importances (none, mild: uniform in 0.1
to 1.1, wild: sixth power of uniform ones). Errors are ours over theirs (over those of covering scales without a
library); speeds are of one thread, in millions of weights per second.
"""

import argparse
import ctypes
import time
from collections.abc import Callable

import numpy as np
import torch

from moe_compress.quant.gguf_blocks import TYPES, BlockType, dequantize
from moe_compress.quant.gguf_quantize import quantize

ROWS, LENGTH = 256, 2048
Quantizer = Callable[[torch.Tensor, BlockType, torch.Tensor | None], torch.Tensor]


def from_library(path: str) -> Quantizer:
    """llama.cpp's quantizer of rows."""
    function = ctypes.CDLL(path).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def run(weight: torch.Tensor, kind: BlockType, importance: torch.Tensor | None) -> torch.Tensor:
        rows, length = weight.shape
        result = np.zeros((rows, kind.row_bytes(length)), np.uint8)
        values = np.ascontiguousarray(weight.numpy())
        weights = None if importance is None else np.ascontiguousarray(importance.numpy()).ctypes.data
        function(kind.number, values.ctypes.data, result.ctypes.data, 0, rows, length, weights)
        return torch.from_numpy(result)

    return run


def timed(quantizer: Quantizer, weight: torch.Tensor, kind: BlockType, importance: torch.Tensor | None) -> tuple:
    started = time.process_time()
    blocks = quantizer(weight, kind, importance)
    seconds = time.process_time() - started
    change = (dequantize(blocks, kind) - weight).double().square()
    return float((change if importance is None else change * importance).sum()), weight.numel() / seconds / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", help="libggml-base.so of llama.cpp")
    library = parser.parse_args().library
    torch.set_num_threads(1)
    other: Quantizer = from_library(library) if library else lambda w, k, _: quantize(w, k, search=False)
    torch.manual_seed(0)
    data = {"normal": torch.randn(ROWS, LENGTH), "t4": torch.distributions.StudentT(4.0).sample((ROWS, LENGTH))}
    uniform = torch.rand(LENGTH)
    importances = {"none": None, "mild": uniform + 0.1, "wild": uniform.pow(6) + 1e-4}
    heads = [f"{kind} {weight}" for kind in data for weight in importances]
    print("| type | " + " | ".join(heads) + " | ours, M/s | theirs, M/s |\n|" + "---|" * (len(heads) + 3))
    for kind in TYPES.values():
        if kind.kind == "plain":
            continue
        ratios, speeds = [], []
        for weight in data.values():
            for importance in importances.values():
                ours, theirs = (timed(q, weight, kind, importance) for q in (quantize, other))
                ratios.append(f"{ours[0] / theirs[0]:.3f}")
                speeds.append((ours[1], theirs[1]))
        mean = [f"{sum(s) / len(s):.1f}" for s in zip(*speeds, strict=True)]
        print(f"| {kind.name} | " + " | ".join([*ratios, *mean]) + " |", flush=True)


if __name__ == "__main__":
    main()
