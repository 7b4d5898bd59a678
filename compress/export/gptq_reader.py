"""Reading GPTQ checkpoints whose experts alone are quantized, symmetric and in order: the integers as they are.

A file holds them transposed; turned back they are the words that packed experts hold in memory (gptq_format.py). Zero
points and the order of columns are compared with what a symmetric file in order has: anything else is refused, not
guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import CheckpointError, UnsupportedModelError
from moe_compress.model import MoEModel
from moe_compress.model.expert_names import ExpertNames
from moe_compress.quant.stack import Encoding, name_of

from .compressed_reader import Presented, Seen, check_parts, packed_layout, present_experts, same_shape
from .gptq_format import PARTS, WIDTHS, module_bits, zero_points
from .schemes import Scheme


def present(model: MoEModel, source: Checkpoint) -> Seen:
    """A checkpoint as the native format would hold it; like the reader of compressed-tensors."""
    config = source.quantization
    if not config.get("sym", True) or config.get("desc_act") or config.get("checkpoint_format", "gptq") != "gptq":
        raise UnsupportedModelError(
            f"{source.folder} is already quantized (GPTQ, not symmetric integers in order, checkpoint_format gptq); "
            "start from the checkpoint in full precision"
        )
    modules = {n.removesuffix(".qweight") for n in source.tensors if n.endswith(".qweight")}
    parts = {f"{module}.{part}" for module in modules for part in (*PARTS, "weight")}

    def read(names: ExpertNames, count: int) -> Presented:
        return _layer(source, config, names, count)

    return present_experts(model, source, modules, parts, read)


def _layer(source: Checkpoint, config: Mapping[str, Any], names: ExpertNames, count: int) -> Presented:
    first = names.linear(0, "down")
    bits, group_size = module_bits(config, first), int(config["group_size"])
    if bits not in WIDTHS or group_size < 1:
        raise CheckpointError(f"{source.folder}: {first!r} is quantized, and its config makes it {bits} bits")
    scheme = Scheme(bits, group_size)
    stack = {p: f"{p}_proj.{Encoding(bits, group_size).name}" for p in names.leaves}
    stacks: dict[str, list[str]] = {}
    projections: dict[str, Any] = {}
    dtypes = set()
    for projection in names.leaves:
        modules = [names.linear(e, projection) for e in range(count)]
        for module in modules:
            check_parts(source, module, PARTS, ("bias",))
            if module_bits(config, module) != bits:
                raise CheckpointError(f"{source.folder}: {module!r} has another width than the experts beside it")
        words, rows = same_shape(source, modules, lambda m: _stored(source, f"{m}.qweight"))
        columns = words * 32 // bits
        for module in modules:
            _check(source, module, scheme, rows, columns)
        dtypes.add(name_of(source.tensors[f"{modules[0]}.scales"].dtype))
        stacks[f"{stack[projection]}.codes"] = [f"{m}.qweight" for m in modules]
        stacks[f"{stack[projection]}.scale"] = [f"{m}.scales" for m in modules]
        projections[projection] = {"out_features": rows, "in_features": columns}
    if len(dtypes) > 1:
        raise CheckpointError(f"{source.folder}: scales of {names.experts!r} have different dtypes: {sorted(dtypes)}")
    return Presented("packed", packed_layout(scheme, dtypes.pop(), projections, count), stacks, list(stacks))


def _check(source: Checkpoint, module: str, scheme: Scheme, rows: int, columns: int) -> None:
    """Raise CheckpointError when a module's tensors don't have the shapes and the zero points that the config says."""
    groups = columns // scheme.group_size
    wanted = {
        "qweight": (columns * scheme.bits // 32, rows),
        "scales": (groups, rows),
        "qzeros": (groups, rows * scheme.bits // 32),
        "g_idx": (columns,),
    }
    for part, shape in wanted.items():
        found = source.tensors[f"{module}.{part}"]
        if found.shape != shape or (part != "scales" and found.dtype != torch.int32):
            raise CheckpointError(
                f"{source.folder}: {module}.{part} is {found.dtype} {list(found.shape)}, and [{rows}, {columns}] at "
                f"{scheme.bits} bits in groups of {scheme.group_size} makes it {list(shape)}"
            )
    order = torch.arange(columns, dtype=torch.int32) // scheme.group_size
    if not torch.equal(source.get(f"{module}.g_idx"), order):
        raise CheckpointError(f"{source.folder}: {module}.g_idx reorders columns, and its config says that it doesn't")
    if not torch.equal(source.get(f"{module}.qzeros"), zero_points(scheme.bits, groups, rows)):
        raise CheckpointError(f"{source.folder}: {module}.qzeros isn't symmetric, and its config says that it is")


def _stored(source: Checkpoint, name: str) -> tuple[int, int]:
    rows, columns = source.tensors[name].shape
    return int(rows), int(columns)
