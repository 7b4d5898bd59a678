"""Which tensors a GGUF file has beside the experts, in which types: from names, shapes and options, before any work.

Promise: every tensor of the source has a place in the file or is listed as left out, and a type is never replaced by
another one: for every part of the model the options list types in order, and the first whose blocks divide a tensor's
rows is taken. Routers, norms, biases and everything else of one dimension are F32, as llama.cpp wants them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_compress.errors import RecipeError
from moe_compress.quant.gguf_blocks import BlockType, find_type

from .gguf_architectures import Architecture, Config, Tensors, find_architecture

# Part of the model → how its tensors are called in the file.
PARTS = {
    "embeddings": re.compile(r"token_embd\.weight"),
    "output": re.compile(r"output\.weight"),
    "attention": re.compile(r"blk\.\d+\.attn_(?!.*norm).*\.weight"),
    "shared_experts": re.compile(r"blk\.\d+\.ffn_(gate|up|down)_shexp\.weight"),
    "feed_forward": re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.weight"),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Placed:
    """A tensor of the file: shape there, and type."""

    shape: tuple[int, ...]
    type: BlockType

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class Layout:
    """Everything of a file but its experts.

    Attributes:
        architecture, tensors: what llama.cpp calls the model and its tensors.
        placed: name on disk → name in the file → what it is there.
        left_out: names on disk of what has no place in the file, and why.
        copied: name in the file → name on disk, for a head that shares the embedding's weights and is written anyway.
    """

    architecture: Architecture
    tensors: Tensors
    placed: dict[str, dict[str, Placed]]
    left_out: dict[str, str]
    copied: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all these tensors."""
        placed = [p for parts in self.placed.values() for p in parts.values()]
        return sum(p.nbytes for p in placed) + sum(self.types[name].nbytes for name in self.copied)

    @property
    def types(self) -> dict[str, Placed]:
        """Name in the file → what it is there."""
        found = {name: p for parts in self.placed.values() for name, p in parts.items()}
        return {**found, **{name: self._head(origin) for name, origin in self.copied.items()}}

    def _head(self, origin: str) -> Placed:
        (embedding,) = self.placed[origin].values()
        return embedding


def layout(config: Config, others: Mapping[str, tuple[int, ...]], types: Mapping[str, Sequence[str]]) -> Layout:
    """Lay out a file.

    Args:
        config: of the model, defaults filled in.
        others: names on disk → shapes of all tensors that are no experts.
        types: part of the model (`PARTS`) → types in order of preference.

    Raises RecipeError for an unknown architecture, a tensor without a place, or rows that no type of the list fits.
    """
    architecture = find_architecture(config)
    tensors = Tensors(architecture, config)
    placed: dict[str, dict[str, Placed]] = {}
    left_out: dict[str, str] = {}
    for name, shape in others.items():
        reason = _without_place(name, config)
        if reason:
            left_out[name] = reason
            continue
        parts = tensors.shapes(name, shape)
        placed[name] = {n: Placed(s, _type_of(n, s, types)) for n, s in parts.items()}
    copied = {"output.weight": EMBEDDING} if architecture.needs_output and HEAD not in others else {}
    return Layout(architecture, tensors, placed, left_out, copied)


def _without_place(name: str, config: Config) -> str | None:
    number = re.match(r"model\.layers\.(\d+)\.", name)
    if number and int(number[1]) >= config["num_hidden_layers"]:
        return "a draft layer behind the model's own"
    if name.endswith("rotary_emb.inv_freq"):
        return "computed anew by llama.cpp"
    return None


def _type_of(name: str, shape: tuple[int, ...], types: Mapping[str, Sequence[str]]) -> BlockType:
    part = next((p for p, pattern in PARTS.items() if pattern.fullmatch(name)), None)
    if part is None or len(shape) == 1:
        return find_type("F32")
    for wanted in types[part]:
        if find_type(wanted).fits(shape[-1]):
            return find_type(wanted)
    raise RecipeError(
        f"quantize.gguf: rows of {name} have {shape[-1]} weights, which are not whole blocks of "
        f"{' or '.join(types[part])}: add BF16 to dense.{part}"
    )
