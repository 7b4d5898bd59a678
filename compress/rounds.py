"""A pass that goes its way in several rounds: as many passes, between which everything is measured anew.

Rounds are passes like any others. Each has its plan, its commits, its entry in the report, and is checked before any
work, so a killed run goes on in the midst of one. All have the options that the recipe says; `Pass.round` says which
one it is, and `Pass.start` what the model was before the first, of which shares are shares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from moe_compress.errors import RecipeError

if TYPE_CHECKING:
    from moe_compress.passes import Pass


class Rounds(BaseModel):
    """`steps`; the options of a pass that can go in rounds inherit it."""

    steps: int = Field(
        default=1,
        ge=1,
        description="Go there in so many rounds, each of which leaves about the same share of what it finds; what is "
        "scored is measured anew in each, on the model as the round before has left it",
    )


def number_of_rounds(step: Pass) -> int:
    """Rounds of the pass that this is, or is a round of."""
    return step.options.steps if isinstance(step.options, Rounds) else 1


def in_rounds(step: Pass) -> list[Pass]:
    """The pass itself, or its rounds."""
    rounds = [step] + [type(step)(step.options, step.target) for _ in range(1, number_of_rounds(step))]
    for number, one in enumerate(rounds):
        one.round = number
    return rounds


def reached(step: Pass, start: int, goal: int, unit: int = 1) -> int:
    """How many there are at the end of this round, of `start` before the first and `goal` behind the last.

    Every round leaves the same share of what it finds, so that none changes the model more than the others; numbers
    are `goal` plus multiples of `unit`. No round leaves all, if there are enough for so many.
    """
    rounds, done = number_of_rounds(step), step.round + 1
    most, left = (start - goal) // unit, rounds - done
    exact: float = start * (goal / start) ** (done / rounds)
    return goal + unit * max(min(left, most), min(most, round((exact - goal) / unit)))


def check_rounds(step: Pass, going: dict[int, int], what: str) -> None:
    """Raise RecipeError where there are more rounds than steps to go in any layer.

    Args:
        step: the pass.
        going: layer → how many go, one after the other.
        what: what they are called.
    """
    rounds, most = number_of_rounds(step), max(going.values(), default=0)
    if rounds > max(1, most):
        raise RecipeError(f"{step.name}: `steps` is {rounds}, and no layer loses more than {most} {what}")


def said(step: Pass) -> dict[str, Any]:
    """Which round it is, for a plan's summary; nothing of a pass that goes in one."""
    rounds = number_of_rounds(step)
    return {} if rounds == 1 else {"round": step.round + 1, "rounds": rounds}
