"""Sizes and paths as people write them."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from moe_compress.errors import RecipeError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str | int) -> int:
    """ "12 GB", "3.5GiB", "800MB" or a number of bytes → bytes. Raises RecipeError for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?)?B?\s*", str(text).upper())
    if not match:
        raise RecipeError(f"{text!r} is not a size; write it like 12 GB, 3.5 GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def checked_size(value: Any) -> Any:
    """A size in a recipe, which YAML may have made a number: as text, if it can be read. Raises ValueError."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str):
        try:
            parse_bytes(text)
        except RecipeError as error:
            raise ValueError(str(error)) from error
    return text


Size = Annotated[str, BeforeValidator(checked_size)]
# `~` is the user's home, as everywhere else: no folder of that name is meant.
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]


def show_bytes(count: float) -> str:
    """Bytes in decimal units, three digits: 2.62 GB."""
    sign, count = ("-", -count) if count < 0 else ("", count)
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{sign}{count / factor:.3g} {unit}"
    return f"{sign}{count:.0f} bytes"


def show_budget(budget: int, size: str | None) -> str:
    """A budget of bytes in a message; with `size`, that of the whole checkpoint, also what else takes of that."""
    if size is None:
        return f"the budget is {show_bytes(budget)}"
    whole = parse_bytes(size)
    return (
        f"of `size` {show_bytes(whole)}, what stays as it is takes {show_bytes(whole - budget)}, so the budget is "
        f"{show_bytes(max(0, budget))}"
    )
