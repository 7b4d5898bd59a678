"""Reading the folders that `gguf_write.py` writes: the experts' blocks as they are, everything else dequantized.

What the file holds is presented under the names of the module tree, so the model that runs here computes with the
weights that llama.cpp reads from the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.checkpoint.reader import Checkpoint, Lazy, TensorInfo
from moe_compress.constants import GGUF_FILE
from moe_compress.errors import CheckpointError
from moe_compress.model import MoEModel
from moe_compress.quant.gguf_blocks import dequantize, find_type

from .compressed_reader import Seen
from .gguf_architectures import PROJECTIONS, Tensors, find_architecture


class GGUFCheckpoint(Checkpoint):
    """A folder with a .gguf, presented under the names of the module tree.

    Args:
        folder: the folder.
        tensors: names and layouts of everything but the experts.
        dense: name → shape of what the model needs beside them.
        stacks: name → the file's tensor, of the experts' blocks.

    Raises CheckpointError when the file lacks something, or holds what nothing needs.
    """

    def __init__(self, folder: Path, tensors: Tensors, dense: dict[str, tuple[int, ...]], stacks: dict[str, str]):
        super().__init__(folder)
        self._held, self._layout, self._stacks = self.tensors, tensors, stacks
        parts = {name: tensors.shapes(name, shape) for name, shape in dense.items()}
        used = {*stacks.values(), *(n for shapes in parts.values() for n in shapes)}
        for name in sorted(used ^ self._held.keys()):
            what = "lacks" if name in used else "holds"
            raise CheckpointError(f"{self.folder / GGUF_FILE} {what} {name!r}, against what config.json describes")
        for name, shapes in parts.items():
            for part, shape in shapes.items():
                self._check(part, shape, name)
        self.tensors = {}
        for name, origin in stacks.items():
            info = self._held[origin]
            shape = (*info.shape[:-1], info.shape[-1] * info.dtype.itemsize)
            self.tensors[name] = replace(info, dtype=torch.uint8, shape=shape)
        for name, shape in dense.items():
            self.tensors[name] = TensorInfo(GGUF_FILE, torch.float32, shape, 0, 4 * math.prod(shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as the file holds them."""
        return sum(info.nbytes for info in self._held.values())

    def get(self, name: str) -> Tensor:
        """Experts' blocks mapped from the file; anything else in float32."""
        if name in self._stacks:
            return self._stored(self._stacks[name]).view(torch.uint8)
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}")
        shape = self.tensors[name].shape
        parts = {}
        for part in self._layout.shapes(name, shape):
            blocks = self._stored(part).view(torch.uint8)
            parts[part] = dequantize(blocks, find_type(self.block_types[part]))
        return self._layout.join(name, parts, shape)

    def slice(self, name: str) -> Any:
        """Lazy handle on a tensor."""
        return Lazy(self, name)

    def _stored(self, name: str) -> Tensor:
        file = self._file(self._held[name].file)
        return file.get_tensor(name)  # type: ignore[no-any-return]

    def _check(self, part: str, shape: tuple[int, ...], name: str) -> None:
        info, kind = self._held[part], find_type(self.block_types[part])
        expected = shape if info.dtype != torch.uint8 else (*shape[:-1], kind.row_bytes(shape[-1]))
        if info.shape != tuple(expected):
            raise CheckpointError(f"{self.folder / GGUF_FILE}: {part!r} is not {list(shape)}, which {name!r} is")


def present(model: MoEModel, source: Checkpoint) -> Seen:
    """The folder as the native format would hold it.

    Args:
        model: its skeleton, with fused experts.
        source: the folder.

    Returns:
        The folder presented anew, decoder layer → description for `MoEBlock.restructure`, and no matrices beside the
        experts: those are decoded when they are read.

    Raises CheckpointError when file and config don't belong together.
    """
    config = model.module.config.to_dict()
    tensors = Tensors(find_architecture(config), config)
    stacks: dict[str, str] = {}
    descriptions = {}
    inside: tuple[str, ...] = ()
    for index in model.moe_layers:
        block = model.block(index)
        experts = f"{model.stack}.{index}.{block.path}"
        inside = (*inside, experts + ".")
        encodings, projections = {}, {}
        for projection, leaf in PROJECTIONS.items():
            name = f"blk.{index}.{leaf}.weight"
            if name not in source.tensors:
                raise CheckpointError(f"{source.folder / GGUF_FILE} lacks {name!r}")
            kind = find_type(source.block_types[name])
            encoding = f"gguf_{kind.name}"
            one = getattr(block.experts.expert(0), projection)
            shape = (block.num_experts, *one.shape[:-1], kind.row_bytes(one.shape[-1]))
            if source.tensors[name].nbytes != math.prod(shape):
                raise CheckpointError(f"{source.folder / GGUF_FILE}: {name!r} doesn't hold {block.num_experts} experts")
            encodings[encoding] = {"bits": 0, "blocks": kind.name}
            rows, columns = int(one.shape[0]), int(one.shape[1])
            projections[projection] = {
                "out_features": rows,
                "in_features": columns,
                "experts": [encoding] * block.num_experts,
            }
            stacks[f"{experts}.{projection}_proj.{encoding}.blocks"] = name
        descriptions[index] = {
            "kind": "packed",
            "num_experts": block.num_experts,
            "experts": block.path,
            "layout": {"encodings": encodings, "projections": projections, "biases": {}},
        }
    tied = set(getattr(model.module, "all_tied_weights_keys", None) or {})
    dense = {
        name: tuple(tensor.shape)
        for name, tensor in model.module.state_dict().items()
        if not name.startswith(inside) and not (name in tied and "output.weight" not in source.tensors)
    }
    return GGUFCheckpoint(source.folder, tensors, dense, stacks), descriptions, {}
