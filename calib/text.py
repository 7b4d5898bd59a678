"""Text to token batches: what calibration and evaluation read, and an account of what they didn't.

The contract:
- Equal settings and files give equal tokens; `digest` says whether two runs saw the same ones.
- `load_batches` fills N sequences of exactly S tokens. Nothing is padded: a padding token would be routed like text and
  counted in every statistic. A document is tokenised without special tokens, and the separator EOS follows it.
- If the tokenizer begins a text with tokens of its own (BOS), *every* sequence and window begins with them, and they
  count towards its length: models that were trained with BOS put their attention sink there, and statistics without it
  are of states that the model is never in. A document's own leading BOS (chat templates write one) is dropped, so that
  BOS is at position 0 and nowhere else.
- Documents of different domains never share a sequence, so that every sequence has one tag.
- What is shuffled and joined is no longer than about one sequence: a longer document is cut, at a blank, into documents
  of their own. Otherwise a few long documents would be all that a calibration sees.
- Reading stops when there is enough. Shuffling draws from a buffer of at most 10,000 documents or 64 million
  characters: a smaller source is shuffled as a whole, over a larger one (its files in shuffled order) the buffer moves
  as a window.
- Empty rows, rows of other domains, and documents too short are skipped and counted in `report`. All else that can't be
  used is a `DataError` with file and line.

Letters: N sequences, S tokens of each.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from moe_compress.errors import DataError

from .reading import Rows, TextSource
from .sequences import Encoder, Stream, check_enough, quotas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Calibration", "TextSource", "TokenBatches", "TokenWindows", "load_batches", "load_windows"]

FEW = 2  # more sequences per document than this is worth a warning


class Calibration(BaseModel):
    """The text that statistics are measured on, and how much of it."""

    model_config = ConfigDict(extra="forbid")

    sources: list[TextSource] = Field(
        min_length=1, description="Where the text comes from: a path, a source, or a list of them."
    )
    sequences: int = Field(default=128, ge=1, description="How many sequences.")
    length: int = Field(
        default=2048, ge=2, description="Tokens of a sequence, those that the tokenizer puts first included."
    )
    packing: bool = Field(
        default=True,
        description="Join documents, each followed by EOS, and cut them into sequences; what is left over of a domain "
        "isn't used. When shuffled, documents longer than about a sequence are cut first. If false, a sequence is the "
        "beginning of one document, and shorter documents are dropped.",
    )
    seed: int = Field(default=0, description="Of the shuffling.")
    shuffle: bool = Field(
        default=True, description="Shuffle files, documents and sequences. If false, the first ones are taken."
    )
    domains: list[str] | None = Field(
        default=None, min_length=1, description="Use only documents with one of these tags."
    )
    balance: bool = Field(
        default=False,
        description="Take equally many sequences of every domain of a source, as far as there are; otherwise domains "
        "come as the text has them.",
    )
    batch_size: int = Field(default=8, ge=1, description="Sequences per forward call.")
    allow_fewer: bool = Field(
        default=False,
        description="Go on with fewer sequences (never with none) if the sources hold too little text, which by "
        "default is an error.",
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        return [{"path": str(item)} if isinstance(item, str | Path) else item for item in items]


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Sequences of equal length.

    `ids`: int64 [N, S]. `domain`: the tag of each sequence, or None. `digest`: sha256 over both. `report`: plain data:
    documents read and used, tokens, sequences per domain and per source, rows skipped and why, warnings.
    """

    ids: torch.Tensor
    domain: list[str | None]
    digest: str
    report: dict[str, Any]

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Consecutive `(ids [b, S], sequence indices)` with b <= `batch_size`."""
        for start in range(0, len(self.ids), batch_size):
            part = self.ids[start : start + batch_size]
            yield part, list(range(start, start + len(part)))


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """One text in windows. `first[i]` is the first token of `windows[i]` (int64 [S]) whose prediction counts.

    `predicted`: how many tokens count in all; no token counts twice. `digest`, `report`: as in `TokenBatches`.
    """

    windows: list[torch.Tensor]
    first: list[int]
    predicted: int
    digest: str
    report: dict[str, Any]

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """`(ids [b, S], window indices)` with b <= `batch_size`, windows of equal length together, in order."""
        for _, run in itertools.groupby(range(len(self.windows)), key=lambda i: len(self.windows[i])):
            indices = list(run)
            for start in range(0, len(indices), batch_size):
                part = indices[start : start + batch_size]
                yield torch.stack([self.windows[i] for i in part]), part


def load_batches(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: str | Path,
    *,
    vocab_size: int | None = None,
) -> TokenBatches:
    """Read, tokenise and pack what `calibration` asks for; relative paths are relative to `base_dir`, which for
    recipes is the working directory.

    Raises `DataError`: missing or unreadable files, rows that aren't what their source says, no usable text, fewer
    sequences than asked for (says how many there are), no EOS to separate documents with, or a token id that
    `vocab_size`, the model's, doesn't include.
    """
    asked, root = calibration.sequences, Path(base_dir)
    encoder = Encoder(tokenizer, calibration.length)
    if calibration.packing and encoder.eos is None:
        raise DataError("the tokenizer has no EOS token to separate documents with: set `packing: false`")
    streams = [Stream(source, root, encoder, calibration, i) for i, source in enumerate(calibration.sources)]
    weighted = any(source.weight for source in calibration.sources)
    shares = quotas(streams, asked)
    for stream, quota in zip(streams, shares, strict=True):
        stream.take(quota)
    while not weighted and (missing := asked - sum(len(s.taken) for s in streams)):
        if not (open_streams := [s for s in streams if not s.exhausted]):
            break
        for stream in open_streams[:missing]:
            stream.take(1)
    check_enough(calibration, streams, weighted)

    taken = [sequence for stream in streams for sequence in stream.taken]
    if calibration.shuffle:
        random.Random(f"{calibration.seed}").shuffle(taken)
    ids = torch.from_numpy(np.array([sequence.ids for sequence in taken], dtype=np.int64))
    encoder.check(int(ids.max()), vocab_size)
    tags = [sequence.domain for sequence in taken]
    per_domain = Counter("(untagged)" if tag is None else tag for tag in tags)
    per_source = [stream.report() for stream in streams]
    warnings = [
        f"{s.rows.source.name} gave {len(s.taken)} sequences, its share is {quota}"
        for s, quota in zip(streams, shares, strict=True)
        if len(s.taken) < max(quota, 1)
    ]
    if (used := sum(s.used for s in streams)) * FEW < len(taken):
        warnings.append(f"little variety: {len(taken)} sequences are of only {used} documents")
    report = {
        "sequences": len(taken),
        "length": calibration.length,
        **{key: sum(r[key] for r in per_source) for key in ("documents_read", "documents_used", "tokens_available")},
        "tokens_used": ids.numel(),
        "everything_read": all(s.exhausted for s in streams),
        "sequences_per_domain": {tag: per_domain[tag] for tag in sorted({*per_domain, *(calibration.domains or ())})},
        "skipped": dict(sum((s.rows.skipped for s in streams), Counter[str]())),
        "sources": per_source,
        "prefix": encoder.prefix,
        "separator": encoder.eos if calibration.packing else None,
        "warnings": encoder.warnings + warnings,
    }
    return TokenBatches(ids, tags, _digest([ids], tags), report)


def load_windows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    stride: int | None = None,
    field: str = "text",
    max_tokens: int | None = None,
    *,
    vocab_size: int | None = None,
) -> TokenWindows:
    """The documents of one file, in order and joined with EOS, as windows of `length` tokens, the last one shorter.

    A plain text is one document. Windows don't overlap unless `stride`, the tokens from one window's beginning to the
    next's, is less than what a window holds; then tokens that the window before has predicted are context only.
    `max_tokens`: use only the beginning of the text. What the tokenizer puts first begins every window and is part of
    `length`; without it a window's first token isn't predicted. A last window with nothing to predict is dropped.

    Raises `DataError` as `load_batches`, and if the text has nothing to predict; `ValueError` for a `stride` or
    `max_tokens` out of range.
    """
    encoder = Encoder(tokenizer, length)
    prefix, body = encoder.prefix, length - len(encoder.prefix)
    step = body if stride is None else stride
    if not 1 <= step <= body or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"stride must be 1 to {body} and max_tokens at least 1, not {stride} and {max_tokens}")
    rows = Rows(TextSource(path=str(path), field=field), Path(), one_file=True)
    text: list[int] = []
    used = 0
    for ids, _ in encoder.encode(rows):
        if text and encoder.eos is None:
            raise DataError(f"{path}: the tokenizer has no EOS token to separate documents with")
        if text and encoder.eos is not None and text[-1] != encoder.eos:
            text.append(encoder.eos)
        text += ids
        used += 1
        if max_tokens is not None and len(text) >= max_tokens:
            del text[max_tokens:]
            break
    windows: list[torch.Tensor] = []
    first: list[int] = []
    end = 0
    while end < len(text):
        start = len(windows) * step
        first.append(max(len(prefix) + end - start, 1))
        end = min(start + body, len(text))
        windows.append(torch.tensor(prefix + text[start:end], dtype=torch.int64))
    if windows and len(windows[-1]) <= first[-1]:
        del windows[-1], first[-1]
    predicted = sum(len(window) for window in windows) - sum(first)
    if not predicted:
        raise DataError(f"{path} has nothing to predict: {len(text)} tokens in {used} usable documents")
    encoder.check(max(text), vocab_size)
    report = {
        "documents_read": rows.read,
        "documents_used": used,
        "tokens": len(text),
        "windows": len(windows),
        "predicted": predicted,
        "length": length,
        "stride": step,
        "skipped": dict(rows.skipped),
        "prefix": prefix,
        "separator": encoder.eos,
        "warnings": encoder.warnings,
    }
    return TokenWindows(windows, first, predicted, _digest(windows, first), report)


def _digest(tensors: Iterable[torch.Tensor], tags: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for ids in tensors:
        digest.update(f"{list(ids.shape)}".encode() + ids.numpy().astype("<i8").tobytes())
    digest.update(json.dumps(list(tags)).encode())
    return digest.hexdigest()
