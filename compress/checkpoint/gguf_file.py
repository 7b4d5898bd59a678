"""What is in a GGUF file: its tensors, where they are, and its metadata; read by the format's description alone.

A file is a header (magic, version, counts), key-value pairs, an entry per tensor (name, dimensions with the fastest
first, type, offset), and from the next multiple of the alignment on the tensors themselves.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_compress.errors import CheckpointError

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
# Types of tensors: name → (number in the file, weights of a block, bytes of a block).
STORED: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
}
_NAMES = {number: name for name, (number, _, _) in STORED.items()}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name, type: as in the file; the type by name.
        shape: outermost dimension first, in weights.
        offset: first byte, in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        _, weights, size = STORED[self.type]
        return self.shape[-1] // weights * size

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def read_gguf(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Metadata and tensors of a file. Raises CheckpointError when it isn't whole, or has a type that isn't known."""
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, path).read()
        except (ValueError, struct.error, IndexError, UnicodeDecodeError, KeyError) as error:
            raise CheckpointError(f"{path} is truncated or not a GGUF file ({error})") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def read(self) -> tuple[dict[str, Any], list[Entry]]:
        if self.data[:4] != MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path} has version {version} of the format, known are {VERSIONS}")
        tensors, pairs = self.number("Q"), self.number("Q")
        metadata = {self.text(): self.value(self.number("I")) for _ in range(pairs)}
        entries = [self.entry() for _ in range(tensors)]
        step = int(metadata.get("general.alignment", ALIGNMENT))
        start = math.ceil(self.at / step) * step
        found = [replace(e, offset=start + e.offset) for e in entries]
        end = max((e.offset + e.nbytes for e in found), default=start)
        if end > len(self.data):
            raise CheckpointError(f"{self.path} is {len(self.data)} bytes, its header asks for {end}: it is truncated")
        return metadata, found

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        size = self.number("Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) != size:
            raise CheckpointError(f"{self.path} is truncated")
        self.at += size
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                values = list(struct.unpack_from(f"<{count}{_SCALARS[inner]}", self.data, self.at))
                self.at += count * struct.calcsize(_SCALARS[inner])
                return values
            return [self.value(inner) for _ in range(count)]
        return self.number(_SCALARS[kind])

    def entry(self) -> Entry:
        name = self.text()
        dimensions = self.number("I")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind = self.number("I")
        if kind not in _NAMES:
            raise CheckpointError(f"{self.path}: tensor {name!r} has type {kind}, which is not read here")
        return Entry(name, _NAMES[kind], shape[::-1], self.number("Q"))
