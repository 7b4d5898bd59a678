"""What smoothing of inputs recovers where a few channels stand out: outliers planted in the demo checkpoint.

    python benchmarks/outliers.py [--channels 8] [--size 30] [--tokens 2000] [--bits 3 …] [--method rtn …]
                                  [--only TEXT …]

In every layer, so many channels of what the block reads are made `size` times as large, and the columns of router and
experts that read them as much smaller: the model computes what it did, and round-to-nearest doesn't. Printed: nats per
token lost against the original and KL, mean over the six texts; seconds of the processor, scoring included. Of each
method and bits: all experts at this width (where it is one), and widths that the program chooses, of as many bits on
average, by costs of matrices as they are and by costs that know their factors.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from cells import Yardstick
from demo_model import calibration_text, load_demo
from quantization_table import COLUMNS, GROUP
from torch import Tensor

from moe_compress import MoEModel
from moe_compress.calib.statistics import Statistic
from moe_compress.model.reading import move_factors
from moe_compress.quant.cost import QuantizationError
from moe_compress.quant.costs import Asked, Measured, cost, solver_gain
from moe_compress.quant.options import MixedOptions

Row = tuple[str, dict[str, Any]]  # what it is called, a pass


def unsmoothed(options: MixedOptions) -> MixedOptions:
    """The same options for matrices as they are."""
    return options.model_copy(update={"smooth": "none"})


def plain_error(options: MixedOptions, per_matrix: bool) -> Statistic:
    """Rounding's error of matrices as they are."""
    return QuantizationError.of(unsmoothed(options), per_matrix=per_matrix)


def plain_gain(options: MixedOptions, per_matrix: bool) -> Statistic:
    """What GPTQ leaves of it; where it isn't the method nothing else is measured."""
    return solver_gain(unsmoothed(options)) if options.method == "gptq" else plain_error(options, per_matrix)


@cost(
    "as_they_are",
    "control: `relative`, with what GPTQ leaves, of matrices without the factors that they will have",
    plain_error,
    plain_gain,
    per_matrix=True,
)
def as_they_are(measured: Measured, asked: Asked) -> Tensor:
    """See `relative`; scaled by itself, as the solver's own gain would know the factors."""
    error_EMB = measured["quantization_error"]["relative"]
    return error_EMB * measured["solver_gain"]["share"] if asked.options.method == "gptq" else error_EMB


def planted(original: Any, channels: int, size: float) -> Any:
    """A copy of a model with outliers in what its blocks read."""
    model = copy.deepcopy(original)
    view = MoEModel.wrap(model)
    generator = torch.Generator().manual_seed(0)
    for index in view.moe_layers:
        block = view.block(index)
        factor_H = torch.ones(block.experts.hidden_size)
        factor_H[torch.randperm(len(factor_H), generator=generator)[:channels]] = 1 / size
        move_factors(block, view.reads[index], factor_H)
    return model


def rows(bits: float, method: str) -> Iterator[Row]:
    """Experts in packed integers, so many bits on average."""
    plain = {"method": method, "group_size": GROUP}
    if (width := f"{bits:g}") in COLUMNS:
        alike = {**plain, "bits": COLUMNS[width] + 0.01, "widths": [bits], "allocation": "uniform"}
        alike["protect_super_experts"] = False
        for said, own in (
            ("none", {"smooth": "none"}),
            ("input", {"smooth": "input"}),
            ("input, largest", {"smooth": "input", "smooth_merge": "max"}),
        ):
            yield f"{method} {width}, one width, {said}", {"quantize.mixed": {**alike, **own}}
    for said, own in (
        ("none", {"smooth": "none"}),
        ("input, costs as they are", {"smooth": "input", "cost": "as_they_are"}),
        ("input", {"smooth": "input"}),
    ):
        yield f"{method} {width}, program, {said}", {"quantize.mixed": {**plain, "bits": bits, **own}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--size", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=2000, help="of each of the six texts")
    parser.add_argument("--bits", type=float, nargs="*", default=[3.0])
    parser.add_argument("--method", nargs="*", default=["rtn"], choices=["rtn", "gptq", "hqq"])
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one of these")
    arguments = parser.parse_args()
    tokenizer, original = load_demo()
    text = calibration_text(tokenizer)
    model = planted(original, arguments.channels, arguments.size)
    yardstick = Yardstick(original, tokenizer, arguments.tokens)
    wanted = [row for method in arguments.method for bits in arguments.bits for row in rows(bits, method)]
    wanted += [(f"w8a8, {s}", {"quantize.scheme": {"scheme": "w8a8", "smooth": s}}) for s in ("none", "input")]
    print(f"{'':56}{'nats':>10}{'KL':>10}{'CPU s':>8}")
    for what, start in (("as it is", original), ("planted", model)):
        yardstick.original = start
        for row, step in wanted:
            if not any(part in (name := f"{what}, {row}") for part in arguments.only):
                continue
            began = time.process_time()
            found = yardstick.measure([step], text)
            nats = statistics.mean(found["lost"].values())
            print(f"{name:56}{nats:>+10.4f}{found['kl']:>10.4f}{time.process_time() - began:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
