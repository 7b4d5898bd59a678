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
- Reading stops when there is enough. Shuffling draws from a buffer of at most 10,000 documents or 64 million
  characters: a smaller source is shuffled as a whole, over a larger one (its files in shuffled order) the buffer moves
  as a window.
- Empty rows, rows of other domains, and documents too short are skipped and counted in `report`. All else that can't be
  used is a `DataError` with file and line.

Letters: N sequences, S tokens of each.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe_compress.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JSON, PLAIN, PARQUET = (".jsonl", ".json"), (".txt", ".md"), (".parquet",)
BUFFER_DOCUMENTS, BUFFER_CHARACTERS = 10_000, 64_000_000
PIECE = 16_384  # characters after which the next blank line of a plain text ends a document
FEW = 2  # more sequences per document than this is worth a warning
CHUNK = 16  # documents tokenised in one call: the most that is tokenised beyond what is needed


class TextSource(BaseModel):
    """Where text comes from: files, or a data set of the `datasets` library."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = Field(
        default=None,
        description="A file, a folder (with its subfolders) or a glob, relative to the recipe. `.jsonl` and `.json` "
        "hold one object per line (`.json` also one array), `.parquet` one row per document; `.txt` and `.md` are cut "
        "at blank lines into documents of about 16,000 characters. All but parquet may be gzipped (`.jsonl.gz`).",
    )
    dataset: str | None = Field(
        default=None,
        description="Instead of `path`: a name for `datasets.load_dataset`, or a folder in its layout. Streamed, "
        "unless HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set: then it is taken from the cache.",
    )
    subset: str | None = Field(default=None, description="The data set's configuration, e.g. `en`.")
    split: str = Field(default="train", description="The data set's split.")
    field: str = Field(
        default="text",
        min_length=1,
        description="What holds the text, or a list of messages `{role, content}`; dots go into nested objects. Of no "
        "meaning for plain text.",
    )
    chat: bool | None = Field(
        default=None,
        description="Whether the field holds messages, to which the tokenizer's chat template is applied. By default "
        "every row is taken for what it is; true and false insist.",
    )
    domain: str | None = Field(default=None, description="A tag for the whole source, e.g. `code`.")
    domain_field: str | None = Field(default=None, description="Instead of `domain`: what holds each row's tag.")
    weight: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="This source's share of the sequences, relative to the others'. Once any source has a weight, "
        "those without count 1, and a source with too little text is an error. With no weights at all every source has "
        "the same share, and the others make up for a source that has too little.",
    )
    limit: int | None = Field(default=None, ge=1, description="Use at most this many documents, the source's first.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a source has either a `path` or a `dataset`")
        if self.path is not None and (mine := {"subset", "split"} & self.model_fields_set):
            raise ValueError(f"`{min(mine)}` belongs to a `dataset`, not to a `path`")
        if self.domain is not None and self.domain_field is not None:
            raise ValueError("a source has a `domain` or a `domain_field`, not both")
        return self

    @property
    def name(self) -> str:
        """What messages and reports call it."""
        return self.path or f"dataset {self.dataset}"


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
        "isn't used. If false, a sequence is the beginning of one document, and shorter documents are dropped.",
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
        return [{"path": item} if isinstance(item, str) else item for item in items]


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
    """Read, tokenise and pack what `calibration` asks for; relative paths are relative to `base_dir`.

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
    rows = _Rows(TextSource(path=str(path), field=field), Path(), one_file=True)
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


