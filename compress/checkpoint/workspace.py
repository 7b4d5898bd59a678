"""Where a run keeps what it has finished, so that a killed one continues where it was.

Every finished layer of every pass is committed as one file (written aside, flushed, renamed), and so is every
statistic of every layer. A workspace belongs to one recipe on one model and one set of data: a run that differs is
refused with what differs. Statistics are kept under what they were measured on, and how, and stay valid for other
recipes.
One run at a time works in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moe_compress.errors import CheckpointError, InputError, RunError

from .atomic import write_json, write_tensors
from .reader import read_json

try:
    import fcntl
except ImportError:  # not on this system: nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

_RECORD = "workspace.json"
_LOCK = "lock"
_PASSES, _STATISTICS = "pass-*", "statistics"


def short_digest(value: Any) -> str:
    """16 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Workspace:
    """A folder of finished work. Use as a context manager: leaving it lets other runs in.

    Args:
        folder: where.
        identity: what the work belongs to (nested JSON values); compared with what the folder was made for.
        fresh: forget finished passes instead of refusing those of another identity. Statistics are kept.

    Attributes:
        resumed: whether there is finished work to go on with.

    Raises:
        InputError: another run is working here, or the finished work belongs to another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, fresh: bool = False):
        self.folder = folder
        self._lock = _locked(folder)
        try:
            self.resumed = self._claim(identity, fresh)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._finished(_PASSES, _STATISTICS):
            clear(self.folder)  # nothing is lost
        self.close()

    def close(self) -> None:
        """Let other runs in."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @staticmethod
    def holds_work(folder: Path) -> bool:
        """Whether a run was begun in `folder` and not finished."""
        return (folder / _RECORD).is_file()

    def _claim(self, identity: dict[str, Any], fresh: bool) -> bool:
        record = self.folder / _RECORD
        before = _recorded(record)
        differences = _differences(before, identity) if before is not None else []
        if differences and not fresh and self._finished(_PASSES):
            raise InputError(
                f"workspace {self.folder} belongs to another run ({'; '.join(differences[:3])}): "
                "say --fresh to start over in it, or choose another output"
            )
        if before is None or differences or fresh:
            self._forget()  # what no record claims was left by a removal that was killed
        write_json(record, identity)
        return bool(self._finished(_PASSES, _STATISTICS))

    def _finished(self, *kinds: str) -> list[Path]:
        """Files of finished work."""
        return [path for kind in kinds for path in self.folder.glob(f"{kind}/**/*") if path.is_file()]

    def pass_store(self, number: int, name: str) -> PassStore:
        """Committed layers of the recipe's pass `number`."""
        return PassStore(self.folder / f"pass-{number:02d}-{name}")

    def statistics(self, model_state: str, data: str) -> DiskStatistics:
        """Statistics of one state of the model on one set of data."""
        return DiskStatistics(self.folder / _STATISTICS / short_digest([model_state, data]))

    def read(self, name: str) -> dict[str, Any] | None:
        """A result saved under `name`, or None."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Save a result under `name`."""
        write_json(self.folder / f"{name}.json", value)

    def discard(self, name: str) -> None:
        """Forget a result saved under `name`."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def scratch(self, name: str) -> Path:
        """An empty folder for temporary files."""
        path = self.folder / "scratch" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def remove(self) -> None:
        """Delete the whole folder."""
        clear(self.folder)
        self.close()

    def _forget(self) -> None:
        (self.folder / _RECORD).unlink(missing_ok=True)  # first: what is half gone belongs to nobody
        for path in self.folder.iterdir():
            if path.name not in (_STATISTICS, _LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear(folder: Path) -> None:
    """Delete a workspace, its record first: what is half gone belongs to nobody."""
    (folder / _RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _recorded(record: Path) -> dict[str, Any] | None:
    """What the work in a folder belongs to; None where nothing says so."""
    try:
        return read_json(record) if record.is_file() else None
    except CheckpointError:  # damaged by others than this package, which writes it whole
        return None


def _locked(folder: Path) -> int:
    """Descriptor of the folder's lock, held until it is closed or the process ends. Raises InputError if it's taken."""
    path = folder / _LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(
                f"another run is working in {folder}: wait until it has finished, or choose another output"
            ) from None
        except OSError:
            return lock  # a file system without locks
        try:
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)  # of a folder that a finished run has just removed


@dataclass(frozen=True)
class PassStore:
    """Committed layers of one pass."""

    folder: Path

    def plan(self) -> dict[str, Any] | None:
        """The saved plan, or None."""
        path = self.folder / "plan.json"
        return read_json(path) if path.is_file() else None

    def save_plan(self, plan: dict[str, Any]) -> None:
        """Save the plan."""
        write_json(self.folder / "plan.json", plan)

    def has(self, layer: int) -> bool:
        """Whether the layer is committed, or was before a later pass replaced it."""
        return self._report(layer).is_file()

    def commit(
        self, layer: int, tensors: dict[str, Tensor], description: dict[str, Any], report: dict[str, Any]
    ) -> None:
        """Save a changed block. The report comes second: where it is, the tensors were complete."""
        write_tensors(self._tensors(layer), tensors, {"description": json.dumps(description)})
        write_json(self._report(layer), report)

    def get(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (mapped, not read) and description of a committed block, or None."""
        path = self._tensors(layer)
        if not path.is_file() or not self._report(layer).is_file():
            return None
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["description"])
            return {name: file.get_tensor(name) for name in file.keys()}, description  # noqa: SIM118

    def report(self, layer: int) -> dict[str, Any]:
        """What the pass reported of a layer."""
        if not self._report(layer).is_file():
            raise RunError(f"{self.folder} has no report of layer {layer}")
        return read_json(self._report(layer))

    def drop(self, layer: int) -> None:
        """Remove a block's tensors: a later pass has committed that layer."""
        self._tensors(layer).unlink(missing_ok=True)

    def _tensors(self, layer: int) -> Path:
        return self.folder / f"{_name(layer)}.safetensors"

    def _report(self, layer: int) -> Path:
        return self.folder / f"{_name(layer)}.json"


@dataclass(frozen=True)
class DiskStatistics:
    """A StatisticStore in files."""

    folder: Path

    def get(self, layer: int, key: str) -> dict[str, Tensor] | None:
        """See StatisticStore."""
        path = self._path(layer, key)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def put(self, layer: int, key: str, result: dict[str, Tensor]) -> None:
        """See StatisticStore."""
        write_tensors(self._path(layer, key), result, {"statistic": key})

    def _path(self, layer: int, key: str) -> Path:
        name = key.partition("(")[0]
        return self.folder / f"{name}-{short_digest(key)}" / f"{_name(layer)}.safetensors"


def _name(layer: int) -> str:
    """Of a layer's files; numbers below 0 are for what lies outside the decoder layers."""
    return f"layer-{layer:04d}" if layer >= 0 else "outer"


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as "key: was A, is B"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(k for k in now if k not in before)]
        found = [_differences(before.get(k), now.get(k), f"{path}.{k}" if path else str(k)) for k in keys]
        return [line for lines in found for line in lines]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        found = [_differences(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(before, now, strict=True))]
        return [line for lines in found for line in lines]
    return [] if before == now else [f"{path}: was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
