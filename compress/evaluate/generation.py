"""What a model writes: greedy continuations of held-out prompts, and how much of them is said again.

Perplexity and multiple choice hide a kind of damage that shows when a model reads what it has written itself: it falls
into loops. The check is greedy (nothing is drawn) and counts n-grams of tokens, nothing of it is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from moe_compress.errors import DataError
from moe_compress.recipe import Generation

from .text import WindowBatch

# Prompts that are continued at a time.
_BATCH = 8
# A continuation loops if more than this share of its n-grams has been there before.
_LOOPS = 0.5


@dataclass(frozen=True)
class Continuations:
    """Tokens that followed each prompt, up to the end of the text if the model ended it."""

    tokens: list[list[int]]

    def summary(self, ngram: int, original: Continuations | None = None) -> dict[str, float]:
        """Numbers for the report.

        Returns:
            `repetition`: mean over prompts of the share of n-grams that occurred before in the same continuation (0 for
            one shorter than an n-gram); `looping`: share of prompts where it is more than a half; `tokens`: mean
            length; and with the original's, `as_original`: mean number of tokens before the first that differs.
        """
        rates = [repetition(tokens, ngram) for tokens in self.tokens]
        count = len(rates)
        found = {
            "repetition": sum(rates) / count,
            "looping": sum(rate > _LOOPS for rate in rates) / count,
            "tokens": sum(map(len, self.tokens)) / count,
        }
        if original is not None:
            pairs = zip(self.tokens, original.tokens, strict=True)
            found["as_original"] = sum(common_prefix(a, b) for a, b in pairs) / count
        return found


def repetition(tokens: Sequence[int], ngram: int) -> float:
    """Share of n-grams that occurred before in the sequence: 1 − distinct / all; 0 where there is none."""
    grams = [tuple(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of tokens before the first that differs."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))


def choose_prompts(batches: Sequence[WindowBatch], wanted: Generation) -> Tensor:
    """The first tokens of windows spread evenly over all texts, [prompts, prompt]. Raises DataError for too few."""
    rows = [ids[: wanted.prompt] for batch in batches for ids in batch.ids if len(ids) >= wanted.prompt]
    if len(rows) < wanted.prompts:
        raise DataError(
            f"evaluate.generation asks for {wanted.prompts} prompts of {wanted.prompt} tokens, and the texts have "
            f"{len(rows)} windows as long: ask for fewer, or give more text or a larger max_tokens"
        )
    return torch.stack([rows[i * len(rows) // wanted.prompts] for i in range(wanted.prompts)])


@torch.no_grad()
def continued(model: nn.Module, prompts_PS: Tensor, wanted: Generation, progress: Any = None) -> Continuations:
    """Greedy continuations by a loaded model, through its own `generate`."""
    module: Any = model
    own = getattr(module, "generation_config", None)
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else module.config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    # A config of its own: the model's may penalise repetition, which is what is measured.
    config = GenerationConfig(
        max_new_tokens=wanted.tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    found: list[list[int]] = []
    was, module.generation_config = own, config
    try:
        for number, part in enumerate(prompts_PS.split(_BATCH)):
            ids = part.to(module.device)
            written = module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            for row in written[:, ids.shape[1] :].tolist():
                stop = next((place for place, token in enumerate(row) if token in ends), len(row))
                found.append(row[:stop])
            if progress is not None:
                progress.layer(number)
    finally:
        module.generation_config = was
    return Continuations(found)
