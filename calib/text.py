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

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe_compress.errors import DataError

from .balance import ExpertBalance
from .batches import TokenBatches, digest
from .reading import Rows, TextSource
from .sequences import Encoder, Made, Stream, check_enough, quotas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Calibration",
    "Draft",
    "TextSource",
    "TokenBatches",
    "TokenWindows",
    "load_batches",
    "load_windows",
    "read_draft",
]

POOL = 4  # times `sequences`: candidates of `expert_balance`, unless it says how many
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
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
    expert_balance: ExpertBalance | None = Field(
        default=None,
        description="Add sequences until every expert of every layer sees enough tokens: a ratio, or {ratio, most, "
        "pool}. Costs one sweep over the candidates.",
    )
    modality_weights: dict[Literal["text", "image", "video", "audio"], NonNegative] | Literal["auto"] | None = Field(
        default=None,
        description="What a token of each modality counts in statistics and Hessians, e.g. {text: 1.0, image: 0.3}; "
        "those not named count 1. auto: the inverse of the modality's share, so that all modalities count alike.",
    )
    batch_size: int = Field(default=8, ge=1, description="Sequences of text per forward call.")
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

    @field_validator("expert_balance", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> Any:
        return {"ratio": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.expert_balance is not None and (self.expert_balance.most or self.sequences) < self.sequences:
            raise ValueError(f"expert_balance.most is less than the {self.sequences} `sequences` that are asked for")
        written = [source for source in self.sources if source.self_sampling is not None]
        if len(written) == len(self.sources) and self.expert_balance is not None:
            raise ValueError("expert_balance chooses among text that is read, and all sources are `self_sampling`")
        for source in written:
            if self.domains is not None and source.domain not in self.domains:
                raise ValueError(f"a source with self_sampling has the domain {source.domain}, not one of `domains`")
        return self

    @property
    def has_images(self) -> bool:
        """Whether a source has images."""
        return any(source.image_field is not None for source in self.sources)


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


@dataclass(frozen=True, eq=False)
class Draft:
    """What of a calibration can be read without running the model; `draft.finish` makes the rest.

    Attributes:
        settings: the calibration.
        text: the sequences of files and data sets.
        pool: further ones, from which `expert_balance` chooses; None without it.
        sampled: number of a source → how many sequences the model is to write for it.
        encoder: tokenizer, beginning and separator.
    """

    settings: Calibration
    text: TokenBatches
    pool: TokenBatches | None
    sampled: dict[int, int]
    encoder: Encoder

    @property
    def needs_model(self) -> bool:
        """Whether the model has a say in which sequences there are."""
        return self.pool is not None or bool(self.sampled)

    @property
    def digest(self) -> str:
        """Identifies what was read; with the settings and the model, the sequences that will be there."""
        return self.text.digest if self.pool is None else f"{self.text.digest}+{self.pool.digest}"


def load_batches(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: str | Path,
    *,
    vocab_size: int | None = None,
    processor: Any = None,
) -> TokenBatches:
    """`read_draft` for settings that don't ask the model (no `expert_balance`, no `self_sampling`).

    Raises `DataError` as it does, and for settings that do: `compress` and recipes take those.
    """
    draft = read_draft(calibration, tokenizer, base_dir, vocab_size=vocab_size, processor=processor)
    if draft.needs_model:
        raise DataError("`expert_balance` and `self_sampling` run the model: give them to `compress` or a run")
    return weighed(calibration, draft.text)


def read_draft(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: str | Path,
    *,
    vocab_size: int | None = None,
    processor: Any = None,
) -> Draft:
    """Read, tokenise and pack what `calibration` asks for; relative paths are relative to `base_dir`, which for
    recipes is the working directory. Sources with images need the model's `processor`.

    Raises `DataError`: missing or unreadable files, rows that aren't what their source says, no usable text, fewer
    sequences than asked for (says how many there are), no EOS to separate documents with, or a token id that
    `vocab_size`, the model's, doesn't include.
    """
    sources, root = calibration.sources, Path(base_dir)
    encoder = Encoder(tokenizer, calibration.length, processor)
    reads = any(source.self_sampling is None for source in sources)
    if reads and calibration.packing and encoder.eos is None:
        raise DataError("the tokenizer has no EOS token to separate documents with: set `packing: false`")
    all_shares = quotas([source.weight for source in sources], calibration.sequences)
    sampled = {i: share for i, share in enumerate(all_shares) if sources[i].self_sampling is not None}
    asked = calibration.sequences - sum(sampled.values())
    streams = [Stream(s, root, encoder, calibration, i) for i, s in enumerate(sources) if i not in sampled]
    weighted = any(source.weight for source in sources)
    shares = _take(streams, asked, weighted)
    check_enough(calibration, streams, weighted, asked)

    taken = [sequence for stream in streams for sequence in stream.taken]
    if calibration.shuffle:
        random.Random(f"{calibration.seed}").shuffle(taken)
    warnings = [
        f"{s.rows.source.name} gave {len(s.taken)} sequences, its share is {quota}"
        for s, quota in zip(streams, shares, strict=True)
        if len(s.taken) < max(quota, 1)
    ]
    if (used := sum(s.used for s in streams)) * FEW < len(taken):
        warnings.append(f"little variety: {len(taken)} sequences are of only {used} documents")
    text = _sequences(taken, calibration.length, encoder, vocab_size)
    per_source = [stream.report() for stream in streams]
    report = {
        "sequences": len(taken),
        "length": calibration.length,
        **{key: sum(r[key] for r in per_source) for key in ("documents_read", "documents_used", "tokens_available")},
        "tokens_used": text.tokens,
        "everything_read": all(s.exhausted for s in streams),
        "sequences_per_domain": per_domain(text.domain, calibration.domains or ()),
        "skipped": dict(sum((s.rows.skipped for s in streams), Counter[str]())),
        "sources": per_source,
        "prefix": encoder.prefix,
        "separator": encoder.eos if calibration.packing else None,
        "warnings": encoder.warnings + warnings,
    }
    if text.samples and encoder.images is not None:
        report["images"] = {"sequences": len(text.samples), **encoder.images.names}
    pool = None
    if (wanted := calibration.expert_balance) is not None:
        before = [len(stream.taken) for stream in streams]
        _take(streams, wanted.pool or POOL * calibration.sequences, weighted)
        more = [made for stream, start in zip(streams, before, strict=True) for made in stream.taken[start:]]
        pool = _sequences(more, calibration.length, encoder, vocab_size)
    return Draft(calibration, replace(text, report=report), pool, sampled, encoder)


def _take(streams: list[Stream], count: int, weighted: bool) -> list[int]:
    """Have every stream make its share of `count` more sequences; without weights others make up for a short one."""
    before = sum(len(s.taken) for s in streams)
    shares = quotas([stream.rows.source.weight for stream in streams], count)
    for stream, quota in zip(streams, shares, strict=True):
        stream.take(quota)
    while not weighted and (missing := before + count - sum(len(s.taken) for s in streams)):
        if not (open_streams := [s for s in streams if not s.exhausted]):
            break
        for stream in open_streams[:missing]:
            stream.take(1)
    return shares


def _sequences(taken: list[Made], length: int, encoder: Encoder, vocab_size: int | None) -> TokenBatches:
    """What was made as tensors. Raises DataError for tokens beyond the model's vocabulary."""
    if taken:
        encoder.check(max(max(made.ids) for made in taken), vocab_size)
    texts, seen = [made for made in taken if not made.arguments], [made for made in taken if made.arguments]
    ids = torch.from_numpy(np.array([made.ids for made in texts], dtype=np.int64).reshape(-1, length))
    tags = [made.domain for made in texts + seen]
    samples = tuple(made.arguments for made in seen if made.arguments)
    return TokenBatches(ids, tags, digest([ids], tags, samples), {}, samples)


def weighed(calibration: Calibration, text: TokenBatches) -> TokenBatches:
    """The sequences with `modality_weights`, resolved, on their tokens; the report says them and the tokens of each."""
    wanted, tokens = calibration.modality_weights, text.modalities()
    if text.samples:
        text = replace(text, report={**text.report, "tokens_per_modality": tokens})
    if wanted is None:
        return text
    auto = {name: text.tokens / (len(tokens) * count) for name, count in tokens.items()}
    given = {} if wanted == "auto" else {str(name): weight for name, weight in wanted.items()}
    weights = auto if wanted == "auto" else {name: given.get(name, 1.0) for name in tokens}
    if not any(weights.values()):
        raise DataError(f"modality_weights: all {text.tokens} calibration tokens ({', '.join(tokens)}) weigh nothing")
    return replace(text.weighed(weights), report={**text.report, "modality_weights": weights})


def per_domain(tags: list[str | None], wanted: Sequence[str] = ()) -> dict[str, int]:
    """Sequences of each tag."""
    counts = Counter("(untagged)" if tag is None else tag for tag in tags)
    return {tag: counts[tag] for tag in sorted({*counts, *wanted})}


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
    return TokenWindows(windows, first, predicted, digest(windows, first), report)
