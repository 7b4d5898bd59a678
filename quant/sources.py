"""Checkpoints that others quantized, as the dense tensors that their own loaders would make of them.

Promise: a tensor is decoded by the rule of its format or the folder is refused by the name of what isn't known; nothing
that carries a scale is taken for plain numbers. Decoding is per tensor, when it is read: one layer in memory.

| `quant_method` | what is decoded |
|---|---|
| fp8 | `X` (e4m3) with `X_scale_inv`: one scale per block, per row or per tensor (DeepSeek-V3's layout) |
| mxfp4 | `X_blocks`, `X_scales`: pairs of e2m1 numbers, one power of two per 32 (gpt-oss) |
| compressed-tensors | pack-quantized, int-quantized, float-quantized and naive-quantized linear layers |

Letters: E experts, O output features, K input features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_compress.checkpoint.decoded import Decoded, DecodedCheckpoint
from moe_compress.checkpoint.reader import Checkpoint, config_dtype
from moe_compress.errors import CheckpointError, UnsupportedModelError

from .packing import packed_words, unpack

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Ranges of activations, scales of caches: they belong to a quantized model at run time, not to its weights.
OF_ACTIVATIONS = (
    "input_scale",
    "output_scale",
    "activation_scale",
    "input_zero_point",
    "output_zero_point",
    "input_global_scale",
    "k_scale",
    "v_scale",
    "q_scale",
)
# e2m1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, table 5).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_BLOCK = 32


def decode(source: Checkpoint) -> DecodedCheckpoint:
    """A quantized checkpoint folder as a dense one.

    Raises UnsupportedModelError for a format, or a part of one, that isn't known; CheckpointError where tensors don't
    belong together.
    """
    config = source.quantization
    method = config["quant_method"]
    if method not in _METHODS:
        raise UnsupportedModelError(
            f"{source.folder} is already quantized ({method}); known are {', '.join(sorted(_METHODS))}: start from one "
            "of these or from the checkpoint in full precision"
        )
    decoded = _METHODS[method](source, config)
    used = {part for entry in decoded.values() for part in entry.parts}
    hidden = [n for n in source.tensors if n.rpartition(".")[2] in OF_ACTIVATIONS and n not in used]
    for name in source.codes():
        if name not in used and name not in hidden:
            raise CheckpointError(
                f"{source.folder} holds {name!r} ({source.tensors[name].dtype}), and not what {method} decodes it "
                "with: start from the checkpoint in full precision"
            )
    for name, entry in decoded.items():
        if name in source.tensors and name not in entry.parts:
            raise CheckpointError(f"{source.folder} holds {name!r} twice: as it is, and as {entry.parts[0]!r}")
    return DecodedCheckpoint(source.folder, method, decoded, hidden)


def _dense_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype that config.json names, bfloat16 if none: in it loaders put what they decode."""
    return config_dtype(source.config) or torch.bfloat16


# --- fp8 -----------------------------------------------------------------------------------------------------------


def _fp8(source: Checkpoint, config: Mapping[str, Any]) -> dict[str, Decoded]:
    block, dtype = config.get("weight_block_size"), _dense_dtype(source)
    if block is not None and not _is_block(block):
        raise CheckpointError(f"{source.folder}: weight_block_size is {block!r}, not rows and columns of a block")
    decoded = {}
    for scale, info in source.tensors.items():
        if not scale.endswith("_scale_inv"):
            continue
        name = scale.removesuffix("_scale_inv")
        weight = source.tensors.get(name)
        if weight is None or weight.dtype not in FP8 or len(weight.shape) < 2:
            raise CheckpointError(
                f"{source.folder} holds {scale!r}, but no matrix of 8-bit floats {name!r} that it belongs to"
            )
        size = _block_size(source, name, weight.shape, info.shape, block)
        decoded[name] = Decoded((name, scale), partial(blocks_to_dense, size=size, dtype=dtype), dtype, weight.shape)
    return decoded


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)


