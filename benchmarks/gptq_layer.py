"""How long one layer's GPTQ takes, moments and solve, beside the two lower limits of this machine.

    python benchmarks/gptq_layer.py [--measure 16] [--plain]        (--help: shape, tokens, bits, sweeps)

A layer of Qwen3-30B-A3B's shape with random weights and inputs, top 8. With `--measure` M only M experts, with their
share of the tokens, are really done, and the times are scaled to all; a layer's work is the same for each expert.
Seconds are of the processor, on one thread, so that a busy machine measures about the same. Stages are counted without
the stages inside them. With `--threads` N the total alone is taken, by the clock: for a machine that is idle.
Lower limits: operations of all matrix products and factorisations over the measured rate of a large product, and bytes
that must be read and written at least once over the measured bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.model import ExpertWeights
from moe_compress.model.dispatch import grouped_linear
from moe_compress.quant import experts as solving
from moe_compress.quant import gptq as solver
from moe_compress.quant import polish as polishing
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


# Where time goes: every one of these is timed where it is called from.
_CALLED = (
    *((solving, name) for name in ("shrink_hessians", "compensated", "dequantize", "gptq")),
    *((solver, name) for name in ("find_scales", "feedback", "_columns", "targets", "polish", "output_error")),
    *((solver, name) for name in ("round_to_nearest", "dequantize", "normalised", "_choose")),
    (polishing, "_move_scale"),
    (polishing._Codes, "move"),
)
STAGES = [(module, name, getattr(module, name)) for module, name in _CALLED]


def operations(rows: int, experts: int, hidden: int, neurons: int, sweeps: int, compensates: bool) -> dict[str, float]:
    """What moments, factors and solving take at least, of experts that see so many rows in all."""
    h, i, again = hidden, neurons, 1 if compensates else 0
    # The error of rounding and two passes' feedback, half a square each; per sweep a square.
    square = 2 * (2 * i * h * h + h * i * i)
    return {
        # Per row: half of x xᵀ, activations, half of a aᵀ; where the down projection compensates, activations again and
        # a cross moment.
        "moments": 2 * rows * (h * h / 2 + 2 * h * i * (1 + again) + i * i * (0.5 + again)),
        "factors": experts * ((h**3 + i**3) / 3 + again * (i**3 / 3 + 4 * h * i * i)),
        "solve": experts * square * (3 * 0.5 + sweeps),
    }


def bytes_moved(rows: int, experts: int, hidden: int, neurons: int) -> float:
    """What must be read and written at least once."""
    h, i = hidden, neurons
    return experts * 4 * (3 * h * i + h * h + i * i) + 4 * rows * (h + i)


def measured_rates() -> tuple[float, float]:
    """Operations a second of a large product, bytes a second of a large copy."""
    big = torch.randn(2048, 2048)
    big @ big
    rate = 3 * 2 * 2048**3 / seconds(lambda: [big @ big for _ in range(3)])
    source, target = torch.empty(1 << 25).fill_(1), torch.empty(1 << 25).fill_(0)
    return rate, 3 * 2 * 4 * len(source) / seconds(lambda: [target.copy_(source) for _ in range(3)])


def seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


@contextlib.contextmanager
def watching(spent: dict[str, float], stages=STAGES):
    """Put the seconds that each stage takes, without those inside it, into `spent` from now on."""
    inside = [0.0]

    def watched(name: str, function):
        def timed(*arguments, **keywords):
            inside.append(0.0)
            start = time.process_time()
            result = function(*arguments, **keywords)
            took = time.process_time() - start
            spent[name] = spent.get(name, 0.0) + took - inside.pop()
            inside[-1] += took
            return result

        return timed

    for owner, name, function in stages:
        setattr(owner, name, watched(name, function))
    try:
        yield
    finally:
        for owner, name, function in stages:
            setattr(owner, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 128), ("hidden", 2048), ("neurons", 768), ("tokens", 8192), ("bits", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--measure", type=int, help="experts that are really done (default: all)")
    parser.add_argument("--sweeps", type=int, default=SolverOptions().sweeps)
    parser.add_argument("--plain", action="store_true", help="GPTQ alone: no compensation, no polishing")
    parser.add_argument("--threads", type=int, help="print the total by the clock, on so many threads")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = given.measure or given.experts
    scale = given.experts / done
    rows = given.tokens * given.top_k // given.experts * done
    torch.manual_seed(0)
    experts = Experts(done, given.hidden, given.neurons)
    inputs = BlockInputs()
    tokens = rows // min(given.top_k, done)
    index = torch.rand(tokens, done).topk(min(given.top_k, done)).indices
    weight = torch.rand(index.shape)
    counted = {"token_weight_T": None, "counted_T": torch.ones(tokens, dtype=torch.float64)}
    counted["sequence_T"] = torch.zeros(tokens, dtype=torch.long)
    hidden_TH = torch.randn(tokens, given.hidden)
    inputs.observe(SimpleNamespace(hidden_TH=hidden_TH, index_TK=index, weight_TK=weight, **counted))

    rate, bandwidth = measured_rates()
    sweeps = 0 if given.plain else given.sweeps
    options = SolverOptions(sweeps=sweeps, compensate=not given.plain)
    widths = {name: [given.bits] * done for name in ("gate", "up", "down")}
    spent: dict[str, float] = {}
    with torch.no_grad():
        if given.threads:
            torch.set_num_threads(given.threads)
            start = time.perf_counter()
            for _ in solving.solve_experts(experts, widths, options, inputs):
                pass
            took = (time.perf_counter() - start) * scale
            print(f"{given.experts} experts, measured on {done}, {given.threads} threads: {took:.1f} s by the clock")
            return
        with watching(spent):
            total = seconds(lambda: [None for _ in solving.solve_experts(experts, widths, options, inputs)])
    spent["moments, activations"] = total - sum(spent.values())

    h, i = given.hidden, given.neurons
    needed = operations(rows, done, h, i, sweeps, not given.plain)
    moved = bytes_moved(rows, done, h, i)
    print(
        f"{given.experts} experts {h}×{i}, {given.tokens} tokens, {given.bits} bits, {torch.get_num_threads()} threads"
    )
    print(f"measured on {done} experts; rate {rate / 1e9:.0f} GFLOP/s, bandwidth {bandwidth / 1e9:.1f} GB/s")
    for name, took in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:22}{took * scale:9.1f} s")
    print(f"{'total':22}{total * scale:9.1f} s")
    limits = ", ".join(f"{name} {count * scale / rate:.1f} s" for name, count in needed.items())
    print(f"limit by operations {sum(needed.values()) * scale / rate:.1f} s ({limits})")
    print(f"limit by bytes {moved * scale / bandwidth:.1f} s")


if __name__ == "__main__":
    main()
