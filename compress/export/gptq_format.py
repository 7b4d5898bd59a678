"""The GPTQ format: packed experts as vLLM, SGLang and GPTQModel read them, one linear layer per expert and projection.

Promise: codes and scales are the numbers that ran in memory; only their layout differs. Of a matrix [O, K] with b bits
in groups of g, a file holds, transposed and packed along the input,

    qweight int32 [K·b/32, O]   code i of a column is bits [i·b, (i+1)·b) from the lowest of its first word
    scales        [K/g, O]
    qzeros  int32 [K/g, O·b/32] zero points minus 1, packed along the output: 7 or 127 everywhere
    g_idx   int32 [K]           group of each input: i // g

and stands for scale · (code − zero), zero 2^(b−1). That is `checkpoint_format: gptq`, the first version. The second
(`gptq_v2`) stores zero points as they are, and exists for asymmetric grids, whose zero of 0 the first can't store. Here
zero points never vary, and every reader takes a file without a version for the first: so that is what is written.

Rules that all served formats share are in rules.py; `dynamic` says which layers have another width, and what is dense.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_compress.constants import GPTQ
from moe_compress.model.expert_names import ExpertNames

from .compressed_tensors import exactly, named_tensors
from .matching import WrittenLayer, dense_patterns, layer_patterns
from .rules import FORMAT, KERNELS, WHOLE, check_reading, packed_scheme
from .schemes import Scheme

WIDTHS = (4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def beside(bits: int, group_size: int, rows: int, columns: int) -> int:
    """Bytes of `qzeros` and `g_idx` beside a matrix [rows, columns]."""
    return columns // group_size * rows * bits // 8 + 4 * columns


def layer_scheme(index: int, layout: Mapping[str, Any]) -> Scheme:
    """The one scheme of a quantized layer, like that of compressed_tensors.py. Raises RunError (rules 1, 2, 6, 7)."""
    if "scheme" in layout:
        raise KERNELS.broken(f"layer {index}: the format has no place for {layout['scheme']['name']} experts")
    scheme = packed_scheme(index, layout)
    if scheme.bits not in WIDTHS:
        raise KERNELS.broken(f"layer {index}: GPTQ readers load 4 or 8 bits for experts, not {scheme.bits}")
    for projection, entry in layout["projections"].items():
        if int(entry["out_features"]) * scheme.bits % 32:
            raise WHOLE.broken(f"layer {index}, {projection}: {entry['out_features']} zero points aren't whole words")
    return scheme


def layer_tensors(
    index: int,
    experts: Mapping[str, Tensor],
    layout: Mapping[str, Any],
    names: ExpertNames,
    scale_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """A packed layer's tensors as the file has them; arguments and errors like those of compressed_tensors.py.

    Scales are float16, as readers expect, unless one of the layer isn't exactly a float16 number: then they stay in
    `scale_dtype`, the model's own, into which servers cast them anyway.
    """
    scheme = layer_scheme(index, layout)
    (encoding,) = layout["encodings"]
    scales = {p: experts[f"{p}_proj.{encoding}.scale"] for p in layout["projections"]}
    stored = torch.float16 if all(_is_half(scale) for scale in scales.values()) else scale_dtype
    linears = {}
    for projection, entry in layout["projections"].items():
        columns, rows = int(entry["in_features"]), int(entry["out_features"])
        codes = experts[f"{projection}_proj.{encoding}.codes"]
        kept = exactly(scales[projection], stored, f"layer {index}: a scale of {projection}")
        zeros = zero_points(scheme.bits, columns // scheme.group_size, rows)
        group = torch.arange(columns, dtype=torch.int32) // scheme.group_size
        linears[projection] = [
            {"qweight": c.T, "qzeros": zeros.clone(), "scales": s.T, "g_idx": group.clone()}
            for c, s in zip(codes, kept, strict=True)
        ]
    return named_tensors(index, linears, names)


def quantization_config(
    layers: Mapping[int, WrittenLayer], dense: Iterable[str], target: str | None = None
) -> dict[str, Any]:
    """`quantization_config` of config.json; arguments and errors like those of compressed_tensors.py."""
    schemes = {layer.scheme for layer in layers.values()}
    groups = {scheme.group_size for scheme in schemes}
    if len(groups) > 1:
        # vLLM chooses kernels by the file's own group size, whatever `dynamic` says of a layer.
        raise FORMAT.broken(f"layers have groups of {sorted(groups)} weights, and a GPTQ file has one size")
    base = Counter(layer.scheme.bits for layer in layers.values()).most_common(1)[0][0]
    dense = list(dict.fromkeys(dense))
    rules: dict[str, dict[str, Any]] = {}
    # Servers ask for an experts module by its own path, readers of single layers by each projection's.
    within = r"(\..*)?$"
    ours = layer_patterns(layers, within)
    alike = [m for m in _with_parents(dense) if any(re.match(pattern, m) for pattern in ours)]
    quantized = _with_parents([module for layer in layers.values() for module in layer.modules()])
    for pattern in dense_patterns(alike, quantized):
        rules[f"-:{pattern.removesuffix('$')}{within}"] = {}
    rules[f"-:(?!{'|'.join(ours)})"] = {}
    for bits in sorted({scheme.bits for scheme in schemes} - {base}):
        members = {i: layer for i, layer in layers.items() if layer.scheme.bits == bits}
        rules |= {f"+:{pattern}": {"bits": bits} for pattern in layer_patterns(members, within)}
    config = {
        "quant_method": GPTQ,
        "checkpoint_format": "gptq",
        "bits": base,
        "group_size": groups.pop(),
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": rules,
        "meta": {"quantizer": ["moe-compress"]},
    }
    written = {m: layer.scheme.bits for layer in layers.values() for m in _with_parents(layer.modules())}
    check_reading(lambda module: module_bits(config, module), written)
    check_reading(lambda module: module_bits(config, module), dict.fromkeys(dense))
    return config


def module_bits(config: Mapping[str, Any], module: str) -> int | None:
    """Width with which readers take a module (path, as in the file), or None where it stays dense.

    The first rule of `dynamic` that matches decides: "-:" leaves the module dense, "+:" or nothing changes its width.
    """
    for rule, values in (config.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("-:").removeprefix("+:"), module):
            return None if rule.startswith("-:") else int(values.get("bits", config["bits"]))
    return int(config["bits"])


def _with_parents(modules: Iterable[str]) -> list[str]:
    """Modules, and the experts module above each that is one expert's ("….experts" of "….experts.3.gate_proj")."""
    found: dict[str, None] = {}
    for module in modules:
        parts = module.split(".")
        if len(parts) > 2 and parts[-2].isdigit():
            found[".".join(parts[:-2])] = None
        found[module] = None
    return list(found)


def zero_points(bits: int, groups: int, rows: int) -> Tensor:
    """`qzeros` of a symmetric matrix: every field is the zero point minus 1."""
    field = (1 << bits - 1) - 1
    word = sum(field << start for start in range(0, 32, bits))
    return torch.full((groups, rows * bits // 32), word, dtype=torch.int32)


def _is_half(scale: Tensor) -> bool:
    return torch.equal(scale.to(torch.float16).float(), scale.float())
