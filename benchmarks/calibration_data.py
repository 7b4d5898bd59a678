"""What the demo model is calibrated on: text that is read, balanced over experts, or written by the model itself.

    python benchmarks/calibration_data.py [--sequences 64] [--length 256] [--tokens 10000] [--only NAME]

Every row: how evenly the text serves the experts (their tokens beside the mean of their layer: smallest, and standard
deviation averaged over layers), and what GPTQ at 2 bits, calibrated on it, loses: mean over the six texts of the nats
per token above the original's, and the mean KL divergence.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.calib.balance import SequenceRouting, shares
from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.draft import finish
from moe_compress.calib.text import Calibration, TokenBatches, read_draft
from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Monitor, Progress

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "moe-demo"
READ = {"path": str(ROOT / "demo/calibration.jsonl"), "domain_field": "domain"}
QUANTIZE = {"quantize.mixed": {"bits": 2.26, "widths": [2], "allocation": "uniform", "protect_super_experts": False}}
ROWS: dict[str, dict[str, Any]] = {
    "read": {"sources": [READ]},
    "read, domains balanced": {"sources": [READ], "balance": True},
    "read, one domain": {"sources": [READ], "domains": ["novels"]},
    "read, one domain, expert_balance 0.5": {"sources": [READ], "domains": ["novels"], "expert_balance": 0.5},
    "written (EBSS: tau 1.2)": {"sources": [{"self_sampling": {"parallel": 32}}]},
    "written, likelihood 0": {"sources": [{"self_sampling": {"parallel": 32, "likelihood": 0.0}}]},
    "written, likelihood 0, tau null": {
        "sources": [{"self_sampling": {"parallel": 32, "likelihood": 0.0, "tau": None, "width": 1}}]
    },
}


def served(view: MoEModel, text: TokenBatches) -> dict[str, float]:
    """How evenly the experts are served by a text."""
    store, statistic = MemoryStore(), SequenceRouting(len(text))
    with Sweep(view, text.forwards(8)) as sweep:
        collect(sweep, [statistic], store, Progress())
    return shares([store.results[i, statistic.key]["counts"] for i in view.moe_layers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=10_000, help="tokens of each text that is scored")
    parser.add_argument("--only", help="rows whose name contains this")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    evaluate = {"text": [str(ROOT / "demo/text/*.jsonl")], "length": 256, "max_tokens": arguments.tokens}
    print(f"{'':40}{'sequences':>10}{'min':>8}{'std':>8}{'nats above':>12}{'kl':>9}{'seconds':>9}")
    for name, settings in ROWS.items():
        if arguments.only and arguments.only not in name:
            continue
        start = time.perf_counter()
        wanted = Calibration(**settings, sequences=arguments.sequences, length=arguments.length)
        view = MoEModel.wrap(original)
        draft = read_draft(wanted, tokenizer, ROOT)
        text = finish(draft, view, lambda _: MemoryStore(), lambda _: None, Monitor(show=False))
        seconds = time.perf_counter() - start
        loads = served(view, text)
        result = moe_compress.compress(
            copy.deepcopy(original),
            tokenizer=tokenizer,
            passes=[QUANTIZE],
            calibration=text,
            evaluate=evaluate,
            monitor=Monitor(show=False),
        )
        before, after = (result.report[when]["perplexity"].values() for when in ("before", "after"))
        loss = statistics.mean(map(math.log, after)) - statistics.mean(map(math.log, before))
        kl = statistics.mean(result.report["after"]["kl"].values())
        row = f"{name:40}{len(text):10}{loads['min']:8.3f}{loads['std']:8.3f}{loss:+12.4f}{kl:9.4f}{seconds:9.0f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
