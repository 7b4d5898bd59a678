"""How far starved experts' Hessians should be drawn towards their layer's: error on held-out text, demo checkpoint.

    python benchmarks/shrinkage.py [--sequences 4 16 64] [--layers 0 1 2 3] [--seeds 0] [--plain]

Each layer's experts are quantized at 3 and 2 bits (group 64, the default options; --plain: GPTQ alone) with what few
calibration sequences of 128 tokens make them read, for several κ, the tokens that the layer's mean counts for, as a
multiple of the Hessian's size K. Table: squared error of the block's output relative to its square, on the six held-out
texts, in percent, mean over layers and seeds; inputs are the original's. The least of a row is marked.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from demo_model import block_inputs, calibration_text, load_demo, six_texts

from moe_compress.calib.inputs import BlockInputs
from moe_compress.evaluate.text import Evaluation, load_text
from moe_compress.model import ExpertWeights, FusedExperts, MoEModel
from moe_compress.quant import gptq
from moe_compress.quant.experts import solve_experts
from moe_compress.quant.solver import SolverOptions
from moe_compress.refit import layer_output

LENGTH = 128
FACTORS = {"0": 0.0, "K/16": 1 / 16, "K/4": 1 / 4, "K": 1.0, "4 K": 4.0, "∞": 1e9}
BITS = (3, 2)


def quantized(experts: FusedExperts, bits: int, options: SolverOptions, inputs: BlockInputs) -> ExpertWeights:
    """All experts of a layer, dense again."""
    weights = experts.weights().map(torch.clone)
    widths: dict[str, list[float]] = {name: [bits] * experts.num_experts for name, _ in weights.matrices()}
    for solved in solve_experts(experts, widths, options, inputs):
        getattr(weights, solved.projection)[solved.experts] = solved.value(torch.float32)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=2000, help="of each held-out text")
    parser.add_argument("--plain", action="store_true", help="GPTQ alone: no weighing, compensation or polishing")
    given = parser.parse_args()
    tokenizer, model = load_demo()
    view = MoEModel.wrap(model)
    windows = load_text(tokenizer, Evaluation(**six_texts(given.tokens)), model.config.vocab_size)
    held_out = block_inputs(view, [{"input_ids": window.ids} for window in windows])
    plain: dict[str, Any] = {"hessian": "plain", "compensate": False, "sweeps": 0} if given.plain else {}
    options = SolverOptions(**plain)
    layers = given.layers or view.moe_layers
    exact, own = {}, {}
    for layer in layers:
        found = held_out[layer]
        own[layer] = (found.hidden_TH, found.index_TK, found.weight_TK)
        exact[layer] = layer_output(FusedExperts(view.block(layer).experts_module), *own[layer]).double()
    print(f"{'sequences (rows per expert), bits':36}" + "".join(f"{name:>10}" for name in FACTORS), flush=True)
    for sequences in given.sequences:
        errors: dict[int, dict[str, list[float]]] = {bits: {name: [] for name in FACTORS} for bits in BITS}
        for seed in given.seeds:
            text = calibration_text(tokenizer, sequences, seed, LENGTH, balance=False)
            inputs = block_inputs(view, text.forwards(8))
            for layer in layers:
                module = view.block(layer).experts_module
                experts = FusedExperts(module)
                original = experts.weights().map(torch.clone)
                for bits in BITS:
                    for name, factor in FACTORS.items():
                        gptq.SHRINKAGE = factor
                        weights = quantized(experts, bits, options, inputs[layer])
                        copy_into(experts, weights)
                        difference = layer_output(experts, *own[layer]).double() - exact[layer]
                        copy_into(experts, original)
                        error = float(difference.square().sum() / exact[layer].square().sum())
                        errors[bits][name].append(error)
        rows = sequences * LENGTH * model.config.num_experts_per_tok / model.config.num_experts
        for bits in BITS:
            means = {name: statistics.mean(values) for name, values in errors[bits].items()}
            least = min(means.values(), default=math.nan)
            shown = "".join(f"{100 * mean:>9.3f}{'*' if mean == least else ' '}" for mean in means.values())
            print(f"{f'{sequences} ({rows:.0f}), {bits} bits':36}{shown}", flush=True)


def copy_into(experts: FusedExperts, weights: ExpertWeights) -> None:
    """Give experts other weights."""
    for name, matrix in experts.weights().matrices():
        matrix.copy_(getattr(weights, name))


if __name__ == "__main__":
    with torch.no_grad():
        main()
