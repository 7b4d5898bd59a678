"""The `compressed-tensors` format: quantized experts as servers read them, one linear layer per expert and projection,
and packed linear layers beside them.

Promise: what is written is exactly what the in-memory model holds (codes and scales are the same numbers, only under
other names), and every rule that a server relies on (rules.py) is checked before anything is given to the writer.
Nothing here imports the `compressed-tensors` library.

Layout and value: docs/targets.md. Source: the formats pack-quantized, int-quantized and float-quantized of
compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from moe_compress.checkpoint.reader import config_dtype
from moe_compress.constants import COMPRESSED_TENSORS
from moe_compress.errors import RunError
from moe_compress.model.beside import Matrix
from moe_compress.model.expert_names import ExpertNames

from .matching import ServerView, WrittenLayer, dense_patterns, layer_patterns, linear_patterns
from .rules import PACKING, WHOLE, WIDTHS, check_alike, check_format, check_reading, packed_scheme, scaled_scheme
from .schemes import MIXED, Scheme

# The first version of the library that packs like this.
VERSION = "0.18.0"
# int64 [2] beside every packed matrix: its shape.
SHAPE_BYTES = 16


def layer_scheme(index: int, layout: Mapping[str, Any]) -> Scheme:
    """The one scheme of a quantized layer, from what its experts' `describe` says.

    Raises RunError when a server would misread the layer (rules 1, 2 and 6); `index` is for the message.
    """
    return scaled_scheme(index, layout) if "scheme" in layout else packed_scheme(index, layout)


def layer_tensors(
    index: int,
    experts: Mapping[str, Tensor],
    layout: Mapping[str, Any],
    names: ExpertNames,
    scale_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """A quantized layer's tensors as the file has them. No weight is copied: they are views of the stacks.

    Args:
        index: decoder layer, for messages.
        experts: tensors of the experts module by name ("gate_proj.b4g128.codes" [E, O, W], "….scale" [E, O, G]; of
            scaled experts "gate_proj.codes" [E, O, K], "gate_proj.scale" [E, M, N]).
        layout: what the experts' `describe` says.
        names: how the experts are called.
        scale_dtype: of packed integers' scales in the file; the model's own.

    Returns:
        Name → tensor (per expert and projection `weight_packed` int32 [O, W], `weight_scale` [O, G], `weight_shape`
        int64 [2]; of scaled ones `weight` int8 or e4m3 [O, K], `weight_scale` [M, N]).

    Raises RunError when experts aren't alike (rule 1), or a scale isn't a number of `scale_dtype`.
    """
    scaled = "scheme" in layout
    linears = {}
    for projection, entry in layout["projections"].items():
        stack = f"{projection}_proj" if scaled else f"{projection}_proj.{next(iter(layout['encodings']))}"
        codes, scale = experts[f"{stack}.codes"], experts[f"{stack}.scale"]
        if scaled:
            linears[projection] = [{"weight": c, "weight_scale": s} for c, s in zip(codes, scale, strict=True)]
            continue
        stored = exactly(scale, scale_dtype, f"layer {index}: a scale of {projection}")
        shape = torch.tensor([entry["out_features"], entry["in_features"]], dtype=torch.int64)
        linears[projection] = [
            {"weight_packed": c, "weight_scale": s, "weight_shape": shape.clone()}
            for c, s in zip(codes, stored, strict=True)
        ]
    return named_tensors(index, linears, names)


def linear_scheme(matrix: Matrix, encoding: Mapping[str, Any]) -> Scheme:
    """The scheme of a packed linear layer beside the experts, from what its `describe` says.

    Raises RunError when a server would misread it (rules 2 and 6).
    """
    scheme = Scheme(int(encoding["bits"]), int(encoding.get("group_size", -1)))
    if scheme.bits not in WIDTHS or scheme.bits != encoding["bits"] or scheme.group_size < 1:
        raise PACKING.broken(f"{matrix.disk}: not 2 to 8 bits in groups")
    if not encoding["symmetric"]:
        raise WHOLE.broken(f"{matrix.disk} has zero points")
    if reason := scheme.misfit(matrix.rows, matrix.columns):
        raise WHOLE.broken(f"{matrix.disk}: {reason}")
    return scheme


def linear_tensors(matrix: Matrix, tensors: Mapping[str, Tensor], scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """A packed linear layer's tensors as the file has them, from those that run ("b4g128.codes" [1, O, W], …)."""
    codes_1OW, scale_1OG = (next(t for n, t in tensors.items() if n.endswith(end)) for end in (".codes", ".scale"))
    return {
        f"{matrix.disk}.weight_packed": codes_1OW[0],
        f"{matrix.disk}.weight_scale": exactly(scale_1OG, scale_dtype, f"a scale of {matrix.disk}")[0],
        f"{matrix.disk}.weight_shape": torch.tensor([matrix.rows, matrix.columns], dtype=torch.int64),
    }


