"""What a run shows while it works, and what it remembers of each stage: seconds and peak memory.

On a terminal a stage is a bar; in a log it is a line a minute, none if it takes less. Memory is the process's anonymous
resident memory (page cache of mapped files not counted), sampled, plus the accelerator's own peak where there is one.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

_SAMPLE_SECONDS = 0.05
_LINE_SECONDS = 60


class Progress:
    """Progress of one stage; this one shows nothing."""

    def layer(self, index: int) -> None:
        """Decoder layer `index` is done."""

    def step(self, text: str = "") -> None:
        """One more of whatever the stage counts is done."""


@dataclass(frozen=True)
class StageRecord:
    """What a stage took.

    Attributes:
        name: of the stage.
        seconds: wall-clock.
        peak_memory_bytes: highest anonymous resident memory sampled.
        peak_device_bytes: highest memory allocated on the accelerator, 0 without one.
    """

    name: str
    seconds: float
    peak_memory_bytes: int
    peak_device_bytes: int = 0


class Monitor:
    """Runs stages and remembers them.

    Args:
        show: whether anything is.
    """

    def __init__(self, show: bool = True):
        self.console = Console(stderr=True)
        self._show = show
        self.stages: list[StageRecord] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Progress]:
        """Time a stage, sample its memory, and show how far it is of `total` steps, if these are known."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with _PeakMemory() as memory, self._shown(name, total) as progress:
            yield progress
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.stages.append(StageRecord(name, time.perf_counter() - start, memory.peak, device))

    def note(self, text: str) -> None:
        """A line for the user, on standard error."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def records(self) -> list[dict[str, Any]]:
        """Stages as plain data."""
        return [asdict(stage) for stage in self.stages]

    @contextmanager
    def _shown(self, name: str, total: int | None) -> Iterator[Progress]:
        if not self._show:
            yield Progress()
            return
        if not sys.stderr.isatty():
            yield _Lines(self, name, total)
            return
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        with Bars(*columns, console=self.console, transient=True) as bars:
            yield _Bar(bars, name, total)


class _Bar(Progress):
    def __init__(self, bars: Bars, name: str, total: int | None):
        self._bars, self._name, self._start, self._count = bars, name, time.perf_counter(), 0
        self._task = bars.add_task(name, total=total, rate="")

    def layer(self, index: int) -> None:
        self.step(f"layer {index}")

    def step(self, text: str = "") -> None:
        self._count += 1
        rate = (time.perf_counter() - self._start) / self._count
        self._bars.update(
            self._task,
            advance=1,
            description=f"{self._name} · {text}" if text else self._name,
            rate=f"{rate:.2g} s each",
        )


class _Lines(Progress):
    def __init__(self, monitor: Monitor, name: str, total: int | None):
        self._monitor, self._name, self._total, self._count = monitor, name, total, 0
        self._start = self._said = time.perf_counter()

    def layer(self, index: int) -> None:
        self.step()

    def step(self, text: str = "") -> None:
        self._count += 1
        now = time.perf_counter()
        if now - self._said < _LINE_SECONDS:
            return
        self._said, gone = now, now - self._start
        line = f"{self._name}: {self._count} done in {_clock(gone)}"
        if self._total is not None:
            left = gone / self._count * (self._total - self._count)
            line = f"{self._name}: {self._count} of {self._total} in {_clock(gone)}, about {_clock(left)} left"
        self._monitor.note(line)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def anonymous_memory() -> int:
    """Bytes of resident memory that no file backs; all resident memory where the system doesn't tell them apart."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


class _PeakMemory:
    """Samples memory in the background while the context lasts."""

    def __init__(self) -> None:
        self.peak = anonymous_memory()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._end.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_memory())

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_memory())
