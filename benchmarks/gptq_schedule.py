"""What GPTQ's passes and sweeps are worth on the demo checkpoint: error on held-out text, and time.

    python benchmarks/gptq_schedule.py [--bits 3 2] [--sequences 96]

Every matrix of the demo checkpoint's experts is solved alone, gate and up stacked, on what it read of some calibration
sequences; its error is taken on what it read of others, relative to that of the default schedule, and the mean is over
all matrices. Seconds are of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import time

import torch
from demo_model import block_inputs, calibration_text, load_demo
from torch import Tensor

from moe_compress import MoEModel
from moe_compress.model import FusedExperts
from moe_compress.quant.gptq import gptq, shrink_hessians
from moe_compress.quant.grid import Grid, dequantize
from moe_compress.quant.rtn import output_error

DEFAULT = (2, 2)  # passes, sweeps
SCHEDULES = (DEFAULT, (1, 0), (2, 0), (1, 1), (1, 2), (1, 3), (2, 1), (2, 3))


def problems(sequences: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weights [E, O, K], their Hessians on calibration text, and on text held out."""
    tokenizer, model = load_demo()
    view = MoEModel.wrap(model)
    read = []
    for seed in (0, 7):
        ids = calibration_text(tokenizer, sequences, seed=seed).ids
        read.append(block_inputs(view, [{"input_ids": part} for part in ids.split(8)]))
    found = []
    for index, inputs in read[0].items():
        experts = FusedExperts(view.block(index).experts_module)
        weights = experts.weights()
        parts = zip(inputs.moments(experts, 1 << 40), read[1][index].moments(experts, 1 << 40), strict=True)
        for own, later in parts:
            inward = torch.cat([weights.gate, weights.up], dim=1).float()
            found.append((inward, shrink_hessians(own.input_CHH, own.rows_C), later.input_CHH))
            outward = shrink_hessians(own.activation_CII, own.rows_C)
            found.append((weights.down.float(), outward, later.activation_CII))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="+", default=[3, 2])
    parser.add_argument("--sequences", type=int, default=96)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        matrices = problems(given.sequences)
        for bits in given.bits:
            usual: Tensor | None = None
            for passes, sweeps in SCHEDULES:
                start, errors = time.process_time(), []
                for weight, hessian, later in matrices:
                    solved = gptq(weight, hessian, Grid(bits, 64), passes=passes, sweeps=sweeps)
                    errors.append(output_error(dequantize(solved.quantized) - weight, later).sum(1))
                took, error = time.process_time() - start, torch.cat(errors)
                usual = error if usual is None else usual
                seen = usual > 0
                share = float((error[seen] / usual[seen]).mean())
                print(f"{bits:g} bits, {passes} passes, {sweeps} sweeps: error {share:.3f}, {took:.2f} s", flush=True)


if __name__ == "__main__":
    main()
