"""Tokenizers as GGUF metadata has them: tokens, their types, merges or scores, and how text is split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import DEMO

from moe_compress.errors import InputError, RecipeError
from moe_compress.export.gguf_tokenizer import read_tokenizer


def rewritten(folder: Path, **changes: Any) -> Path:
    """The demo's tokenizer with other values in tokenizer.json."""
    values = json.loads((DEMO / "moe-demo" / "tokenizer.json").read_text())
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({**values, **changes}))
    return folder


def test_a_byte_level_tokenizer(tmp_path):
    found = read_tokenizer(DEMO / "moe-demo", 4100)
    values = json.loads((DEMO / "moe-demo" / "tokenizer.json").read_text())
    assert (found.model, found.pre) == ("gpt2", "smollm")  # single digits, then the splits of GPT-2
    assert found.tokens[:4096] == sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    assert found.tokens[4096:] == [f"[PAD{i}]" for i in range(4096, 4100)]
    assert found.types[0] == 3  # control
    assert found.types[4096] == 5  # unused
    assert set(found.types[1:4096]) == {1}
    assert found.merges is not None
    assert len(found.merges) == len(values["model"]["merges"])
    assert all(merge.count(" ") == 1 for merge in found.merges)
    assert found.adds == {"bos": False, "eos": False}


def test_splits_are_known_by_name_or_asked_for(tmp_path):
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    qwen = rewritten(tmp_path / "qwen", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})
    assert read_tokenizer(qwen, 4096).pre == "qwen2"
    split = {**split, "pattern": {"Regex": words.replace(r"\p{N}|", r"\p{N}{1,2}|")}}
    other = rewritten(tmp_path / "other", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})
    with pytest.raises(RecipeError, match="set `tokenizer_pre`"):
        read_tokenizer(other, 4096)
    assert read_tokenizer(other, 4096, "qwen35").pre == "qwen35"


def test_a_tokenizer_with_byte_fallback(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7, "▁ab": 8}
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["a b", "▁ ab"], "byte_fallback": True, "unk_token": "<unk>"}
    added = [{"id": i, "content": c, "special": True} for i, c in ((1, "<s>"), (2, "</s>"))]
    added = [{**a, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} for a in added]
    around = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    parts = {"pre_tokenizer": None, "decoder": None, "post_processor": around}
    folder = rewritten(tmp_path / "spm", model=model, added_tokens=added, **parts)
    found = read_tokenizer(folder, 9)
    assert found.model == "llama"
    assert found.types == [2, 3, 3, 6, 1, 1, 1, 1, 1]
    assert found.scores is not None
    assert found.scores[7] > found.scores[8]  # what is merged first has the higher score
    assert found.adds == {"bos": True, "eos": False}
    pieces = b""
    for token, score in (("ab", -1.5), ("▁ab", -2.25)):
        text = token.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(score).tobytes() + b"\x18\x01"
        pieces += b"\x0a" + bytes([len(piece)]) + piece
    (folder / "tokenizer.model").write_bytes(pieces)
    scores = read_tokenizer(folder, 9).scores
    assert scores is not None
    assert scores[7:] == [-1.5, -2.25]


def test_tokenizers_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        read_tokenizer(tmp_path / "none", 10)
    with pytest.raises(InputError, match="has token 4095, and the model's vocabulary ends at 99"):
        read_tokenizer(DEMO / "moe-demo", 100)
    unigram = rewritten(tmp_path / "unigram", model={"type": "Unigram", "vocab": []})
    with pytest.raises(RecipeError, match="a Unigram tokenizer"):
        read_tokenizer(unigram, 10)
