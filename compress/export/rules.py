"""The rules that keep a served checkpoint from loading wrongly, numbered as in docs/targets.md.

Servers look at expert 0 of a layer and copy the others into what they allocated for it; a smaller tensor fills a part
of a larger one and nothing is said. So whatever they rely on is asserted here, before the folder gets its name: a file
that breaks a rule is never seen. What a recipe could know is refused before any work (targets.py); this is for
everything that reaches the exporter in another way.

From the loaders of vLLM 0.33 and SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.errors import RunError

from .schemes import MIXED, PACKED, Scheme


@dataclass(frozen=True)
class Rule:
    """One rule: its number in docs/targets.md, and its name."""

    number: int
    name: str

    def broken(self, what: str) -> RunError:
        """The error that says what breaks it."""
        return RunError(f"{what} [export rule {self.number}: {self.name}]")


ONE_SCHEME = Rule(1, "one scheme for all experts and projections of a layer")
WHOLE = Rule(2, "symmetric, whole groups, blocks and words")
NAMES = Rule(3, "every module is read with the scheme that it was written with")
ROUTING = Rule(4, "routers and expert counts stay what the config says")
COMPLETE = Rule(5, "no tensor of the source is lost")
PACKING = Rule(6, "packed without gaps, in groups")
KERNELS = Rule(7, "the target has kernels for the scheme")
FORMAT = Rule(8, "the config names each format where the server looks for it")
RULES = (ONE_SCHEME, WHOLE, NAMES, ROUTING, COMPLETE, PACKING, KERNELS, FORMAT)

# Widths of packed integers that servers have.
WIDTHS = range(2, 9)


def packed_scheme(index: int, layout: Mapping[str, Any]) -> Scheme:
    """The one scheme of a layer of packed experts.

    Args:
        index: decoder layer, for messages.
        layout: what `PackedExperts.describe` says.

    Raises RunError when a server would misread the layer (rules 1, 2 and 6).
    """
    used = {e for projection in layout["projections"].values() for e in projection["experts"]}
    if len(used) != 1:
        names = ", ".join(sorted(used))
        raise ONE_SCHEME.broken(f"layer {index}: experts differ in their encoding ({names})")
    (name,) = used
    encoding = layout["encodings"][name]
    scheme = Scheme(int(encoding["bits"]), int(encoding.get("group_size", -1)))
    if scheme.bits not in WIDTHS:
        raise PACKING.broken(f"layer {index}: {name!r} has a width of {scheme.bits or 16} bits, servers load 2 to 8")
    if scheme.group_size < 1:
        raise PACKING.broken(f"layer {index}: {name!r} has a scale per row, and servers want groups")
    if not encoding["symmetric"]:
        raise WHOLE.broken(f"layer {index}: {name!r} has zero points")
    return _tiled(index, scheme, layout)


def scaled_scheme(index: int, layout: Mapping[str, Any]) -> Scheme:
    """The same of a layer of `ScaledExperts`. Raises RunError (rule 2)."""
    return _tiled(index, Scheme(**layout["scheme"]), layout)


def _tiled(index: int, scheme: Scheme, layout: Mapping[str, Any]) -> Scheme:
    if layout["biases"]:
        raise WHOLE.broken(f"layer {index}: experts have biases, which the format has no place for")
    for projection, entry in layout["projections"].items():
        if reason := scheme.misfit(int(entry["out_features"]), int(entry["in_features"])):
            raise WHOLE.broken(f"layer {index}, {projection}: {reason}")
    return scheme


def check_alike(index: int, linears: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> None:
    """Rule 1 for what is about to be written.

    Args:
        index: decoder layer, for messages.
        linears: projection → per expert its tensors by the last part of their name.

    Raises RunError when an expert has other tensors than expert 0: servers allocate by that one.
    """

    def look(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    for projection, experts in linears.items():
        first = look(experts[0])
        for expert, tensors in enumerate(experts):
            if (own := look(tensors)) != first:
                raise ONE_SCHEME.broken(f"layer {index}, {projection}: expert {expert} holds {own}, expert 0 {first}")
    counts = {projection: len(experts) for projection, experts in linears.items()}
    if len(set(counts.values())) > 1:
        raise ONE_SCHEME.broken(f"layer {index}: projections have different numbers of experts ({counts})")


def check_reading(read: Callable[[str], Any], written: Mapping[str, Any]) -> None:
    """Rule 3: what a server makes of each module (None: dense) against what was written of it."""
    for module, scheme in written.items():
        if read(module) == scheme:
            continue
        if scheme is None:
            raise NAMES.broken(f"{module!r} is dense, and nothing in the config says so")
        raise NAMES.broken(f"{module!r} would be read with another scheme than it was written with")


def check_routing(counts: Iterable[int], configured: Collection[int], infeasible: Mapping[int, str]) -> None:
    """Rule 4, of the numbers of experts.

    Args:
        counts: experts of every layer.
        configured: values of the config's keys that hold their number.
        infeasible: decoder layer → why it can't route among its experts.
    """
    found = set(counts)
    if len(found) > 1:
        raise ROUTING.broken(f"layers have different numbers of experts ({sorted(found)}), and the config has one")
    if set(configured) - found:
        raise ROUTING.broken(f"layers have {sorted(found)} experts, the config says {sorted(set(configured))}")
    for index, reason in infeasible.items():
        raise ROUTING.broken(f"layer {index} {reason}")


def check_dtypes(dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> None:
    """Rule 4, of routers and all else that isn't quantized: name → (dtype in the source, dtype to be written)."""
    for name, (before, after) in dtypes.items():
        if before != after:
            raise ROUTING.broken(f"{name!r} is {before} in the source and would be written as {after}")


def check_complete(source: Collection[str], written: Collection[str], gone: Collection[str]) -> None:
    """Rule 5: every tensor of the source is written under its name, except those in `gone`."""
    if lost := sorted(set(source) - set(written) - set(gone)):
        raise COMPLETE.broken(f"{lost[0]!r} is in the source and wasn't written ({len(lost)} such tensors)")


def check_kernels(target: str, loaded: Collection[str], widths: Collection[float], schemes: Iterable[Scheme]) -> None:
    """Rule 7: whether a target loads each scheme.

    Args:
        target: its name.
        loaded: names of schemes that it has kernels for, beside packed integers.
        widths: of packed integers that it loads.
        schemes: of the layers.
    """
    for scheme in schemes:
        if scheme.name == "wna16":
            if scheme.bits not in widths:
                raise KERNELS.broken(f"the target {target!r} loads {sorted(widths)} bits, not {scheme.bits}")
        elif scheme.name not in loaded:
            raise KERNELS.broken(f"the target {target!r} has no kernel for {scheme.name} experts")


def check_format(config: Mapping[str, Any], target: str | None) -> None:
    """Rule 8: the global `format` against the groups'.

    SGLang looks at the global one alone where experts are packed, so there it must be theirs.
    """
    formats = {str(group["format"]) for group in config["config_groups"].values()}
    wanted = next(iter(formats)) if len(formats) == 1 else MIXED
    if config["format"] != wanted:
        raise FORMAT.broken(f"the config's format is {config['format']!r}, its groups make it {wanted!r}")
    if target == "sglang" and PACKED in formats and len(formats) > 1:
        raise FORMAT.broken("SGLang reads packed experts only where all groups are packed, and these are mixed")
