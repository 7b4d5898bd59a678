"""How servers store the experts of a layer, as data: one row per scheme, and what config.json says of it.

A scheme fixes what a stored number is, how many weights share a scale, and what the server does to the activations
before it multiplies. Names and fields are those of compressed-tensors 0.18 and newer, whose preset each scheme is.

Letters: O output and K input features of a matrix, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_compress.errors import RecipeError, nearest

# Sides of a block of fp8-block, and the inputs of a row that share a scale there. Kernels exist for this size.
BLOCK = 128

PACKED, INTEGERS, FLOATS, MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"


@dataclass(frozen=True)
class _Kind:
    """What all schemes of a name have in common.

    Attributes:
        summary: one line for users.
        format: of the tensors.
        type: "int" or "float", of weights and activations.
        inputs: what shares a scale when the server quantizes activations: "token", "group" (BLOCK inputs of a token),
            or None where it doesn't.
        code: dtype of a stored number; None where they are packed in words.
    """

    summary: str
    format: str
    type: str
    inputs: str | None
    code: torch.dtype | None


_KINDS = {
    "wna16": _Kind("integers of 2 to 8 bits, packed; activations as they are", PACKED, "int", None, None),
    "fp8": _Kind(
        "e4m3, a scale per row; activations e4m3, a scale per token", FLOATS, "float", "token", torch.float8_e4m3fn
    ),
    "fp8-block": _Kind(
        "e4m3, a scale per 128×128 block; activations e4m3, a scale per 128 inputs of a token",
        FLOATS,
        "float",
        "group",
        torch.float8_e4m3fn,
    ),
    "w8a8": _Kind(
        "8-bit integers, a scale per row; activations 8 bits, a scale per token", INTEGERS, "int", "token", torch.int8
    ),
    "w4a8": _Kind(
        "4-bit integers in bytes, a scale per group; activations 8 bits, a scale per token",
        INTEGERS,
        "int",
        "token",
        torch.int8,
    ),
}

# Those that store a number per weight and quantize activations: what `quantize.scheme` makes.
SCALED = tuple(name for name, kind in _KINDS.items() if kind.inputs is not None)


@dataclass(frozen=True, order=True)
class Scheme:
    """How all experts of a layer are stored.

    Attributes:
        bits: of a weight's code.
        group_size: weights of a row that share a scale; -1 for the whole row. Of fp8-block, the block's side.
        name: of the row in the table; `wna16` is what `quantize.mixed` makes for servers.
    """

    bits: int
    group_size: int
    name: str = "wna16"

    @classmethod
    def served(cls, name: str, group_size: int | None = None) -> Scheme:
        """A scheme of `SCALED`; `group_size` is for w4a8 alone, whose preset has 128.

        Raises RecipeError for another name, and for a group size where there is nothing to choose.
        """
        if name not in SCALED:
            raise RecipeError(f"no scheme is called {name!r}{nearest(name, SCALED)}")
        if group_size is not None and name != "w4a8":
            raise RecipeError(f"{name} has no groups to choose: leave `group_size` out (w4a8 has them)")
        if name == "w4a8":
            return cls(4, 128 if group_size is None else group_size, name)
        return cls(8, BLOCK if name == "fp8-block" else -1, name)

    @property
    def kind(self) -> _Kind:
        """Its row of the table."""
        return _KINDS[self.name]

    @property
    def summary(self) -> str:
        """What it is, one line."""
        return self.kind.summary

    @property
    def format(self) -> str:
        """Of the tensors, as config.json calls it."""
        return self.kind.format

    @property
    def code(self) -> torch.dtype:
        """Dtype of a stored number. Not for packed ones."""
        assert self.kind.code is not None
        return self.kind.code

    @property
    def is_float(self) -> bool:
        """Whether codes and activations are e4m3."""
        return self.kind.type == "float"

    @property
    def inputs_share(self) -> int:
        """Inputs of a token that share a scale; -1 for all of them."""
        return BLOCK if self.kind.inputs == "group" else -1

    def block(self, in_features: int) -> tuple[int, int]:
        """Rows and columns of the weights that share a scale."""
        if self.name == "fp8-block":
            return BLOCK, BLOCK
        return 1, in_features if self.group_size == -1 else self.group_size

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Of a matrix's scales: [O, 1], [O, G], or [O / 128, K / 128]."""
        rows, columns = self.block(in_features)
        return out_features // rows, in_features // columns

    def matrix_bytes(self, out_features: int, in_features: int, scale_bytes: int) -> int:
        """Bytes of one stored matrix, scales included. Not for packed ones."""
        rows, columns = self.scale_shape(out_features, in_features)
        return out_features * in_features * self.code.itemsize + rows * columns * scale_bytes

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of that shape can't be stored so, or None."""
        rows, columns = self.block(in_features)
        if out_features % rows or in_features % columns:
            return f"blocks of {rows}×{columns} don't tile a matrix of {out_features}×{in_features}"
        if self.name == "wna16" and in_features * self.bits % 32:
            return f"{in_features} codes of {self.bits} bits aren't whole 32-bit words"
        return None

    # --- config.json -------------------------------------------------------------------------------------------

    def group(self, targets: list[str]) -> dict[str, Any]:
        """A group of `config_groups`."""
        return {
            "targets": targets,
            "format": self.format,
            "weights": self.weights(),
            "input_activations": self.inputs(),
            "output_activations": None,
        }

    def weights(self) -> dict[str, Any]:
        """`weights` of a group."""
        values: dict[str, Any] = {"num_bits": self.bits, "type": self.kind.type, "symmetric": True}
        if self.name == "fp8-block":
            values |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        elif self.group_size == -1:
            values |= {"strategy": "channel"}
        else:
            values |= {"strategy": "group", "group_size": self.group_size}
        return {**values, "dynamic": False, "actorder": None}

    def inputs(self) -> dict[str, Any] | None:
        """`input_activations` of a group."""
        if self.kind.inputs is None:
            return None
        values = {"num_bits": 8, "type": self.kind.type, "symmetric": True, "strategy": self.kind.inputs}
        return {**values, **({"group_size": BLOCK} if self.kind.inputs == "group" else {}), "dynamic": True}

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Scheme | None:
        """The scheme that a group of `config_groups` describes, or None for one that isn't in the table.

        Groups that others wrote say less or more than ours (no `actorder`, an observer): what a scheme depends on is
        compared, nothing else.
        """
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        for name in _KINDS:
            bits = int(weights.get("num_bits") or 0)
            shared = BLOCK if name == "fp8-block" else int(weights.get("group_size") or -1)
            scheme = cls(bits, shared, name)
            if name == "wna16" and (bits not in range(2, 9) or weights.get("strategy") != "group"):
                continue
            if (name == "w4a8" and bits != 4) or (name in ("fp8", "fp8-block", "w8a8") and bits != 8):
                continue
            wanted = scheme.weights()
            if any(_plain(weights, key) != wanted.get(key) for key in _WEIGHTS):
                continue
            asked = scheme.inputs()
            if (inputs is None) != (asked is None):
                continue
            if asked is not None and any(_plain(inputs or {}, key) != asked.get(key) for key in _INPUTS):
                continue
            return scheme
        return None

    def to_json(self) -> dict[str, Any]:
        """As it stands in a layout."""
        return {"name": self.name, "bits": self.bits, "group_size": self.group_size}


# What a scheme depends on, in the two parts of a group.
_WEIGHTS = ("type", "symmetric", "strategy", "block_structure", "dynamic")
_INPUTS = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
# What a key that is absent means.
_DEFAULTS = {"symmetric": True, "dynamic": False}


def _plain(values: Mapping[str, Any], key: str) -> Any:
    value = values.get(key)
    return _DEFAULTS.get(key) if value is None else value
