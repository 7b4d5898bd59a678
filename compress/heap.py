"""Freed memory: when the C library gives it back to the system, and when it is used again (glibc; elsewhere nothing).

By default glibc maps what is large anew each time, and the system fills every page of it with zeros first. In work on
tensors of some megabytes that takes a third of the time (the demo checkpoint at 2.5 bits: 12 of 40 CPU seconds).
"""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None) if os.name == "posix" else None
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names, malloc.h
# Larger blocks go straight back: those of a large layer, each a share of the whole memory.
_REUSED = 128 << 20
_KEPT = 512 << 20


def reuse_freed() -> None:
    """Use blocks up to 128 MiB again, and keep up to 512 MiB of them, for the rest of this process.

    Call it before the process has threads. It is for programs, not for libraries, as the whole process has one heap.
    """
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _REUSED)
        mallopt(_TRIM_THRESHOLD, _KEPT)


def release_freed() -> None:
    """Hand freed memory back to the system (glibc keeps it otherwise, up to several times the hidden states)."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)
