"""A checkpoint's tokenizer as GGUF files hold it.

Promise: what is written tokenizes in llama.cpp as tokenizer.json does in transformers, or nothing is written:
`read_tokenizer` is asked before any work and refuses what it can't tell for sure. Two kinds are known: byte-level BPE
("gpt2" in the file), whose splitting rule llama.cpp must know under a name, and BPE with byte fallback as SentencePiece
makes it ("llama"), for which it needs scores.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moe_compress.errors import InputError, RecipeError

from .gguf_architectures import package

# Token types of the format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# What a pre-tokenizer's parts amount to as regular expressions → the name that llama.cpp has for it.
_BYTES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+".replace('\\"', '"'),
)
_SPLITS: dict[tuple[str, ...], str] = {
    (_BYTES,): "gpt-2",
    (r"\p{N}", _BYTES): "smollm",
    (_WORDS.replace("DIGITS", r"\p{N}"),): "qwen2",
    (_WORDS.replace("DIGITS", r"\p{N}{1,3}"),): "dbrx",
    _DEEPSEEK3: "deepseek-v3",
}


@dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer, ready to be written.

    Attributes:
        folder: where it comes from.
        model, pre: kind, and splitting rule, as llama.cpp calls them.
        tokens, types: by id.
        scores: of "llama" only.
        merges: of "gpt2" only.
        adds: "bos" and "eos" → whether texts begin or end with it.
    """

    folder: Path
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    adds: dict[str, bool]

    def write(self, writer: Any) -> None:
        """Add it to a file's metadata, special tokens and chat template included."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        special = package().SpecialVocab(self.folder, load_merges=False, n_vocab=len(self.tokens))
        special.add_special_token = dict(self.adds)
        special.add_to_gguf(writer, quiet=True)


def read_tokenizer(folder: Path, vocabulary: int, pre: str | None = None) -> FileTokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: with tokenizer.json (and tokenizer.model, whose scores are then taken).
        vocabulary: rows of the embedding; ids without a token are padded.
        pre: name of the splitting rule, where it can't be told.

    Raises:
        InputError: there is no tokenizer.json, or it doesn't fit the model.
        RecipeError: it is of a kind that isn't written, or splits in a way whose name isn't known.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"target 'llama.cpp' writes the tokenizer into the file, and {folder} has no tokenizer.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    model = values["model"]
    if model.get("type") != "BPE":
        raise RecipeError(f"{path}: a {model.get('type')} tokenizer; for llama.cpp only BPE ones are written")
    added = {int(t["id"]): t for t in values.get("added_tokens") or ()}
    ids = {**{int(i): t for t, i in model["vocab"].items()}, **{i: t["content"] for i, t in added.items()}}
    if max(ids) >= vocabulary:
        raise InputError(f"{path} has token {max(ids)}, and the model's vocabulary ends at {vocabulary - 1}")
    types = [_type(i, ids, added) for i in range(vocabulary)]
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(vocabulary)]
    # Tokens of users are looked for in the text itself, before spaces are replaced.
    tokens = [t.replace("▁", " ") if kind == USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)]
    adds = _added_around(path, folder)
    if model.get("byte_fallback"):
        scores = _scores(folder, model, tokens)
        for i, token in enumerate(tokens):
            if types[i] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[i] = BYTE
            elif token == model.get("unk_token"):
                types[i] = UNKNOWN
        return FileTokenizer(folder, "llama", pre or "default", tokens, types, scores, None, adds)
    parts = list(_parts(values.get("pre_tokenizer"), path))
    known = pre or _split_name(parts, bool(model.get("ignore_merges")))
    if known is None:
        raise RecipeError(
            f"{path}: llama.cpp has to know by name how text is split, and this way ({parts[:2]}) is not known here: "
            "set `tokenizer_pre` in quantize.gguf to its name there"
        )
    return FileTokenizer(folder, "gpt2", known, tokens, types, None, _merges(model), adds)


def _type(token: int, ids: dict[int, str], added: dict[int, Any]) -> int:
    if token not in ids:
        return UNUSED
    if token not in added:
        return NORMAL
    return CONTROL if added[token].get("special") else USER_DEFINED


def _pairs(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _merges(model: dict[str, Any]) -> list[str]:
    """As "left right"; a space within a part is written as byte-level BPE writes spaces."""
    space = chr(256 + ord(" "))
    return [" ".join(part.replace(" ", space) for part in pair) for pair in _pairs(model)]


def _parts(entry: Any, path: Path) -> Iterator[str]:
    """The regular expressions by which a pre-tokenizer splits, in order."""
    kind = (entry or {}).get("type")
    if kind == "Sequence":
        for part in entry["pretokenizers"]:
            yield from _parts(part, path)
    elif kind == "Split":
        pattern = entry["pattern"]
        yield str(pattern.get("Regex", pattern.get("String"))).replace("\r", r"\r").replace("\n", r"\n")
    elif kind == "Digits":
        yield r"\p{N}" if entry.get("individual_digits") else r"\p{N}+"
    elif kind == "ByteLevel":
        if entry.get("add_prefix_space"):
            raise RecipeError(f"{path}: puts a space before every text, which byte-level BPE in llama.cpp doesn't")
        if entry.get("use_regex", True):
            yield _BYTES
    else:
        raise RecipeError(f"{path}: splits text by {kind!r}, for which llama.cpp has no name")


def _split_name(parts: list[str], ignores_merges: bool) -> str | None:
    found = _SPLITS.get(tuple(parts))
    if found == "dbrx" and ignores_merges:
        return "llama-bpe"
    if found is None and parts[:1] == [r"[\r\n]"] and len(parts) > 1:
        starts = {r"\s?[A-Za-zµ": "deepseek-llm", r"\s?\p{L}+": "deepseek-coder"}
        found = next((name for start, name in starts.items() if parts[1].startswith(start)), None)
    return found


def _added_around(path: Path, folder: Path) -> dict[str, bool]:
    """Whether texts get a token before and after them."""
    tokenizer = Tokenizer.from_file(str(path))
    bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    # tokenizer_config.json may say so beside tokenizer.json; transformers heeds both.
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    before = whole[0] != bare[0] or bool(said.get("add_bos_token"))
    after = whole[-1] != bare[-1] or bool(said.get("add_eos_token"))
    return {"bos": before, "eos": after}


def _scores(folder: Path, model: dict[str, Any], tokens: list[str]) -> list[float]:
    """What llama.cpp merges by: the highest score first. From tokenizer.model, or in the order of the merges."""
    if (folder / "tokenizer.model").is_file():
        stored = dict(_pieces((folder / "tokenizer.model").read_bytes()))
        return [stored.get(token, -1000.0) for token in tokens]
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(_pairs(model)):
        rank.setdefault(left + right, number)
    return [-float(rank[token] + 1) if token in rank else 0.0 for token in tokens]


def _pieces(data: bytes) -> Iterator[tuple[str, float]]:
    """Pieces and scores of a SentencePiece model: field 1 of the message, in it text (1) and score (2)."""
    for number, value in _message(data):
        if number == 1:
            fields = dict(_message(value))
            score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
            yield fields[1].decode("utf-8"), score


def _message(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a protocol buffers message: (number, bytes)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            value = varint()
            yield number, value.to_bytes(8, "little", signed=False)
            continue
        size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        yield number, data[at : at + size]
        at += size
