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

from moe_compress.errors import DataError, nearest

from .reading import Document, Rows, TextSource, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Calibration", "TextSource", "TokenBatches", "TokenWindows", "load_batches", "load_windows"]

FEW = 2  # more sequences per document than this is worth a warning
CHARACTERS_PER_TOKEN = 4  # roughly; decides where long documents are cut
CHUNK = 16  # documents tokenised in one call: the most that is tokenised beyond what is needed


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
    encoder = _Encoder(tokenizer, calibration.length)
    if calibration.packing and encoder.eos is None:
        raise DataError("the tokenizer has no EOS token to separate documents with: set `packing: false`")
    streams = [_Stream(source, root, encoder, calibration, i) for i, source in enumerate(calibration.sources)]
    weighted = any(source.weight for source in calibration.sources)
    quotas = _quotas(streams, asked)
    for stream, quota in zip(streams, quotas, strict=True):
        stream.take(quota)
    while not weighted and (missing := asked - sum(len(s.taken) for s in streams)):
        if not (open_streams := [s for s in streams if not s.exhausted]):
            break
        for stream in open_streams[:missing]:
            stream.take(1)
    _check_enough(calibration, streams, weighted)

    taken = [sequence for stream in streams for sequence in stream.taken]
    if calibration.shuffle:
        random.Random(f"{calibration.seed}").shuffle(taken)
    ids = torch.from_numpy(np.array([sequence for sequence, _ in taken], dtype=np.int64))
    encoder.check(int(ids.max()), vocab_size)
    tags = [tag for _, tag in taken]
    per_domain = Counter("(untagged)" if tag is None else tag for tag in tags)
    per_source = [stream.report() for stream in streams]
    warnings = [
        f"{s.rows.source.name} gave {len(s.taken)} sequences, its share is {quota}"
        for s, quota in zip(streams, quotas, strict=True)
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
    encoder = _Encoder(tokenizer, length)
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


class _Encoder:
    """The tokenizer, with what it puts before a text (`prefix`) and what separates documents (`eos`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        plain, full = self._ids(["a"])[0], self._ids(["a"], special=True)[0]
        self.prefix = full[: next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)]
        if length < len(self.prefix) + 2:
            raise DataError(
                f"length {length} is too short: {len(self.prefix)} tokens are the tokenizer's own beginning"
            )
        most = tokenizer.model_max_length
        self.warnings = (
            [f"length {length} is more than the tokenizer's model_max_length {most}"] if length > most else []
        )

    def _ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        # verbose=False: it warns of texts that are longer than the model takes, but these are cut.
        encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def encode(self, rows: Rows) -> Iterator[tuple[list[int], Document]]:
        """Each document's tokens, without `prefix`, and the document."""
        documents = rows.documents()
        while chunk := list(itertools.islice(documents, CHUNK)):
            for document, ids in zip(chunk, self._ids([self._text(d) for d in chunk]), strict=True):
                own = len(self.prefix) if self.prefix and ids[: len(self.prefix)] == self.prefix else 0
                if ids[own:]:
                    yield ids[own:], document
                else:
                    rows.skipped["no tokens"] += 1

    def _text(self, document: Document) -> str:
        if isinstance(document.value, str):
            return document.value
        if not self.tokenizer.chat_template:
            raise DataError(f"{document.where}: messages, but the tokenizer has no chat template to apply to them")
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(document.value, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{document.where}: the chat template refuses these messages: {one_line(error)}") from error

    def check(self, largest: int, vocab_size: int | None) -> None:
        """Refuse tokens that the model has no embedding for."""
        if vocab_size is not None and largest >= vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"token {largest} ({token!r}) is beyond the model's {vocab_size}: another model's tokenizer?"
            )


class _Stream:
    """One source's sequences, made as they are taken."""

    def __init__(self, source: TextSource, root: Path, encoder: _Encoder, calibration: Calibration, index: int) -> None:
        rng = random.Random(f"{calibration.seed}/{index}") if calibration.shuffle else None
        # One long document mustn't fill the set: when documents are shuffled and joined, its parts are too.
        cut = calibration.shuffle and calibration.packing
        piece = CHARACTERS_PER_TOKEN * calibration.length if cut else None
        self.rows = Rows(source, root, calibration.domains, rng, piece=piece)
        self.taken: list[tuple[list[int], str | None]] = []
        self.exhausted = False
        self.tokens = self.longest = 0  # tokens, tokens of the longest document
        self._used: set[str] = set()
        self._made = (self._packed if calibration.packing else self._cut)(encoder, calibration.length)

    @property
    def used(self) -> int:
        """Documents of which something is in a sequence."""
        return len(self._used)

    def take(self, count: int) -> None:
        """Move up to `count` more sequences to `taken`."""
        new = list(itertools.islice(self._made, count))
        self.taken += new
        self.exhausted = len(new) < count

    def report(self) -> dict[str, Any]:
        """What this source gave."""
        return {
            "source": self.rows.source.name,
            "sequences": len(self.taken),
            "documents_read": self.rows.read,
            "documents_used": self.used,
            "tokens_available": self.tokens,
            "skipped": dict(self.rows.skipped),
        }

    def _packed(self, encoder: _Encoder, length: int) -> Iterator[tuple[list[int], str | None]]:
        body = length - len(encoder.prefix)
        # Of each domain: tokens, and where in them which document begins.
        buffers: dict[str | None, tuple[list[int], list[tuple[int, str]]]] = {}
        for ids, document in encoder.encode(self.rows):
            domain = document.domain
            buffer, starts = buffers.setdefault(domain, ([], []))
            starts.append((len(buffer), document.where))
            buffer += ids
            if encoder.eos is not None and ids[-1] != encoder.eos:  # chat templates may end with it
                buffer.append(encoder.eos)
            self.tokens += len(buffer) - starts[-1][0]
            cut = 0
            while len(buffer) - cut >= body:
                cut += body
                self._used.update(where for start, where in starts if start < cut)
                yield encoder.prefix + buffer[cut - body : cut], domain
            del buffer[:cut]
            starts[:] = [(start - cut, where) for start, where in starts if start >= cut]

    def _cut(self, encoder: _Encoder, length: int) -> Iterator[tuple[list[int], str | None]]:
        for ids, document in encoder.encode(self.rows):
            sequence = encoder.prefix + ids[: length - len(encoder.prefix)]
            self.tokens += len(ids)
            self.longest = max(self.longest, len(encoder.prefix) + len(ids))
            if len(sequence) < length:
                self.rows.skipped["shorter than a sequence"] += 1
            else:
                self._used.add(document.where)
                yield sequence, document.domain


def _quotas(streams: Sequence[_Stream], count: int) -> list[int]:
    """`count` split by the sources' weights, largest remainders rounded up."""
    weights = [stream.rows.source.weight or 1.0 for stream in streams]
    exact = [weight * count / sum(weights) for weight in weights]
    quotas = [int(part) for part in exact]
    rest = count - sum(quotas)
    for i in sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))[:rest]:
        quotas[i] += 1
    return quotas


