"""What smoothing of inputs recovers where a few channels stand out: outliers planted in the demo checkpoint.

    python benchmarks/outliers.py [--channels 8] [--size 30] [--tokens 2000] [--bits 3]

In every layer, so many channels of what the block reads are made `size` times as large, and the columns of router and
experts that read them as much smaller: the model computes what it did, and round-to-nearest doesn't. Printed: nats per
token lost against the original and KL, mean over the six texts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from cells import Yardstick
from demo_model import calibration_text, load_demo
from quantization_table import COLUMNS, GROUP

from moe_compress import MoEModel
from moe_compress.model.reading import move_factors


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--size", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=2000, help="of each of the six texts")
    parser.add_argument("--bits", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer, original = load_demo()
    text = calibration_text(tokenizer)
    model = planted(original, arguments.channels, arguments.size)
    yardstick = Yardstick(original, tokenizer, arguments.tokens)
    options = {
        "bits": COLUMNS[str(arguments.bits)] + 0.01,
        "widths": [arguments.bits],
        "allocation": "uniform",
        "protect_super_experts": False,
        "group_size": GROUP,
        "method": "rtn",
    }
    mixed = [("quantize.mixed", {**options, "smooth": smooth}) for smooth in ("none", "input")]
    mixed.append(("quantize.mixed", {**options, "smooth": "input", "smooth_merge": "max"}))
    program = {"bits": arguments.bits, "group_size": GROUP, "method": "rtn"}
    mixed += [("quantize.mixed", {**program, "smooth": smooth}) for smooth in ("none", "input")]
    served = [("quantize.scheme", {"scheme": "w8a8", "smooth": smooth}) for smooth in ("none", "input")]
    print(f"{'':10}{'pass':18}{'smooth':16}{'nats':>10}{'KL':>10}")
    for what, start in (("as it is", original), ("planted", model)):
        for name, values in [*mixed, *served]:
            yardstick.original = start
            found = yardstick.measure([{name: values}], text)
            smooth = values["smooth"] + (", largest" if "smooth_merge" in values else "")
            smooth += ", program" if values.get("bits") == arguments.bits else ""
            nats = statistics.mean(found["lost"].values())
            print(f"{what:10}{name:18}{smooth:16}{nats:>+10.4f}{found['kl']:>10.4f}", flush=True)


if __name__ == "__main__":
    main()
