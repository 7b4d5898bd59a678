"""Approximate against exact neuron assignment: what is lost of the similarity, and how long both take.

    python benchmarks/neuron_assignment.py [--pairs 8]

Rows: similarities of noise (nothing to be found), of the demo model's experts (trained from scratch: little in common),
and of experts that are permuted copies with noise of that size on their weights. `loss` is 1 − the sum of similarities
found over that of the best assignment.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from moe_compress.merge.align import approximate_assignment, exact_assignment, permuted, weight_similarity
from moe_compress.model import MoEModel
from moe_compress.model.experts import ExpertWeights

MODEL = Path(__file__).resolve().parent.parent / "demo" / "moe-demo"


def noisy_copies(pairs: int, neurons: int, hidden: int, noise: float, generator: torch.Generator) -> torch.Tensor:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    experts = ExpertWeights(*(draw(pairs, *s) for s in ((neurons, hidden), (hidden, neurons), (neurons, hidden))))
    order = torch.stack([torch.randperm(neurons, generator=generator) for _ in range(pairs)])
    return weight_similarity(experts, permuted(experts, order).map(lambda w: w + noise * draw(*w.shape)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    view = MoEModel.wrap(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32))
    weights = view.block(0).experts.weights()
    pairs = min(arguments.pairs, view.block(0).num_experts // 2)
    demo = weight_similarity(weights.map(lambda w: w[:pairs]), weights.map(lambda w: w[-pairs:]))
    cases = {f"noise, {n} neurons": torch.randn(arguments.pairs, n, n, generator=generator) for n in (128, 768)}
    cases["demo model, 128 neurons"] = demo
    for noise in (0.1, 1.0, 3.0):
        cases[f"copies + {noise} noise, 768 neurons"] = noisy_copies(arguments.pairs, 768, 256, noise, generator)
    print(f"{'':36}{'loss':>10}{'same':>9}{'exact s':>10}{'approx. s':>11}   per pair")
    for name, similarity in cases.items():
        start = time.perf_counter()
        exact = exact_assignment(similarity)
        middle = time.perf_counter()
        found = approximate_assignment(similarity)
        end = time.perf_counter()
        best, near = (float(similarity.gather(2, o.unsqueeze(2)).sum()) for o in (exact, found))
        same = float((exact == found).double().mean())
        times = (middle - start) / len(similarity), (end - middle) / len(similarity)
        print(f"{name:36}{1 - near / best:10.4%}{same:9.1%}{times[0]:10.3f}{times[1]:11.3f}")


if __name__ == "__main__":
    main()
