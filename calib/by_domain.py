"""One statistic for several domains of text in one sweep: every batch is of one domain, and counts for it alone."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEBlock, Tap
from moe_compress.model.sweep import Batch

from .batches import TokenBatches
from .statistics import Accumulator, Result, Statistic


@dataclass(frozen=True)
class ByDomain(Statistic):
    """A statistic of each domain's text. `part` takes a domain's result out of what is measured.

    Raises UnsupportedModelError, while measuring, where experts see other tokens than those that the sequences hold.

    Attributes:
        inner: the statistic.
        ends: for each domain, the number of the sequence behind its last one (see `batches_by_domain`).
    """

    name: ClassVar[str] = "by_domain"
    inner: Statistic
    ends: tuple[int, ...]

    @property
    def key(self) -> str:
        """Identity in the store."""
        return f"{self.name}({self.inner.key}, {list(self.ends)})"

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Parts(self, block, tokens)

    @staticmethod
    def part(result: Result, domain: int) -> Result:
        """What the inner statistic would have measured on that domain's text alone."""
        mark = f"{domain}."
        return {n.removeprefix(mark): t for n, t in result.items() if n.startswith(mark)}


class _Parts(Accumulator):
    def __init__(self, settings: ByDomain, block: MoEBlock, tokens: int):
        self.ends = settings.ends
        self.parts = [settings.inner.start(block, tokens) for _ in settings.ends]

    def update(self, tap: Tap) -> None:
        if tap.sequence_T is None:
            raise UnsupportedModelError(
                f"layer {tap.layer}: its experts don't see the sequences' tokens one by one, so nothing tells which "
                "domain they are of"
            )
        self.parts[bisect.bisect_right(self.ends, int(tap.sequence_T[0]))].update(tap)

    def result(self) -> Result:
        return {f"{i}.{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.result().items()}


def batches_by_domain(
    text: TokenBatches, domains: Sequence[str], batch_size: int
) -> tuple[list[Batch], tuple[int, ...]]:
    """Forwards of each domain's sequences, one domain after the other, and the sequence where each ends."""
    batches: list[Batch] = []
    ends: list[int] = []
    for domain in domains:
        own = text.chosen([i for i, tag in enumerate(text.domain) if tag == domain])
        batches += own.forwards(batch_size)
        ends.append(len(own) + (ends[-1] if ends else 0))
    return batches, tuple(ends)