class _Document(NamedTuple):
    value: str | list[dict[str, Any]]  # text, or messages
    domain: str | None
    where: str


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

    def encode(self, rows: _Rows) -> Iterator[tuple[list[int], str | None]]:
        """Each document's tokens, without `prefix`, and its tag."""
        documents = rows.documents()
        while chunk := list(itertools.islice(documents, CHUNK)):
            for document, ids in zip(chunk, self._ids([self._text(d) for d in chunk]), strict=True):
                own = len(self.prefix) if self.prefix and ids[: len(self.prefix)] == self.prefix else 0
                if ids[own:]:
                    yield ids[own:], document.domain
                else:
                    rows.skipped["no tokens"] += 1

    def _text(self, document: _Document) -> str:
        if isinstance(document.value, str):
            return document.value
        if not self.tokenizer.chat_template:
            raise DataError(f"{document.where}: messages, but the tokenizer has no chat template to apply to them")
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(document.value, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{document.where}: the chat template refuses these messages: {_line(error)}") from error

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
        self.rows = _Rows(source, root, calibration.domains, rng)
        self.taken: list[tuple[list[int], str | None]] = []
        self.exhausted = False
        self.used = self.tokens = self.longest = 0  # documents, tokens, tokens of the longest document
        self._made = (self._packed if calibration.packing else self._cut)(encoder, calibration.length)

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
        buffers: dict[str | None, tuple[list[int], list[int]]] = {}  # tokens, and where in them documents begin
        for ids, domain in encoder.encode(self.rows):
            buffer, starts = buffers.setdefault(domain, ([], []))
            starts.append(len(buffer))
            buffer += ids
            if encoder.eos is not None and ids[-1] != encoder.eos:  # chat templates may end with it
                buffer.append(encoder.eos)
            self.tokens += len(buffer) - starts[-1]
            cut = 0
            while len(buffer) - cut >= body:
                cut += body
                self.used += len([start for start in starts if cut - body <= start < cut])
                yield encoder.prefix + buffer[cut - body : cut], domain
            del buffer[:cut]
            starts[:] = [start - cut for start in starts if start >= cut]

    def _cut(self, encoder: _Encoder, length: int) -> Iterator[tuple[list[int], str | None]]:
        for ids, domain in encoder.encode(self.rows):
            sequence = encoder.prefix + ids[: length - len(encoder.prefix)]
            self.tokens += len(ids)
            self.longest = max(self.longest, len(encoder.prefix) + len(ids))
            if len(sequence) < length:
                self.rows.skipped["shorter than a sequence"] += 1
            else:
                self.used += 1
                yield sequence, domain


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


class _Rows:
    """One source's usable documents, and the count of what was read and skipped."""

    def __init__(
        self,
        source: TextSource,
        root: Path,
        domains: Sequence[str] | None = None,
        rng: random.Random | None = None,
        one_file: bool = False,
    ) -> None:
        self.source, self.root, self.domains, self.rng, self.one_file = source, root, domains, rng, one_file
        self.read = self.usable = 0
        self.skipped: Counter[str] = Counter()
        self.seen: set[str] = set()

    def documents(self) -> Iterator[_Document]:
        """In file order, or shuffled with `rng`."""
        documents = itertools.islice(self._usable(), self.source.limit)
        return documents if self.rng is None else _shuffled(documents, self.rng)

    def _usable(self) -> Iterator[_Document]:
        source = self.source
        if source.domain is not None:
            self.seen.add(source.domain)
            if self.domains is not None and source.domain not in self.domains:
                self.skipped["source of another domain"] += 1
                return
        for where, row in self._raw():
            self.read += 1
            value, domain = row, source.domain
            if isinstance(row, Mapping):
                value = _lookup(row, source.field, where)
                if source.domain_field is not None:
                    tag = _lookup(row, source.domain_field, where)
                    domain = None if tag is None else str(tag)
            elif source.domain_field is not None:
                raise DataError(f"{where}: plain text has no field {source.domain_field!r}: set `domain` instead")
            if domain is not None:
                self.seen.add(domain)
            if self.domains is not None and domain not in self.domains:
                self.skipped["another domain"] += 1
            elif value is None or value == [] or (isinstance(value, str) and not value.strip()):
                self.skipped["empty"] += 1
            else:
                _check_value(value, source, where)
                self.usable += 1
                yield _Document(value, domain, where)

    def _raw(self) -> Iterator[tuple[str, Any]]:
        if self.source.dataset is not None:
            yield from _dataset_rows(self.source, self.root)
            return
        files = self._files()
        if self.rng is not None and self.source.limit is None:
            self.rng.shuffle(files)
        columns = [name for name in (self.source.field, self.source.domain_field) if name is not None]
        for file in files:
            kind = _kind(file)
            if kind in JSON:
                yield from _json_rows(file)
            elif kind in PARQUET:
                yield from _parquet_rows(file, columns)
            else:
                yield from _plain_rows(file, whole=self.one_file)

    def _files(self) -> list[Path]:
        path = self.root / Path(str(self.source.path)).expanduser()
        if path.is_file():
            found = [path]
        elif self.one_file:
            raise DataError(f"{path}: {'is a folder, give one file' if path.is_dir() else 'no such file'}")
        elif path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
            found = [file for file in inside if _kind(file) and "/." not in f"/{file.relative_to(path).as_posix()}"]
            if len(found) < len(inside):
                self.skipped["file hidden or of another kind"] += len(inside) - len(found)
            if not found:
                raise DataError(f"{path}: the folder has no {', '.join(JSON + PLAIN + PARQUET)} file")
        elif glob.has_magic(str(path)):
            found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
            if not found:
                raise DataError(f"{path}: no file matches")
        else:
            beside = [file.name for file in path.parent.glob("*")]
            raise DataError(f"{path}: no such file or folder{nearest(path.name, beside) if len(beside) < 100 else ''}")
        if unknown := [file for file in found if not _kind(file)]:
            raise DataError(f"{unknown[0]}: must be {', '.join(JSON + PLAIN)} (or these with .gz), or .parquet")
        return found


def _kind(file: Path) -> str:
    """Its format's suffix, or '' if it isn't one of ours."""
    suffix = (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()
    return suffix if suffix in JSON + PLAIN or (suffix in PARQUET and file.suffix != ".gz") else ""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, gzipped or not, with their ends."""
    offset = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                offset += len(raw)
                try:
                    yield number, text.decode()
                except UnicodeDecodeError as error:
                    at = offset - len(text) + error.start
                    raise DataError(f"{path}:{number}: not UTF-8: 0x{text[error.start]:02x} at byte {at}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {_line(error)}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    lines = _lines(path)
    for number, line in lines:
        if not line.strip():
            continue
        array = _kind(path) == ".json" and line.lstrip().startswith("[")
        try:
            parsed = json.loads(line + "".join(rest for _, rest in lines) if array else line.rstrip())
        except json.JSONDecodeError as error:
            at = number + error.lineno - 1
            raise DataError(f"{path}:{at}: broken JSON: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise DataError(f"{path}:{number}: broken JSON: nested too deeply") from None
        for i, row in enumerate(parsed if array else [parsed]):
            where = f"{path} element {i}" if array else f"{path}:{number}"
            if not isinstance(row, dict):
                raise DataError(f"{where}: must be a JSON object, not {type(row).__name__}")
            yield where, row


def _plain_rows(path: Path, whole: bool) -> Iterator[tuple[str, Any]]:
    piece: list[str] = []
    size, begin = 0, 1
    for number, line in _lines(path):
        piece.append(line)
        size += len(line)
        if not whole and ((size >= PIECE and not line.strip()) or size >= 4 * PIECE):
            yield f"{path}:{begin}", "".join(piece)
            piece, size, begin = [], 0, number + 1
    if piece:
        yield f"{path}:{begin}", "".join(piece)


def _parquet_rows(path: Path, columns: Iterable[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            tops = {name: name if name in known else name.split(".")[0] for name in columns}
            for name, top in tops.items():
                if top not in known:
                    raise DataError(f"{path}: no field {name!r}{nearest(name, known)}")
            for batch in file.iter_batches(batch_size=256, columns=list(tops.values())):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as parquet after row {number}: {_line(error)}") from error


def _dataset_rows(source: TextSource, root: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    local = root / str(source.dataset)
    name = str(local) if local.is_dir() else source.dataset
    offline = datasets.config.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE
    number = 0
    try:
        streaming = local.is_dir() or not offline  # what is only in the cache can't be streamed
        for row in datasets.load_dataset(name, source.subset, split=source.split, streaming=streaming):
            number += 1
            yield f"{source.name} row {number}", row
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source.name}: can't be read after row {number}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Another library's error on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _lookup(row: Mapping[str, Any], name: str, where: str) -> Any:
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = value if isinstance(value, Mapping) else row
            raise DataError(f"{where}: no field {name!r}{nearest(part, known)}")
        value = value[part]
    return value


def _check_value(value: Any, source: TextSource, where: str) -> None:
    field = f"{where}: field {source.field!r}"
    if not isinstance(value, str | list):
        raise DataError(f"{field} is {type(value).__name__}, neither text nor a list of messages")
    if isinstance(value, str):
        if source.chat:
            raise DataError(f"{field} is text, but `chat: true` wants a list of messages")
        return
    if source.chat is False:
        raise DataError(f"{field} is a list, but `chat: false` wants text")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            has = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
            raise DataError(f"{field}: message {i} must have role and content, not {has}")


def _shuffled(documents: Iterable[_Document], rng: random.Random) -> Iterator[_Document]:
    """Random ones out of a buffer that is kept full."""
    buffer: list[tuple[int, _Document]] = []
    size = 0
    for document in documents:
        value = document.value
        buffer.append((len(value if isinstance(value, str) else str(value)), document))
        size += buffer[-1][0]
        while len(buffer) >= BUFFER_DOCUMENTS or size >= BUFFER_CHARACTERS:
            at = rng.randrange(len(buffer))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            characters, chosen = buffer.pop()
            size -= characters
            yield chosen
    rng.shuffle(buffer)
    yield from (document for _, document in buffer)
