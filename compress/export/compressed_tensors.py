"""The `compressed-tensors` format: packed experts as servers read them, one linear layer per expert and projection.

Promise: what is written is exactly what the in-memory model holds (codes and scales are the same numbers, only under
other names), and every rule below that a server relies on is checked before anything is given to the writer. Nothing
here imports the `compressed-tensors` library.

The rules, from the loaders of vLLM 0.33 and SGLang 0.5 (they look at expert 0 of a layer only, so a file that breaks
one may load and be wrong):

1. gate, up and down of all experts of a layer share one scheme; layers may differ.
2. Weights are symmetric integers in groups along the input; groups divide both sides of an expert; a row is whole
   32-bit words; no activation order.
3. Experts have the names that the family has on disk. There is one group per scheme, with a target that doesn't depend
   on what stands before the layers; everything dense is in `ignore`, by name and by pattern.
4. Routers and correction biases stay as they are in the source.
5. Every tensor of the source that isn't replaced is carried over (write.py does it).
6. Codes are packed without gaps, as compressed-tensors does from 0.18.

Layout and value: docs/targets.md. Source: the pack-quantized format of compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.constants import COMPRESSED_TENSORS
from moe_compress.errors import RunError
from moe_compress.model.expert_names import ExpertNames

PACKING = "pack-quantized"
# The first version of the library that packs like this.
VERSION = "0.18.0"
WIDTHS = range(2, 9)
# int64 [2] beside every matrix: its shape.
SHAPE_BYTES = 16


@dataclass(frozen=True, order=True)
class Scheme:
    """How all experts of a layer are stored: `bits` per code, `group_size` weights of a row share a scale."""

    bits: int
    group_size: int

    def weights(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": False,
            "actorder": None,
        }


@dataclass(frozen=True)
class WrittenLayer:
    """A layer that was written packed: its scheme, how its experts are called, and how many there are."""

    scheme: Scheme
    names: ExpertNames
    num_experts: int

    def modules(self) -> list[str]:
        """Module paths of all its expert projections, as in the file."""
        return [self.names.linear(e, p) for e in range(self.num_experts) for p in self.names.leaves]


def layer_scheme(index: int, layout: Mapping[str, Any]) -> Scheme:
    """The one scheme of a packed layer.

    Args:
        index: decoder layer, for messages.
        layout: what `PackedExperts.describe` says.

    Raises RunError when a server would misread the layer (rules 1 and 2).
    """
    used = {e for projection in layout["projections"].values() for e in projection["experts"]}
    if len(used) != 1:
        raise RunError(f"layer {index}: experts differ in their encoding ({', '.join(sorted(used))}): servers load one")
    (name,) = used
    encoding = layout["encodings"][name]
    scheme = Scheme(int(encoding["bits"]), int(encoding.get("group_size", -1)))
    if scheme.bits not in WIDTHS or scheme.group_size < 1 or not encoding["symmetric"]:
        raise RunError(f"layer {index}: {name!r} is not a symmetric group-wise encoding of 2 to 8 bits")
    if layout["biases"]:
        raise RunError(f"layer {index}: experts have biases, which the format has no place for")
    for projection, entry in layout["projections"].items():
        length = int(entry["in_features"])
        if length % scheme.group_size or length * scheme.bits % 32:
            raise RunError(f"layer {index}: {name!r} doesn't divide the {length} inputs of {projection}")
    return scheme


def layer_tensors(
    index: int,
    experts: Mapping[str, Tensor],
    layout: Mapping[str, Any],
    names: ExpertNames,
    scale_dtype: torch.dtype,
) -> tuple[dict[str, Tensor], WrittenLayer]:
    """A packed layer's tensors as the file has them. No weight is copied: they are views of the stacks.

    Args:
        index: decoder layer, for messages.
        experts: tensors of the experts module by name ("gate_proj.b4g128.codes" [E, O, W], "….scale" [E, O, G]).
        layout: what `PackedExperts.describe` says.
        names: how the experts are called.
        scale_dtype: of the scales in the file; the model's own.

    Returns:
        Name → tensor (per expert and projection `weight_packed` int32 [O, W], `weight_scale` [O, G], `weight_shape`
        int64 [2]), and what the config has to say of them.

    Raises RunError when a server would misread the layer, or a scale isn't a number of `scale_dtype`.
    """
    scheme = layer_scheme(index, layout)
    (encoding,) = layout["encodings"]
    written: dict[str, Tensor] = {}
    count = 0
    for projection, entry in layout["projections"].items():
        stack = f"{projection}_proj.{encoding}"
        codes_EOW, scale_EOG = experts[f"{stack}.codes"], experts[f"{stack}.scale"]
        stored_EOG = scale_EOG.to(scale_dtype)
        if not torch.equal(stored_EOG.float(), scale_EOG.float()):
            raise RunError(f"layer {index}: a scale of {projection} is out of the range of {scale_dtype}")
        shape = torch.tensor([entry["out_features"], entry["in_features"]], dtype=torch.int64)
        count = len(entry["experts"])
        for expert in range(count):
            name = names.linear(expert, projection)
            written[f"{name}.weight_packed"] = codes_EOW[expert]
            written[f"{name}.weight_scale"] = stored_EOG[expert]
            written[f"{name}.weight_shape"] = shape.clone()
    return written, WrittenLayer(scheme, names, count)


def scale_dtype(config: Mapping[str, Any], stored: torch.dtype) -> torch.dtype:
    """Dtype of the scales in the file: float16 where the model is, else as they are (servers cast, exactly)."""
    text = config.get("text_config") or {}
    named = [v.get(key) for v in (text, config) for key in ("dtype", "torch_dtype") if v.get(key)]
    return torch.float16 if named and str(named[0]).removeprefix("torch.") == "float16" else stored


def quantization_config(layers: Mapping[int, WrittenLayer], dense: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        layers: decoder layer → what was written of it.
        dense: module paths, as in the file, of everything with a matrix that stays dense.

    Raises RunError if a server that reads it would take a dense layer for a quantized one, or the other way round.
    """
    groups = {}
    for number, scheme in enumerate(sorted({layer.scheme for layer in layers.values()})):
        members = {i: layer for i, layer in layers.items() if layer.scheme == scheme}
        groups[f"group_{number}"] = {
            "targets": _targets(members),
            "format": PACKING,
            "weights": scheme.weights(),
            "input_activations": None,
            "output_activations": None,
        }
    quantized = [module for layer in layers.values() for module in layer.modules()]
    dense = list(dict.fromkeys(dense))
    config = {
        "quant_method": COMPRESSED_TENSORS,
        "format": PACKING,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "version": VERSION,
        "ignore": [*dense, *_patterns(dense, quantized)],
        "config_groups": groups,
    }
    _check(config, layers, dense)
    return config


