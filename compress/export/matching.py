"""Which modules of a server a config's entries mean: the patterns that are written, and how servers read them.

A server finds a layer's scheme by names: `ignore` first, then the first group with a target. It has prefixes and
modules of its own, so entries hold whatever stands before the layers and between layer and experts, and never for
anything that only looks alike (the experts of a draft model).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_compress.errors import CheckpointError
from moe_compress.model.expert_names import ExpertNames

from .rules import NAMES
from .schemes import Scheme

_LINEAR = "Linear"  # the class, as a target


@dataclass(frozen=True)
class WrittenLayer:
    """A layer that was written quantized: its scheme, how its experts are called, and how many there are."""

    scheme: Scheme
    names: ExpertNames
    num_experts: int

    def modules(self) -> list[str]:
        """Module paths of all its expert projections, as in the file."""
        return [self.names.linear(e, p) for e in range(self.num_experts) for p in self.names.leaves]


class ServerView:
    """What a server makes of a `quantization_config`: `ignore` first, then the first group with a target.

    Raises CheckpointError for a config without groups of targets and weights.
    """

    def __init__(self, config: Mapping[str, Any]):
        self._ignored = _Entries(config.get("ignore") or ())
        try:
            self._groups = [(_Entries(group["targets"]), group) for group in config["config_groups"].values()]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("config.json names no config_groups with targets") from error

    def group(self, module: str) -> dict[str, Any] | None:
        """The group that a module (path, as in the file) is in, or None where it stays dense.

        Names and patterns come before a target that is the class of all linear layers, as llm-compressor writes it.
        """
        if module in self._ignored:
            return None
        named = [group for targets, group in self._groups if module in targets]
        return next(iter(named or [group for targets, group in self._groups if _LINEAR in targets.names]), None)


class _Entries:
    """Entries of `targets` or `ignore`: names, and patterns after "re:"."""

    def __init__(self, entries: Iterable[str]):
        entries = list(entries)
        self.names = {entry for entry in entries if not entry.startswith("re:")}
        self._patterns = [re.compile(entry[3:]) for entry in entries if entry.startswith("re:")]

    def __contains__(self, module: str) -> bool:
        return module in self.names or any(pattern.match(module) for pattern in self._patterns)


def layer_patterns(layers: Mapping[int, WrittenLayer], tail: str) -> list[str]:
    """One pattern for all layers whose experts are called alike; `tail` is for what stands behind the experts' name.

    It leaves open what stands before the layers and between layer and experts (servers have modules of their own).
    Raises RunError for experts whose name doesn't say which layer they are in.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for index, layer in layers.items():
        before, after = _around(layer.names.experts, index)
        found.setdefault((before.rpartition(".")[2], after.rpartition(".")[2]), []).append(index)
    return [
        rf".*{re.escape(stack)}\.({'|'.join(map(str, sorted(numbers)))})\.(.*\.)?{re.escape(experts)}{tail}"
        for (stack, experts), numbers in found.items()
    ]


def linear_patterns(linears: Mapping[int, Iterable[str]]) -> list[str]:
    """One pattern for all layers with a packed linear layer of that name; open as to what stands before the layers.

    Args:
        linears: decoder layer → module paths, as in the file.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for index, paths in linears.items():
        for path in paths:
            before, after = _around(path, index)
            found.setdefault((before.rpartition(".")[2], after), []).append(index)
    return [
        rf".*{re.escape(stack)}\.({'|'.join(map(str, sorted(numbers)))})\.{re.escape(name)}$"
        for (stack, name), numbers in found.items()
    ]


def _around(path: str, index: int) -> tuple[str, str]:
    """What stands before and after the number of the layer in a path."""
    before, number, after = f".{path}.".partition(f".{index}.")
    if not number or not before:
        raise NAMES.broken(f"{path!r} doesn't name decoder layer {index}: its experts can't be told from other layers'")
    return before.strip("."), after.strip(".")


def dense_patterns(dense: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Patterns for dense modules that hold whatever stands before them, and for no quantized one."""
    suffixes = {suffix for module in quantized for suffix in _suffixes(module)}
    taken = [{_open(suffix, kept) for suffix in suffixes} for kept in _KEPT]
    patterns: dict[str, None] = {}
    for name in dense:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        start = max(0, numbers[0] - 1) if numbers else len(parts) - 1
        # From general to particular: the experts of a draft model or of another tower look like those that are packed.
        candidates = [(path, level) for path in (".".join(parts[start:]), name) for level in range(len(_KEPT))]
        for path, level in candidates:
            if (opened := _open(path, _KEPT[level])) not in taken[level]:
                patterns[_pattern(opened)] = None
                break
    return list(patterns)


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


# How many numbers of a path a pattern keeps: none, the layer's, all.
_KEPT = (0, 1, 99)


def _open(path: str, kept: int) -> str:
    """A path with "#" for every number after the first `kept`."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for i in numbers[kept:]:
        parts[i] = "#"
    return ".".join(parts)


def _pattern(path: str) -> str:
    """For modules whose path ends so."""
    return r"(.*\.)?" + r"\.".join(r"\d+" if part == "#" else re.escape(part) for part in path.split(".")) + "$"
