"""What a saved block's description may say: the format's version, kinds of experts, rules that fit its router."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_compress.constants import FORMAT_VERSION
from moe_compress.errors import CheckpointError

from .above import EXPERTS_KINDS, function_at
from .rules import Remap


def check_version(version: Any) -> None:
    """Raise CheckpointError for a version of the native format that this package doesn't know."""
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {version}, this moe-compress reads up to {FORMAT_VERSION}: "
            "install a newer one"
        )


def build_experts(block: Any, kind: str, layout: dict[str, Any]) -> nn.Module:
    """The experts module of a kind, for a block. Raises CheckpointError for a kind that nothing here knows."""
    if kind not in EXPERTS_KINDS:
        raise CheckpointError(f"experts of the kind {kind!r} are not known: the checkpoint needs a newer moe-compress")
    return function_at(EXPERTS_KINDS[kind])(block, layout)  # type: ignore[no-any-return]


def check_classes(layer: int, rules: list[dict[str, Any]], count: int, scored: int) -> None:
    """Raise CheckpointError where a router scores other experts than there are and no rule says what that means."""
    tables = [rule["experts"] for rule in rules if rule.get("kind") == Remap.kind and "experts" in rule]
    if scored != count and not tables:
        raise CheckpointError(
            f"layer {layer} has {count} experts and a router that scores {scored}, and no rule `remap` that "
            "says which expert each means"
        )
    if wrong := [e for table in tables for e in table if not -1 <= e < count]:
        raise CheckpointError(f"layer {layer}: its rule `remap` names expert {wrong[0]} of {count}")
