"""Taking experts out of a block: the router's rows go with them, and what is left takes over what it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_compress.calib.inputs import BlockInputs
from moe_compress.counts import kept_slots
from moe_compress.model import MoEBlock
from moe_compress.refit import LayerRefit


def drop_experts(
    block: MoEBlock,
    keep: Sequence[int],
    protected: Sequence[int],
    inputs: BlockInputs | None,
    ridge: float | None,
) -> tuple[list[int], dict[str, Any] | None]:
    """Keep these experts alone, and solve their down projections again, so that the block puts out what it did.

    Args:
        block: changed in place.
        keep: experts that stay, ascending.
        protected: of these, those whose weights stay as they are.
        inputs: what the block reads; needed to refit.
        ridge: see compress/refit.py; None: nothing is solved again.

    Returns where each expert is now, −1 if it is gone, and what refitting says (None where nothing was to be done).
    """
    refit, told = None, None
    slots = kept_slots(keep, block.num_experts)
    if ridge is not None and len(keep) < block.num_experts:
        assert inputs is not None
        refit = LayerRefit(block, inputs)
        refit.needs_router()
    block.keep(list(keep))
    if refit is not None and ridge is not None:
        told = refit.after(block, slots, ridge, [slots[e] for e in protected])
    return slots, told
