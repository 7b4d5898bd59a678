"""A few tokens and what the model says to them: how a written checkpoint is recognised as the one that was computed.

Per position the largest logits and the logarithm of the sum of all exponentials are kept; that pins the distribution
down and fits in a JSON file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep

TOKENS = 32
KEPT = 16
_TEXT = "Each token is sent to a few experts; what they say is weighed, added, and handed on to the next layer. " * 4
# Relative to the spread of the logits: float32 differs by summation order only, 16-bit computing by its rounding.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}


def probe_tokens(ids: Tensor | None, tokenizer: Any) -> list[int]:
    """Tokens of text that the run reads anyway, of a fixed sentence, or (without a tokenizer) small ids."""
    if ids is not None and ids.numel():
        return [int(i) for i in ids.reshape(-1)[:TOKENS]]
    if tokenizer is not None:
        return [int(i) for i in tokenizer(_TEXT)["input_ids"][:TOKENS]]
    return list(range(10, 10 + TOKENS))


@torch.no_grad()
def streamed(model: MoEModel, tokens: list[int]) -> dict[str, Any]:
    """The probe of a model, one layer in memory."""
    with Sweep(model, [{"input_ids": torch.tensor([tokens])}]) as sweep:
        for step in sweep:
            step.advance()
        logits = next(sweep.outputs())[1]
    return summary(tokens, logits[0], model.dtype)


def summary(tokens: list[int], logits_TV: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What is kept of logits [T, V]: the largest, where they are, the spread, and log Σ exp of each position.

    `dtype`: in what they were computed, which says how near another computation comes.
    """
    logits = logits_TV.float().cpu()
    largest = logits.topk(min(KEPT, logits.shape[-1]), dim=-1)
    return {
        "input_ids": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "index": largest.indices.tolist(),
        "logits": [[round(v, 6) for v in row] for row in largest.values.tolist()],
        "logsumexp": [round(v, 6) for v in logits.logsumexp(-1).tolist()],
        "spread": round(float(logits.std()), 6),
    }


def distance(expected: dict[str, Any], logits_TV: Tensor) -> float:
    """Largest difference between a kept probe and logits [T, V], relative to the spread of the kept ones."""
    logits = logits_TV.float().cpu()
    index = torch.tensor(expected["index"])
    change = (logits.gather(1, index) - torch.tensor(expected["logits"])).abs().max()
    total = (logits.logsumexp(-1) - torch.tensor(expected["logsumexp"])).abs().max()
    worst = float(torch.maximum(change, total)) / max(expected["spread"], 1e-6)
    return worst if worst == worst else float("inf")