def _check_enough(calibration: Calibration, streams: Sequence[_Stream], weighted: bool) -> None:
    """Every source must be usable, every wanted domain be met, and the sequences be as many as asked for."""
    seen = {tag for stream in streams for tag in stream.rows.seen}
    for tag in sorted({*(calibration.domains or ())} - seen):
        read = sum(stream.rows.read for stream in streams)
        hint = nearest(tag, seen) or ": no source has a `domain` or `domain_field`"
        raise DataError(f"no document of domain {tag!r} among the {read} that were read{hint}")
    for stream in streams:
        rows = stream.rows
        if stream.exhausted and not rows.usable and not any("domain" in why for why in rows.skipped):
            skipped = ", ".join(f"{count} {why}" for why, count in rows.skipped.items() if count) or "none"
            text = f"{rows.read} read; skipped: {skipped}"
            raise DataError(f"calibration is empty: 0 usable documents in {rows.source.name} ({text})")
    had, asked, length = [len(stream.taken) for stream in streams], calibration.sequences, calibration.length
    most, which = sum(had), "the sources have"
    if most == asked or (calibration.allow_fewer and most):
        return
    if weighted:
        quotas = _quotas(streams, asked)
        short = next(i for i, quota in enumerate(quotas) if had[i] < quota)
        which = f"{streams[short].rows.source.name} has {had[short]} of its {quotas[short]}: by weight there are"
        fits = (n for n in range(asked, 0, -1) if all(q <= h for q, h in zip(_quotas(streams, n), had, strict=True)))
        most = next(fits, 0)
    text = f"documents: {sum(s.rows.usable for s in streams)}, tokens: {sum(s.tokens for s in streams)}"
    if not calibration.packing:
        text += f", at most {max(s.longest for s in streams)} in one; `packing: true` joins documents"
    advice = f"set `sequences` to {most} or `allow_fewer: true`, lower" if most else "lower"
    raise DataError(
        f"{which} {most} sequences of {length} tokens, not {asked} ({text}): {advice} `length`, or add text"
    )


def _digest(tensors: Iterable[torch.Tensor], tags: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for ids in tensors:
        digest.update(f"{list(ids.shape)}".encode() + ids.numpy().astype("<i8").tobytes())
    digest.update(json.dumps(list(tags)).encode())
    return digest.hexdigest()
