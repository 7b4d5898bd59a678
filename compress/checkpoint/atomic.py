"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moe_compress.errors import RunError

PARTIAL = ".partial"

_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path given; when the context ends without an error it becomes `path`, on disk for good.

    Raises RunError with one line when the disk is full or can't be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.chmod(0o666 & ~_UMASK)  # safetensors writes files that only their owner may read
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _explained(error, path) from error
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A text file, written whole."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, written whole. Raises RunError for what isn't plain data."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RunError(f"{path} could not be written: {error}") from error
    write_text(path, text + "\n")


def copy_file(source: Path, path: Path) -> None:
    """A copy of a file, written whole."""
    with whole_file(path) as partial:
        shutil.copyfile(source, partial)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, written whole. Tensors may be mapped from other files: they are not copied in memory."""
    with whole_file(path) as partial:
        try:
            save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata=dict(metadata or {}))
        except Exception as error:  # safetensors reports a full disk as its own exception class
            if isinstance(error, OSError):
                raise
            raise _explained(error, path) from error


def flush(path: Path) -> None:
    """Have a file's contents, or a folder's names, on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: Exception, path: Path) -> RunError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        return RunError(
            f"the disk is full: {path} could not be written; free some space and run the same command again"
        )
    return RunError(f"{path} could not be written: {error}")
