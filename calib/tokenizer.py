"""The tokenizer of a checkpoint folder, if it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def find_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, or None: whoever needs one says so."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # Without files some families get a tokenizer that knows no words.
    return tokenizer if tokenizer("a", add_special_tokens=False)["input_ids"] else None
