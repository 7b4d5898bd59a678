"""Parts of a layer's work on several cores: a thread of Python for each part, not several for each of torch's steps.

A solver goes column by column through matrices, in steps too short to be worth sharing out, so that most of them leave
all cores but one idle. Its experts don't depend on each other. What goes through a tensor in chunks that stay in cache
has steps as short: torch's threads wait for each other after every one, and where another program takes a core, each
time until the system gives it back (round-to-nearest of 32 experts beside two busy programs: 30 to 70 s; as here 4 s).

Contract: what comes out doesn't depend on how many threads there are. Where there are several parts each is computed
by one thread from beginning to end, so the parts must not depend on the number of threads either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Done = TypeVar("Done")


def side_by_side(work: Callable[[Part], Done], parts: Sequence[Part], most: int) -> list[Done]:
    """`work` of every part, in their order, at most `most` at a time and no more than torch has threads.

    A single part keeps all of torch's threads. `work` runs without gradients and must not set torch's threads. Raises
    what the first part that fails raises; those that haven't begun by then never do.
    """
    threads = torch.get_num_threads()
    if len(parts) == 1 or threads == 1:
        return [work(part) for part in parts]

    def alone(part: Part) -> Done:
        with torch.no_grad():  # which is a thread's own
            return work(part)

    workers = max(1, min(threads, most, len(parts)))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, parts))
    finally:
        torch.set_num_threads(threads)  # new threads take theirs from the last that was set


def share_out(work: Callable[[Part], None], parts: Iterable[Part], device: torch.device) -> None:
    """`work` of many small parts, each of which writes its share of one result: on a CPU by all threads.

    What it raises is of one of the parts that fail.
    """

    def several(own: Sequence[Part]) -> None:
        for part in own:
            work(part)

    parts = list(parts)
    # On a CPU so many that no thread is left long alone with its last.
    shares = 16 * torch.get_num_threads() if device.type == "cpu" else 1
    side_by_side(several, [own for i in range(shares) if (own := parts[i::shares])], shares)
