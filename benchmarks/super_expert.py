"""A super expert planted into the demo checkpoint: is it found, does protection keep it, and what is lost without?

    python benchmarks/super_expert.py [--scale 30 100] [--tokens 2000]

The down projection of the least chosen expert of the first layer is scaled, so that its outputs are massive and what
follows reads them. The planted model is then the original: pruned by frequency, which that expert is the first to fall
to, with protection and without. KL divergence is from the planted model, `nats` the loss on six held-out texts above
the planted model's.
"""

from __future__ import annotations

import argparse
import copy

import torch
from demo_model import calibration_text, compressed, load_demo, mean_kl, mean_lost, six_texts

import moe_compress
from moe_compress.model import MoEModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, nargs="+", default=[30.0, 100.0], help="of the down projection")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each held-out text")
    arguments = parser.parse_args()
    tokenizer, original = load_demo()
    text = calibration_text(tokenizer, 32)
    found = moe_compress.analyse(original, text)
    # Of the layers in which super experts form (the last quarter has none by definition), the first.
    layer, expert = 0, int(found.load[0].argmin())
    print(f"planted: layer {layer}, expert {expert}, chosen by {int(found.load[0][expert])} of {text.tokens} tokens")
    print(f"{'scale, pruned by frequency':44}{'found':>12}{'kept':>6}{'nats':>10}{'KL':>10}")
    for scale in arguments.scale:
        planted = copy.deepcopy(original)
        with torch.no_grad():
            MoEModel.wrap(planted).block(layer).experts.weights().down[expert].mul_(scale)
        analysed = moe_compress.analyse(planted, text)
        named = str({i: own["super_experts"] for i, own in analysed.layers.items() if own["super_experts"]})
        for keep in (15, 12, 8):
            for protect in (True, False):
                options = {"experts": keep, "criterion": "frequency", "protect_super_experts": protect}
                step = {"prune.experts": {"refit": False, **options}}
                report = compressed(planted, tokenizer, [step], text, six_texts(arguments.tokens)).report
                nats, divergence = mean_lost(report), mean_kl(report)
                slot = report["layers"][layer]["experts"][expert]["slot"]
                name = f"{scale:g}, {keep} of 16, {'protected' if protect else 'not protected'}"
                print(
                    f"{name:44}{named:>12}{'no' if slot is None else 'yes':>6}{nats:+10.4f}{divergence:10.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
