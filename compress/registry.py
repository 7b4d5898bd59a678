"""What is registered under names: passes, criteria, costs, methods. One file adds one, a recipe names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from .errors import named


class Named(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str:
        """How recipes call it."""


Entry = TypeVar("Entry", bound=Named)
Made = TypeVar("Made", bound=Any)


class Registry(dict[str, Entry]):
    """Name → entry, in the order in which they were registered.

    Args:
        one, many: what an entry is called in messages.
    """

    def __init__(self, one: str, many: str):
        super().__init__()
        self._one, self._many = one, many
        self._homes: dict[str, tuple[str, str]] = {}

    def adding(self, entry: Callable[[Made], Entry]) -> Callable[[Made], Made]:
        """A decorator that registers what `entry` makes of a function or class, which stays what it was.

        It raises ValueError where something else has the name already; a file imported again may say it again.
        """

        def add(made: Made) -> Made:
            found = entry(made)
            home = (made.__module__, made.__qualname__)
            before = self._homes.setdefault(found.name, home)
            if before != home:
                raise ValueError(f"two {self._many} are called {found.name!r}: in {before[0]} and in {home[0]}")
            self[found.name] = found
            return made

        return add

    def find(self, name: str) -> Entry:
        """The entry of that name. Raises RecipeError with the nearest there is."""
        return named(name, self, self._one)
