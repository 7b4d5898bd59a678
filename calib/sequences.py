"""Documents to sequences of tokens, made as they are taken: tokenizing, packing, balancing, shares of sources."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_compress.errors import DataError, InputError, nearest

from .images import ImageReader
from .reading import Document, Rows, TextSource, one_line

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from .text import Calibration

CHARACTERS_PER_TOKEN = 4  # roughly; decides where long documents are cut
CHUNK = 16  # documents tokenised in one call: the most that is tokenised beyond what is needed
WAITING = 16  # times the wanted number: sequences that wait in memory for a rare domain's next one


class Encoder:
    """The tokenizer, with what it puts before a text (`prefix`) and what separates documents (`eos`).

    `images`: makes sequences of documents with images; None without a processor.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, processor: Any = None) -> None:
        self.tokenizer = tokenizer
        self.images = None if processor is None else ImageReader(processor, length)
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


class Made(NamedTuple):
    """A sequence: its tokens, its domain's tag, the documents of which something is in it, and, of one with images,
    the arguments of the forward."""

    ids: list[int]
    domain: str | None
    documents: tuple[str, ...]
    arguments: Mapping[str, Tensor] | None = None


class Stream:
    """One source's sequences, made as they are taken."""

    def __init__(self, source: TextSource, root: Path, encoder: Encoder, calibration: Calibration, index: int) -> None:
        rng = random.Random(f"{calibration.seed}/{index}") if calibration.shuffle else None
        # One long document mustn't fill the set: when documents are shuffled and joined, its parts are too.
        cut = calibration.shuffle and calibration.packing and source.image_field is None
        piece = CHARACTERS_PER_TOKEN * calibration.length if cut else None
        self.rows = Rows(source, root, calibration.domains, rng, piece=piece)
        self.taken: list[Made] = []
        self.exhausted = False
        self.tokens = self.longest = 0  # tokens, tokens of the longest document
        self._used: set[str] = set()
        text = self._packed if calibration.packing else self._cut
        make = self._seen if source.image_field is not None else text
        made = make(encoder, calibration.length)
        self._made = balanced(made, calibration.sequences) if calibration.balance else made

    @property
    def used(self) -> int:
        """Documents of which something is in a sequence."""
        return len(self._used)

    def take(self, count: int) -> None:
        """Move up to `count` more sequences to `taken`."""
        new = list(itertools.islice(self._made, count))
        self.taken += new
        self._used.update(where for made in new for where in made.documents)
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

    def _packed(self, encoder: Encoder, length: int) -> Iterator[Made]:
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
                inside = tuple(where for start, where in starts if start < cut)
                yield Made(encoder.prefix + buffer[cut - body : cut], domain, inside)
            del buffer[:cut]
            starts[:] = [(start - cut, where) for start, where in starts if start >= cut]

    def _cut(self, encoder: Encoder, length: int) -> Iterator[Made]:
        for ids, document in encoder.encode(self.rows):
            sequence = encoder.prefix + ids[: length - len(encoder.prefix)]
            self.tokens += len(ids)
            self.longest = max(self.longest, len(encoder.prefix) + len(ids))
            if len(sequence) < length:
                self.rows.skipped["shorter than a sequence"] += 1
            else:
                yield Made(sequence, document.domain, (document.where,))

    def _seen(self, encoder: Encoder, _length: int) -> Iterator[Made]:
        if encoder.images is None:
            raise InputError(f"{self.rows.source.name} has images: they need the checkpoint's processor")
        for document in self.rows.documents():
            arguments = encoder.images.sample(document)
            if arguments is None:
                self.rows.skipped["images longer than a sequence"] += 1
                continue
            ids = arguments["input_ids"][0].tolist()
            self.tokens += len(ids)
            self.longest = max(self.longest, len(ids))
            yield Made(ids, document.domain, (document.where,), arguments)


def balanced(made: Iterator[Made], count: int) -> Iterator[Made]:
    """The same sequences, from the domains in turn: `count` of them hold equally many of each domain.

    Domains are those of the first `count` sequences, and others from where they are seen. What comes of others during
    a domain's turn waits in memory: at most `WAITING` times `count` sequences, then the turns go on without it (the
    shares in the report say so).
    """
    waiting: dict[str | None, deque[Made]] = {}
    given: Counter[str | None] = Counter()
    for sequence in itertools.islice(made, count):
        waiting.setdefault(sequence.domain, deque()).append(sequence)
    while waiting:
        domain = min(waiting, key=lambda d: given[d])  # the first seen of equals
        while not waiting[domain] and sum(map(len, waiting.values())) < WAITING * count:
            if (more := next(made, None)) is None:
                break
            waiting.setdefault(more.domain, deque()).append(more)
        if not waiting[domain]:
            del waiting[domain]  # no more of it, or none soon
            continue
        given[domain] += 1
        yield waiting[domain].popleft()


def quotas(given: Sequence[float | None], count: int) -> list[int]:
    """`count` split by the sources' weights (None counts 1), largest remainders rounded up."""
    weights = [weight or 1.0 for weight in given]
    exact = [weight * count / sum(weights) for weight in weights]
    shares = [int(part) for part in exact]
    rest = count - sum(shares)
    for i in sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))[:rest]:
        shares[i] += 1
    return shares


def check_enough(calibration: Calibration, streams: Sequence[Stream], weighted: bool, asked: int) -> None:
    """Every source must be usable, every wanted domain be met, and the sequences be the `asked` ones."""
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
    had, length = [len(stream.taken) for stream in streams], calibration.length
    weights = [stream.rows.source.weight for stream in streams]
    most, which = sum(had), "the sources have"
    if most == asked or (calibration.allow_fewer and most):
        return
    if weighted:
        shares = quotas(weights, asked)
        short = next(i for i, quota in enumerate(shares) if had[i] < quota)
        which = f"{streams[short].rows.source.name} has {had[short]} of its {shares[short]}: by weight there are"
        fits = (n for n in range(asked, 0, -1) if all(q <= h for q, h in zip(quotas(weights, n), had, strict=True)))
        most = next(fits, 0)
    text = f"documents: {sum(s.rows.usable for s in streams)}, tokens: {sum(s.tokens for s in streams)}"
    if not calibration.packing:
        text += f", at most {max(s.longest for s in streams)} in one; `packing: true` joins documents"
    advice = f"set `sequences` to {most} or `allow_fewer: true`, lower" if most else "lower"
    raise DataError(
        f"{which} {most} sequences of {length} tokens, not {asked} ({text}): {advice} `length`, or add text"
    )
