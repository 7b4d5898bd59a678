"""The demo checkpoint as benchmarks use it: itself, its calibration text, the six texts that it is scored on, a pass
over a fresh copy of it, and what its blocks read."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress import MoEModel
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.text import Calibration, TextSource, TokenBatches, load_batches
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Monitor

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "moe-demo"


def load_demo() -> tuple[Any, Any]:
    """Tokenizer and model, the latter in float32."""
    return AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def calibration_text(
    tokenizer: Any, sequences: int = 128, seed: int = 0, length: int = 256, balance: bool = True
) -> TokenBatches:
    """So many sequences, the domains in equal parts unless `balance` is false."""
    source = TextSource(path=str(ROOT / "demo/calibration.jsonl"), domain_field="domain")
    settings = Calibration(sources=[source], length=length, sequences=sequences, balance=balance, seed=seed)
    return load_batches(settings, tokenizer, ROOT)


def six_texts(tokens: int) -> dict[str, Any]:
    """`evaluate` for so many tokens of each of the six texts."""
    return {"text": [str(ROOT / "demo/text/*.jsonl")], "length": 256, "max_tokens": tokens}


def compressed(
    original: Any,
    tokenizer: Any,
    passes: list[dict[str, Any]],
    text: TokenBatches,
    evaluate: Mapping[str, Any] | None = None,
) -> moe_compress.CompressedModel:
    """A copy of a model after these passes; the demo checkpoint is at hand for those that learn from the original."""
    return moe_compress.compress(
        copy.deepcopy(original),
        tokenizer=tokenizer,
        passes=passes,
        calibration=text,
        evaluate=evaluate,
        original=MODEL,
        monitor=Monitor(show=False),
    )


def lost(report: Mapping[str, Any]) -> dict[str, float]:
    """Text → nats per token above the original."""
    before, after = report["before"]["perplexity"], report["after"]["perplexity"]
    return {name: math.log(value / before[name]) for name, value in after.items()}


def mean_lost(report: Mapping[str, Any]) -> float:
    """Nats per token above the original, mean over texts."""
    return statistics.mean(lost(report).values())


def mean_kl(report: Mapping[str, Any]) -> float:
    """KL divergence from the original, mean over texts."""
    return statistics.mean(report["after"]["kl"].values())


def block_inputs(view: MoEModel, batches: list[dict[str, Any]]) -> dict[int, BlockInputs]:
    """Layer → what its block reads."""
    found: dict[int, BlockInputs] = {}
    with Sweep(view, batches) as sweep:
        for at in sweep:
            found[at.index] = BlockInputs()
            at.advance(found[at.index].observe)
    return found
