"""The demo checkpoint as benchmarks use it: itself, its calibration text, and the six texts that it is scored on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compress.calib.text import Calibration, TextSource, TokenBatches, load_batches

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "moe-demo"


def load_demo() -> tuple[Any, Any]:
    """Tokenizer and model, the latter in float32."""
    return AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def calibration_text(tokenizer: Any, sequences: int, seed: int = 0) -> TokenBatches:
    """So many sequences of 256 tokens, the domains in equal parts."""
    source = TextSource(path=str(ROOT / "demo/calibration.jsonl"), domain_field="domain")
    settings = Calibration(sources=[source], length=256, sequences=sequences, balance=True, seed=seed)
    return load_batches(settings, tokenizer, ROOT)


def six_texts(tokens: int) -> dict[str, Any]:
    """`evaluate` for so many tokens of each of the six texts."""
    return {"text": [str(ROOT / "demo/text/*.jsonl")], "length": 256, "max_tokens": tokens}