def named_tensors(index: int, linears: Mapping[str, list[dict[str, Tensor]]], names: ExpertNames) -> dict[str, Tensor]:
    """Projection → per expert its tensors, as tensors by full name. Raises RunError when experts aren't alike."""
    check_alike(index, linears)
    return {
        f"{names.linear(expert, projection)}.{part}": tensor
        for projection, own in linears.items()
        for expert, tensors in enumerate(own)
        for part, tensor in tensors.items()
    }


def exactly(scale: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`scale` in another dtype. Raises RunError where that would be another number."""
    stored = scale.to(dtype)
    if not torch.equal(stored.float(), scale.float()):
        raise RunError(f"{what} is out of the range of {dtype}")
    return stored


def scale_dtype(config: Mapping[str, Any], stored: torch.dtype) -> torch.dtype:
    """Dtype of the scales in the file: float16 where the model is, else as they are (servers cast, exactly)."""
    return torch.float16 if config_dtype(config) == torch.float16 else stored


def quantization_config(
    layers: Mapping[int, WrittenLayer],
    dense: Iterable[str],
    target: str | None = None,
    linears: Mapping[int, Mapping[str, Scheme]] = MappingProxyType({}),
) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        layers: decoder layer → what was written of it.
        dense: module paths, as in the file, of everything with a matrix that stays dense.
        target: name of the target, for rules of its own.
        linears: decoder layer → module path, as in the file → scheme of packed linear layers beside the experts.

    Raises RunError if a server that reads it would take a dense layer for a quantized one, or the other way round.
    """
    groups = {}
    beside = {module: scheme for own in linears.values() for module, scheme in own.items()}
    for number, scheme in enumerate(sorted({*(layer.scheme for layer in layers.values()), *beside.values()})):
        members = {i: layer for i, layer in layers.items() if layer.scheme == scheme}
        own = {i: [m for m, s in modules.items() if s == scheme] for i, modules in linears.items()}
        patterns = [*layer_patterns(members, r"\..*"), *linear_patterns(own)]
        groups[f"group_{number}"] = scheme.group([f"re:{pattern}" for pattern in patterns])
    formats = {group["format"] for group in groups.values()}
    quantized = [*(module for layer in layers.values() for module in layer.modules()), *beside]
    dense = list(dict.fromkeys(dense))
    config = {
        "quant_method": COMPRESSED_TENSORS,
        "format": next(iter(formats)) if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "version": VERSION,
        "ignore": [*dense, *(f"re:{pattern}" for pattern in dense_patterns(dense, quantized))],
        "config_groups": groups,
    }
    view = ServerView(config)

    def read(module: str) -> Scheme | None:
        group = view.group(module)
        return None if group is None else Scheme.of_group(group)

    check_reading(read, {m: layer.scheme for layer in layers.values() for m in layer.modules()})
    check_reading(read, beside)
    check_reading(read, dict.fromkeys(dense))
    check_format(config, target)
    return config
