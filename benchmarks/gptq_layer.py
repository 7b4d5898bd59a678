"""How long one layer's GPTQ takes, moments and solve, beside the two lower limits of this machine.

    python benchmarks/gptq_layer.py [--measure 16] [--plain]        (--help: shape, tokens, bits, sweeps)

A layer of Qwen3-30B-A3B's shape with random weights and inputs, top 8. With `--measure` M only M experts, with their
share of the tokens, are really done, and the times are scaled to all; a layer's work is the same for each expert.
Lower limits: operations of the matrix products alone over the measured rate of a large one, and bytes that must be
read and written at least once over the measured bandwidth.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.model import ExpertWeights
from moe_compress.model.dispatch import grouped_linear
from moe_compress.quant import experts as solving
from moe_compress.quant.solver import SolverOptions


class Experts:
    """Random experts with the interface that the solver needs of a family's."""

    def __init__(self, count: int, hidden: int, neurons: int):
        self.num_experts, self.hidden_size, self.intermediate_size = count, hidden, neurons
        generator = torch.Generator().manual_seed(0)

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(count, rows, columns, generator=generator) / columns**0.5

        self._weights = ExpertWeights(matrix(neurons, hidden), matrix(hidden, neurons), matrix(neurons, hidden))

    def weights(self) -> ExpertWeights:
        """All experts."""
        return self._weights

    def activations_with(self, weights: ExpertWeights, input_RH: Tensor, dispatch) -> Tensor:
        """Neuron activations [R, I]."""
        gate, up = (grouped_linear(input_RH, w, dispatch.offsets_E) for w in (weights.gate, weights.up))
        return F.silu(gate) * up


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 128), ("hidden", 2048), ("neurons", 768), ("tokens", 8192), ("bits", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--measure", type=int, help="experts that are really done (default: all)")
    parser.add_argument("--sweeps", type=int, default=SolverOptions().sweeps)
    parser.add_argument("--plain", action="store_true", help="GPTQ alone: no compensation, no polishing")
    given = parser.parse_args()
    done = given.measure or given.experts
    scale = given.experts / done
    rows = given.tokens * given.top_k // given.experts * done
    torch.manual_seed(0)
    experts = Experts(done, given.hidden, given.neurons)
    inputs = BlockInputs()
    tokens = rows // min(given.top_k, done)
    index = torch.rand(tokens, done).topk(min(given.top_k, done)).indices
    weight = torch.rand(index.shape)
    inputs.observe(SimpleNamespace(hidden_TH=torch.randn(tokens, given.hidden), index_TK=index, weight_TK=weight))

    big = torch.randn(2048, 2048)
    big @ big
    rate = 3 * 2 * 2048**3 / seconds(lambda: [big @ big for _ in range(3)])
    source, target = torch.empty(1 << 25).fill_(1), torch.empty(1 << 25).fill_(0)
    bandwidth = 3 * 2 * 4 * len(source) / seconds(lambda: [target.copy_(source) for _ in range(3)])

    sweeps = 0 if given.plain else given.sweeps
    options = SolverOptions(sweeps=sweeps, compensate=not given.plain)
    widths = {name: [given.bits] * done for name in ("gate", "up", "down")}
    spent = {"solve": 0.0}
    gptq = solving.gptq

    def timed(*arguments, **keywords):
        start = time.perf_counter()
        result = gptq(*arguments, **keywords)
        spent["solve"] += time.perf_counter() - start
        return result

    solving.gptq = timed
    with torch.no_grad():
        total = seconds(lambda: [None for _ in solving._by_gptq(experts, widths, options, None, inputs)])
    moments = total - spent["solve"]

    h, i = given.hidden, given.neurons
    # Per row: x xᵀ, activations, a aᵀ; where the down projection compensates, activations and a cross moment again.
    again = 0 if given.plain else 1
    moment_operations = 2 * rows * (h * h + 2 * h * i * (1 + again) + i * i * (1 + again))
    # Per expert: a factor of each Hessian; per pass the feedback, half a square, and the error; per sweep a square.
    square = 2 * (2 * i * h * h + h * i * i)
    solve_operations = done * ((h**3 + i**3) / 3 + square * (2 * (0.5 + 0.5) + sweeps * 1.0))
    moved = done * 4 * (3 * h * i + h * h + i * i) + 4 * rows * (h + i)
    print(
        f"{given.experts} experts {h}×{i}, {given.tokens} tokens, {given.bits} bits, {torch.get_num_threads()} threads"
    )
    print(f"measured on {done} experts; rate {rate / 1e9:.0f} GFLOP/s, bandwidth {bandwidth / 1e9:.1f} GB/s")
    for name, took, operations in (
        ("moments", moments, moment_operations),
        ("solve", spent["solve"], solve_operations),
    ):
        print(f"{name:10}{took * scale:9.1f} s   limit by operations {operations * scale / rate:8.1f} s")
    print(f"{'total':10}{total * scale:9.1f} s   limit by bytes      {moved * scale / bandwidth:8.1f} s")


if __name__ == "__main__":
    main()
