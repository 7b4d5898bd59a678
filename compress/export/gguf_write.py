"""A model whose experts are GGUF blocks → a folder with one .gguf that llama.cpp loads.

Promise: the experts' blocks are written as they ran; everything else goes from the source into the type that the layout
gives it, one tensor in memory at a time; metadata and tokenizer are in the file. config.json and the tokenizer's files
lie beside it, so that this package can read, verify and score the result; llama.cpp needs the .gguf alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.checkpoint.atomic import whole_file
from moe_compress.checkpoint.reader import Checkpoint, Lazy, sidecar_files
from moe_compress.checkpoint.writer import CheckpointWriter, tensor_digest
from moe_compress.constants import GGUF, GGUF_FILE
from moe_compress.model import MoEModel
from moe_compress.progress import Progress
from moe_compress.quant.gguf_blocks import BlockType, dequantize, find_type
from moe_compress.quant.gguf_quantize import quantize

from .gguf_architectures import PROJECTIONS, package, write_metadata
from .gguf_layout import Layout
from .gguf_tokenizer import FileTokenizer
from .targets import Target
from .write import on_disk, result_config

# The file's own word for what most of it is; it changes nothing.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12}
_FILE_TYPES |= {"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37}


@dataclass(frozen=True)
class _Item:
    """A tensor of the file: its name and type there, and what it is made of."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    layer: int | None
    origin: str
    projection: str = ""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its bytes."""
        return (*self.shape[:-1], self.type.row_bytes(self.shape[-1]))


def write_gguf(
    model: MoEModel,
    output: Path,
    manifest: dict[str, Any],
    progress: Progress,
    laid_out: Layout,
    tokenizer: FileTokenizer,
    *,
    overwrite: bool = False,
    target: Target | None = None,
) -> str:
    """Write a model that was opened from a folder, its overlay included.

    Args:
        model: with an overlay that holds every block of experts in GGUF blocks.
        output: folder to write.
        manifest: what is recorded beside the tensors' digests.
        progress: told about every layer.
        laid_out: everything but the experts.
        tokenizer: as the file will have it.
        overwrite: whether `output` may hold something.
        target: what reads the file; it gets a smaller top-k as a number.

    Returns:
        The format, "gguf".

    Raises:
        InputError: `output` may not be written.
        RunError: the disk is full, a tensor isn't finite or too large for its type.
    """
    assert model.overlay is not None
    changed = {i: model.overlay.get(i) for i in model.moe_layers}
    descriptions = {i: block[1] for i, block in changed.items() if block is not None}
    config, _ = result_config(model, descriptions, GGUF, target)
    known = type(model.module.config).from_dict(config).to_dict()  # defaults filled in
    config["quantization_config"] = {"quant_method": GGUF, "file": GGUF_FILE}
    items = list(_items(model, laid_out, descriptions))
    writer = CheckpointWriter(output, overwrite=overwrite)
    file = _header(model, laid_out, tokenizer, items, known, next(iter(descriptions.values()))["num_experts"])
    source = _Blocks(model, laid_out)
    with whole_file(writer.partial / GGUF_FILE) as path:
        file.write_header_to_file(path)
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        at = -1
        for item in items:
            if item.layer is not None and item.layer != at:
                at = item.layer
                progress.layer(at)
            tensor = source.of(item)
            file.write_tensor_data(tensor.numpy())
            writer.tensors[item.name] = _entry(tensor, item)
        file.close()
    writer.finish(config, sidecar_files(model.source.folder), {**manifest, "left_out": laid_out.left_out})
    return GGUF


def _items(model: MoEModel, laid_out: Layout, descriptions: Mapping[int, dict[str, Any]]) -> Iterator[_Item]:
    """All tensors in the order of the file: what stands before the layers, the layers, what stands behind."""
    by_layer: dict[int | None, list[_Item]] = {}
    for origin, parts in laid_out.placed.items():
        for name, placed in parts.items():
            layer = int(name.split(".")[1]) if name.startswith("blk.") else None
            by_layer.setdefault(layer, []).append(_Item(name, placed.shape, placed.type, layer, origin))
    for name, origin in laid_out.copied.items():
        placed = laid_out.types[name]
        by_layer[None].append(_Item(name, placed.shape, placed.type, None, origin))
    yield from by_layer.get(None, [])
    for layer in range(len(model.layers)):
        yield from by_layer.get(layer, [])
        if layer not in descriptions:
            continue
        described = descriptions[layer]["layout"]
        for projection, entry in described["projections"].items():
            (encoding,) = set(entry["experts"])
            kind = find_type(described["encodings"][encoding]["blocks"])
            shape = (len(entry["experts"]), entry["out_features"], entry["in_features"])
            stack = f"{model.block(layer).path}.{projection}_proj.{encoding}.blocks"
            yield _Item(f"blk.{layer}.{PROJECTIONS[projection]}.weight", shape, kind, layer, stack, projection)


def _header(
    model: MoEModel,
    laid_out: Layout,
    tokenizer: FileTokenizer,
    items: list[_Item],
    config: Mapping[str, Any],
    experts: int,
) -> Any:
    gguf = package()
    file = gguf.GGUFWriter(None, laid_out.architecture.name)
    file.add_type(gguf.GGUFType.MODEL)
    file.add_name(model.source.folder.resolve().name)
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)
    bytes_of: Counter[str] = Counter()
    for item in items:
        bytes_of[item.type.name] += item.type.row_bytes(item.shape[-1]) * (item.projection != "")
    file.add_file_type(_FILE_TYPES[bytes_of.most_common(1)[0][0]])
    write_metadata(file, laid_out.architecture, config, experts)
    tokenizer.write(file)
    for item in items:
        size = torch.Size(item.stored_shape)
        kind = gguf.GGMLQuantizationType(item.type.number)
        file.add_tensor_info(item.name, item.stored_shape, np.dtype(np.uint8), size.numel(), raw_dtype=kind)
    return file


class _Blocks:
    """Where the bytes of the file's tensors come from."""

    def __init__(self, model: MoEModel, laid_out: Layout):
        self._model, self._layout = model, laid_out
        self._at: tuple[int | None, dict[str, Tensor], dict[str, Tensor]] = (None, {}, {})

    def of(self, item: _Item) -> Tensor:
        """Bytes of a tensor, uint8 [..., bytes of a row]."""
        stacks, beside = self._changed(item.layer)
        if item.projection:
            return stacks[f"{self._model.stack}.{item.layer}.{item.origin}"].contiguous()
        tensor = beside[item.origin] if item.origin in beside else self._model.source.get(item.origin)
        name = next(iter(self._layout.placed[item.origin])) if item.name in self._layout.copied else item.name
        return rounded_parts(self._layout, item.origin, tensor, name)

    def _changed(self, layer: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A changed layer's (expert stacks, router as on disk)."""
        if layer != self._at[0]:
            self._at = (layer, {}, {})
            if layer is not None and self._model.overlay is not None:
                block = self._model.overlay.get(layer)
                if block is not None:
                    self._at = (layer, *on_disk(self._model, layer, *block))
        return self._at[1:]


def rounded_parts(laid_out: Layout, origin: str, tensor: Tensor, name: str) -> Tensor:
    """Blocks of the file's tensor `name`, which is made of the source's tensor `origin`."""
    return quantize(laid_out.tensors.split(origin, tensor)[name], laid_out.placed[origin][name].type)


def _entry(tensor: Tensor, item: _Item) -> dict[str, Any]:
    """As the manifest lists it: numbers as numbers, blocks as bytes."""
    numbers = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return {
        "dtype": numbers.get(item.type.name, "uint8"),
        "type": item.type.name,
        "shape": list(item.shape if item.type.name in numbers else item.stored_shape),
        "bytes": tensor.numel(),
        "sha256": tensor_digest(tensor),
        "file": GGUF_FILE,
    }


class RoundedSource(Checkpoint):
    """A folder whose tensors outside the experts have the values that a GGUF file will hold of them.

    Args:
        inner: the source.
        laid_out: the file.
    """

    def __init__(self, inner: Checkpoint, laid_out: Layout):
        self.folder, self.tensors, self.block_types = inner.folder, inner.tensors, inner.block_types
        self._inner, self._layout = inner, laid_out
        self._changed = {
            name for name, parts in laid_out.placed.items() if any(p.type.name != "F32" for p in parts.values())
        }

    @property
    def config(self) -> dict[str, Any]:
        """config.json as the source presents it."""
        return self._inner.config

    def close(self) -> None:
        """Let go of the mapped files."""
        self._inner.close()

    def get(self, name: str) -> Tensor:
        """The tensor, rounded."""
        tensor = self._inner.get(name)
        if name not in self._changed:
            return tensor
        parts = {
            part: dequantize(rounded_parts(self._layout, name, tensor, part), placed.type)
            for part, placed in self._layout.placed[name].items()
        }
        return self._layout.tensors.join(name, parts, tuple(tensor.shape))

    def slice(self, name: str) -> Any:
        """Lazy handle on a tensor."""
        return Lazy(self, name) if name in self._changed else self._inner.slice(name)