def _block_size(
    source: Checkpoint, name: str, weight: tuple[int, ...], scale: tuple[int, ...], configured: Any
) -> tuple[int, int]:
    """Rows and columns that share a scale: as configured, or one scale for all, or one per row."""
    rows, columns = weight[-2:]
    kinds = [(rows, columns), (1, columns)]
    if configured:
        kinds.insert(0, (configured[0], configured[1]))
    for height, width in kinds:
        grid = (-(-rows // height), -(-columns // width))
        if scale == (*weight[:-2], *grid) or (grid == (1, 1) and scale in ((), (1,), weight[:-2])):
            return height, width
    raise CheckpointError(
        f"{source.folder}: {name!r} is {list(weight)}, and its scales {list(scale)} are neither one per block of "
        f"{configured}, nor per row, nor per tensor"
    )


def blocks_to_dense(weight: Tensor, scale: Tensor, *, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """8-bit floats [..., O, K] times one scale per block of `size`, in `dtype`; blocks at the edges may be cut off.

    `scale`: float, or bytes that are exponents (e8m0: 2^(byte − 127)).
    """
    rows, columns = weight.shape[-2:]
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    factor = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    factor = factor.reshape(*weight.shape[:-2], *grid)
    factor = factor.repeat_interleave(size[1], dim=-1)[..., :columns]
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for block in range(grid[0]):  # a row of blocks at a time: no float32 copy of the whole
        part = slice(block * size[0], min((block + 1) * size[0], rows))
        dense[..., part, :] = weight[..., part, :].float() * factor[..., block, None, :]
    return dense


# --- mxfp4 ---------------------------------------------------------------------------------------------------------


def _mxfp4(source: Checkpoint, config: Mapping[str, Any]) -> dict[str, Decoded]:
    dtype = _dense_dtype(source)
    decoded = {}
    for blocks, info in source.tensors.items():
        if not blocks.endswith("_blocks"):
            continue
        name = blocks.removesuffix("_blocks")
        scales = source.tensors.get(f"{name}_scales")
        fits = info.dtype == torch.uint8 and len(info.shape) == 4 and info.shape[-1] == MX_BLOCK // 2
        if scales is None or not fits or scales.shape != info.shape[:-1] or scales.dtype != torch.uint8:
            found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise CheckpointError(
                f"{source.folder}: {blocks!r} is {info.dtype} {list(info.shape)}, and {name + '_scales'!r} is {found}; "
                "torch.uint8 [experts, out, groups, 16], and one for each group, are expected"
            )
        experts, rows, groups = scales.shape
        shape = (experts, groups * MX_BLOCK, rows)
        decoded[name] = Decoded((blocks, f"{name}_scales"), partial(mx_to_dense, dtype=dtype), dtype, shape)
    return decoded


def mx_to_dense(blocks_EOGb: Tensor, scales_EOG: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Pairs of e2m1 numbers (the low half first), 16 bytes per group, times 2^(scale − 127) → [E, K, O] in `dtype`.

    Transposed, because gpt-oss holds its experts' matrices input first.
    """
    experts, rows, groups, _ = blocks_EOGb.shape
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32, device=blocks_EOGb.device)
    byte = torch.arange(256, device=blocks_EOGb.device)
    pair_B2 = torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
    dense_EKO = torch.empty(experts, groups * MX_BLOCK, rows, dtype=dtype, device=blocks_EOGb.device)
    for expert in range(experts):  # indices take eight bytes each: not for a whole layer at once
        number_OGg = pair_B2[blocks_EOGb[expert].long()].flatten(-2)
        scaled_OGg = torch.ldexp(number_OGg, scales_EOG[expert, ..., None].int() - 127)
        dense_EKO[expert] = scaled_OGg.flatten(1).T
    return dense_EKO


# --- compressed-tensors --------------------------------------------------------------------------------------------


_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def _compressed_tensors(source: Checkpoint, config: Mapping[str, Any]) -> dict[str, Decoded]:
    from moe_compress.export.matching import ServerView

    view = ServerView(config)
    decoded = {}
    for module, parts in _by_module(source.tensors, ("weight_packed", "weight_scale", "weight_global_scale")).items():
        if "weight_global_scale" in parts:
            raise UnsupportedModelError(
                f"{source.folder}: {module!r} has scales of scales (NVFP4), which isn't known: start from the "
                "checkpoint in full precision"
            )
        group = view.group(module) or {}
        scheme = group.get("weights")
        if scheme is None or "weight_scale" not in parts:
            lacking = "its scale" if scheme else "its group in config.json"
            raise CheckpointError(f"{source.folder}: {module!r} is quantized, and {lacking} is missing")
        if (form := group.get("format") or config.get("format")) not in _FORMATS:
            raise UnsupportedModelError(
                f"{source.folder}: {module!r} is in the format {form}, which isn't known ({', '.join(_FORMATS)} are): "
                "start from the checkpoint in full precision"
            )
        if scheme.get("actorder") in ("group", "dynamic") or f"{module}.weight_g_idx" in source.tensors:
            raise UnsupportedModelError(
                f"{source.folder}: {module!r} is grouped by activation order, which isn't known: start from the "
                "checkpoint in full precision"
            )
        take = _packed if "weight_packed" in parts else _plain
        decoded[f"{module}.weight"] = take(source, module, scheme)
    return decoded


def _by_module(names: Iterable[str], leaves: tuple[str, ...]) -> dict[str, set[str]]:
    """Module path → those of `leaves` that it has."""
    found: dict[str, set[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf in leaves:
            found.setdefault(module, set()).add(leaf)
    return found


def _packed(source: Checkpoint, module: str, scheme: Mapping[str, Any]) -> Decoded:
    bits, symmetric = int(scheme["num_bits"]), bool(scheme.get("symmetric", True))
    names = [f"{module}.{leaf}" for leaf in ("weight_packed", "weight_scale", "weight_shape")]
    zero = f"{module}.weight_zero_point"
    if not symmetric:
        names.append(zero)
    elif zero in source.tensors:
        raise CheckpointError(f"{source.folder} holds {zero!r}, and config.json says that its codes are symmetric")
    for name in names:
        if name not in source.tensors:
            raise CheckpointError(f"{source.folder} lacks {name}")
    rows, columns = (int(v) for v in source.get(names[2]).tolist())
    codes, scale = source.tensors[names[0]], source.tensors[names[1]]
    if codes.shape != (rows, packed_words(columns, bits)):
        raise CheckpointError(
            f"{source.folder}: {names[0]!r} has the shape {list(codes.shape)}; {bits} bits of [{rows}, {columns}] "
            "without gaps have another (compressed-tensors before 0.18 left gaps): write it again with a newer one"
        )
    size = int(scheme["group_size"]) if scheme.get("strategy") == "group" else columns
    if columns % size or scale.shape != (rows, columns // size):
        raise CheckpointError(
            f"{source.folder}: {names[1]!r} is {list(scale.shape)}, and of [{rows}, {columns}] one scale for every "
            f"{size} weights of a row is expected"
        )
    decoder = partial(packed_to_dense, bits=bits, dtype=scale.dtype)
    return Decoded(tuple(names), decoder, scale.dtype, (rows, columns))


def packed_to_dense(
    words: Tensor, scale_OG: Tensor, shape: Tensor, zero: Tensor | None = None, *, bits: int, dtype: torch.dtype
) -> Tensor:
    """int32 words [O, W] of codes along the input, scales [O, G] → (code − zero) · scale, [O, K].

    `zero`: int32 words [ceil(O · bits / 32), G], packed along the output; None for the middle of the codes.
    """
    rows, columns = (int(v) for v in shape.tolist())
    level_OK = unpack(words, bits, columns).short()
    groups = scale_OG.shape[1]
    if zero is None:
        level_OK -= 1 << (bits - 1)
    else:
        zero_OG = unpack(zero.T.contiguous(), bits, rows).T.short()
        level_OK -= zero_OG.repeat_interleave(columns // groups, dim=1)
    dense = level_OK.view(rows, groups, columns // groups).float() * scale_OG.float()[..., None]
    return dense.view(rows, columns).to(dtype)


def _plain(source: Checkpoint, module: str, scheme: Mapping[str, Any]) -> Decoded:
    name, scale_name = f"{module}.weight", f"{module}.weight_scale"
    weight, scale = source.tensors.get(name), source.tensors[scale_name]
    if weight is None or weight.dtype not in (torch.int8, *FP8) or len(weight.shape) != 2:
        raise UnsupportedModelError(f"{source.folder}: {module!r} has a scale, and no 8-bit matrix that it belongs to")
    dtype = scale.dtype if scale.dtype in (torch.bfloat16, torch.float16) else _dense_dtype(source)
    rows, columns = weight.shape
    strategy = scheme.get("strategy")
    sizes = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, int(scheme.get("group_size") or columns)),
        "block": tuple(int(v) for v in scheme.get("block_structure") or (rows, columns)),
    }
    zero = f"{module}.weight_zero_point"
    if strategy not in sizes or not scheme.get("symmetric", True):
        raise UnsupportedModelError(
            f"{source.folder}: {module!r} is quantized by {strategy}, symmetric {scheme.get('symmetric')}, which isn't "
            "known: start from the checkpoint in full precision"
        )
    size = sizes[strategy]
    decoder = partial(_without_zero, size=(size[0], size[1]), dtype=dtype)
    parts = (name, scale_name, zero) if zero in source.tensors else (name, scale_name)
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    if scale.shape not in (grid, *([(), (1,)] if grid == (1, 1) else []), *([(rows,)] if grid == (rows, 1) else [])):
        raise CheckpointError(f"{source.folder}: {scale_name!r} is {list(scale.shape)}, not {list(grid)}")
    return Decoded(parts, decoder, dtype, weight.shape)


def _without_zero(
    weight: Tensor, scale: Tensor, zero: Tensor | None = None, *, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`blocks_to_dense` of a symmetric weight, whose zero points some writers keep all the same, all zero."""
    if zero is not None and bool(zero.float().any()):
        raise CheckpointError("a symmetric weight has zero points that aren't zero")
    return blocks_to_dense(weight, scale, size=size, dtype=dtype)


_METHODS: dict[str, Callable[[Checkpoint, Mapping[str, Any]], dict[str, Decoded]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}