class ServerView:
    """What a server makes of a `quantization_config`: `ignore` first, then the first group with a target."""

    def __init__(self, config: Mapping[str, Any]):
        self._ignored = _Entries(config.get("ignore") or ())
        self._groups = [(_Entries(group["targets"]), group["weights"]) for group in config["config_groups"].values()]

    def scheme(self, module: str) -> dict[str, Any] | None:
        """`weights` of the group that a module (path, as in the file) is in, or None where it stays dense."""
        if module in self._ignored:
            return None
        return next((weights for targets, weights in self._groups if module in targets), None)


class _Entries:
    """Entries of `targets` or `ignore`: names, and patterns after "re:"."""

    def __init__(self, entries: Iterable[str]):
        entries = list(entries)
        self.names = {entry for entry in entries if not entry.startswith("re:")}
        self._patterns = [re.compile(entry[3:]) for entry in entries if entry.startswith("re:")]

    def __contains__(self, module: str) -> bool:
        return module in self.names or any(pattern.match(module) for pattern in self._patterns)


def _targets(layers: Mapping[int, WrittenLayer]) -> list[str]:
    """One pattern for all layers whose experts are called alike.

    It leaves open what stands before the layers and between layer and experts (servers have modules of their own), and
    names neither expert nor projection.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for index, layer in layers.items():
        before, after = _around(layer.names.experts, index)
        found.setdefault((before.rpartition(".")[2], after.rpartition(".")[2]), []).append(index)
    return [
        rf"re:.*{re.escape(stack)}\.({'|'.join(map(str, sorted(numbers)))})\.(.*\.)?{re.escape(experts)}\..*"
        for (stack, experts), numbers in found.items()
    ]


def _around(path: str, index: int) -> tuple[str, str]:
    """What stands before and after the number of the layer in a path."""
    before, number, after = f".{path}.".partition(f".{index}.")
    if not number or not before:
        raise RunError(f"{path!r} doesn't name decoder layer {index}: its experts can't be told from other layers'")
    return before.strip("."), after.strip(".")


def _patterns(dense: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Patterns for dense modules that hold whatever stands before them: servers have prefixes of their own."""
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
    return r"re:(.*\.)?" + r"\.".join(r"\d+" if part == "#" else re.escape(part) for part in path.split(".")) + "$"


def _check(config: Mapping[str, Any], layers: Mapping[int, WrittenLayer], dense: Iterable[str]) -> None:
    view = ServerView(config)
    for index, layer in layers.items():
        for module in layer.modules():
            if view.scheme(module) != layer.scheme.weights():
                raise RunError(f"layer {index}: {module!r} would be read with another scheme than it was written with")
    for module in dense:
        if view.scheme(module) is not None:
            raise RunError(f"{module!r} is dense, and nothing in the config says so")
