"""What goes wrong for a reason that the user can act on.

Each of these carries one line: what is wrong, where, and what would be right. The command line prints that line and
nothing else (no traceback without `--debug`), with the exit code that the class names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class MoeCompressError(Exception):
    """Base of every error with a one-line explanation. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(MoeCompressError):
    """The recipe, the checkpoint, or the data is wrong: found before anything was changed."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe that can't be carried out: a wrong key, value, or combination."""


class CheckpointError(InputError):
    """A checkpoint that can't be read as what it claims to be: truncated, incomplete, inconsistent."""


class UnsupportedModelError(InputError):
    """A model that this toolkit doesn't handle, with the reason."""


class DataError(InputError):
    """Calibration or evaluation text that can't be used."""


class BudgetError(InputError):
    """A size that no allowed choice reaches."""


class RunError(MoeCompressError):
    """Something failed while running (disk full, a solver that gave up, weights that are not numbers)."""


class VerificationError(RunError):
    """A written checkpoint that doesn't read back as what was computed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`'; did you mean …?'` with the closest of `known`, or a list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def named(name: str, known: Mapping[str, T], what: str) -> T:
    """What is known under a name. Raises RecipeError, which says what it would be and the nearest name there is."""
    if name not in known:
        raise RecipeError(f"no {what} is called {name!r}{nearest(name, known)}")
    return known[name]
