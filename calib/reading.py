"""Documents out of files and data sets: which files, which rows, what is a document, in which order.

The promise:
- Reading is lazy: nothing is opened before its first document is asked for, no file is read further than needed (but a
  JSON array, and a plain text read as one document, are in memory as a whole), and only the buffer of `shuffled` is
  ever held.
- Equal files, settings and random generator give equal documents in equal order.
- Every document is text that isn't blank or a list of messages that isn't empty, knows its tag, and where it stands.
- Rows that are empty, of another domain or in files of another kind are counted in `Rows.skipped`. Everything else
  that can't be used is a `DataError` of one line that names file and line, row or element.

It knows nothing of tokens.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe_compress.errors import DataError, nearest
from moe_compress.units import UserPath

from .images import found_images
from .self_sampling import SelfSampling

JSON, PLAIN, PARQUET = (".jsonl", ".json"), (".txt", ".md"), (".parquet",)
BUFFER_DOCUMENTS, BUFFER_CHARACTERS = 10_000, 64_000_000
PIECE = 16_384  # characters after which the next blank line of a plain text ends a document


class TextSource(BaseModel):
    """Where text comes from: files, or a data set of the `datasets` library."""

    model_config = ConfigDict(extra="forbid")

    path: UserPath | None = Field(
        default=None,
        description="A file, a folder (with its subfolders) or a glob, relative to the working directory. `.jsonl` and "
        "`.json` hold one object per line (`.json` also one array), `.parquet` one row per document; `.txt` and `.md` "
        "are cut at blank lines into documents of about 16,000 characters. All but parquet may be gzipped "
        "(`.jsonl.gz`).",
    )
    dataset: str | None = Field(
        default=None,
        description="Instead of `path`: a name for `datasets.load_dataset`, or a folder in its layout. Streamed, "
        "unless HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set: then it is taken from the cache.",
    )
    self_sampling: SelfSampling | None = Field(
        default=None,
        description="Instead of either: how the model writes this source's share itself, `{}` for the defaults.",
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
    image_field: str | None = Field(
        default=None,
        description="What holds each row's image or list of images: paths relative to the row's file, bytes, or data "
        "URIs. Each row is a sequence by itself, made by the checkpoint's own processor; rows without an image are "
        "skipped. Needs pillow (the extra `vision`).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if [self.path, self.dataset, self.self_sampling].count(None) != 2:
            raise ValueError("a source has either a `path` or a `dataset`, or `self_sampling`")
        for name in ("subset", "split"):  # a recipe that was recorded says the defaults too
            if self.dataset is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` belongs to a `dataset`")
        if self.domain is not None and self.domain_field is not None:
            raise ValueError("a source has a `domain` or a `domain_field`, not both")
        return self

    @property
    def name(self) -> str:
        """What messages and reports call it."""
        return self.path or (f"dataset {self.dataset}" if self.dataset is not None else "self-sampling")


class Document(NamedTuple):
    """One document and where it was found (file and line, row or element)."""

    value: str | list[dict[str, Any]]  # text, or messages
    domain: str | None
    where: str
    images: tuple[Any, ...] = ()  # paths, bytes or pillow's images


class Rows:
    """One source's usable documents, and the count of what was read and skipped.

    Args:
        source: what to read.
        root: what its relative paths are relative to.
        domains: tags of the documents that are wanted; None for all.
        rng: shuffles files and documents; None leaves them in order.
        one_file: the path must be a single file, and a plain text is one document.
        piece: characters after which a text is cut, at a blank, into documents of their own; None leaves them whole.

    Attributes (as far as reading has come):
        read, usable: rows.
        skipped: why → how many rows.
        seen: tags met, wanted or not.
    """

    def __init__(
        self,
        source: TextSource,
        root: Path,
        domains: Sequence[str] | None = None,
        rng: random.Random | None = None,
        one_file: bool = False,
        piece: int | None = None,
    ) -> None:
        self.source, self.root, self.domains, self.rng, self.one_file = source, root, domains, rng, one_file
        self.piece = piece
        self.read = self.usable = 0
        self.skipped: Counter[str] = Counter()
        self.seen: set[str] = set()
        self._folder = root  # of the file that is being read

    def documents(self) -> Iterator[Document]:
        """In file order, or shuffled with `rng`."""
        documents: Iterator[Document] = itertools.islice(self._usable(), self.source.limit)
        if self.piece is not None:
            documents = itertools.chain.from_iterable(pieces(document, self.piece) for document in documents)
        return documents if self.rng is None else shuffled(documents, self.rng)

    def _usable(self) -> Iterator[Document]:
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
            elif not (images := self._images(row, where)) and source.image_field is not None:
                self.skipped["no image"] += 1
            else:
                _check_value(value, source, where)
                self.usable += 1
                yield Document(value, domain, where, images)

    def _images(self, row: Any, where: str) -> tuple[Any, ...]:
        if self.source.image_field is None:
            return ()
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: plain text has no field {self.source.image_field!r}")
        return found_images(_lookup(row, self.source.image_field, where), where, self._folder)

    def _raw(self) -> Iterator[tuple[str, Any]]:
        if self.source.dataset is not None:
            yield from _dataset_rows(self.source, self.root)
            return
        files = self._files()
        if self.rng is not None and self.source.limit is None:
            self.rng.shuffle(files)
        fields = (self.source.field, self.source.domain_field, self.source.image_field)
        columns = [name for name in fields if name is not None]
        for file in files:
            kind, self._folder = _kind(file), file.parent
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
            found, others = text_files(path)
            if others:
                self.skipped["file hidden or of another kind"] += others
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


def text_files(folder: Path) -> tuple[list[Path], int]:
    """Files with text in a folder and its subfolders, and how many others: hidden, or of another kind.

    Raises DataError when there are none.
    """
    inside = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    found = [file for file in inside if _kind(file) and "/." not in f"/{file.relative_to(folder).as_posix()}"]
    if not found:
        raise DataError(f"{folder}: the folder has no {', '.join(JSON + PLAIN + PARQUET)} file")
    return found, len(inside) - len(found)


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
        raise DataError(f"{path}: can't be read: {one_line(error)}") from error


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
        raise DataError(f"{path}: can't be read as parquet after row {number}: {one_line(error)}") from error


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
        raise DataError(f"{source.name}: can't be read after row {number}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
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


def pieces(document: Document, characters: int) -> Iterator[Document]:
    """A long text as several documents of about that many characters, cut after a blank; others as they are."""
    text = document.value
    if not isinstance(text, str):
        yield document
        return
    start = 0
    while len(text) - start > 1.5 * characters:
        blanks = [text.rfind(blank, start + characters // 2, start + characters) for blank in ("\n\n", "\n", " ")]
        end = next((blank + 1 for blank in blanks if blank >= 0), start + characters)
        yield document._replace(value=text[start:end])
        start = end
    yield document._replace(value=text[start:])


def shuffled(documents: Iterable[Document], rng: random.Random) -> Iterator[Document]:
    """Random ones out of a buffer that is kept full."""
    buffer: list[tuple[int, Document]] = []
    size = 0
    for document in documents:
        value = document.value
        pixels = sum(len(image) for image in document.images if isinstance(image, bytes))
        buffer.append((len(value if isinstance(value, str) else str(value)) + pixels, document))
        size += buffer[-1][0]
        while len(buffer) >= BUFFER_DOCUMENTS or size >= BUFFER_CHARACTERS:
            at = rng.randrange(len(buffer))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            characters, chosen = buffer.pop()
            size -= characters
            yield chosen
    rng.shuffle(buffer)
    yield from (document for _, document in buffer)
