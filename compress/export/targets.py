"""What runtimes load, as data: constraints for passes that decide, rules for the exporter that checks.

docs/targets.md says the same for users, with where each constraint is from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_compress.constants import COMPRESSED_TENSORS, GGUF
from moe_compress.errors import RecipeError, nearest
from moe_compress.quant.trits import TERNARY

from .compressed_tensors import SHAPE_BYTES

FORMATS = ("hf", "native", COMPRESSED_TENSORS, GGUF)


@dataclass(frozen=True)
class Target:
    """A runtime that the result is made for.

    Attributes:
        name, summary: how recipes call it, and what it is.
        dense_format, quantized_format: what is written for it.
        uniform_experts: the same number of experts in every layer.
        bits_per: what may have a width of its own: "matrix", "expert", "projection" of a layer, or "layer".
        bits: widths that it loads.
        group_sizes: weights that may share a scale; None for any, whole rows included.
        asymmetric: whether it loads zero points.
        biases, gateless: whether it loads quantized experts with biases, or without a gate.
        per_expert: whether quantized experts must be stored one by one, under names of the family's own.
        matrix_bytes: what the format stores with each quantized matrix beside codes and scales.
    """

    name: str
    summary: str
    dense_format: str | None
    quantized_format: str | None
    uniform_experts: bool
    bits_per: str
    bits: tuple[float, ...]
    group_sizes: tuple[int, ...] | None = None
    asymmetric: bool = True
    biases: bool = True
    gateless: bool = True
    per_expert: bool = False
    matrix_bytes: int = 0

    def check_grid(self, step: str, widths: Sequence[float], group_size: int, symmetric: bool) -> None:
        """Raise RecipeError when it doesn't load such quantized weights.

        Args:
            step: name of the pass, for messages.
            widths: bits that experts may get.
            group_size: weights that share a scale, -1 for a whole row.
            symmetric: no zero points.
        """
        who = f"{step}: the target {self.name!r}"
        if self.quantized_format is None:
            raise RecipeError(f"{who} loads no quantized experts, widths are {list(widths)}")
        if self.quantized_format == GGUF:
            raise RecipeError(f"{who} loads blocks of GGUF types, not integers in groups: take quantize.gguf")
        if foreign := sorted(set(widths) - set(self.bits)):
            raise RecipeError(f"{who} loads {_list(self.bits)} bits, not {_list(foreign)}: set `widths`")
        if self.group_sizes is not None and group_size not in self.group_sizes:
            row = ", not whole rows" if group_size == -1 else f", not {group_size}"
            raise RecipeError(f"{who} loads groups of {_list(self.group_sizes)} weights{row}: set `group_size`")
        if not symmetric and not self.asymmetric:
            raise RecipeError(f"{who} loads no zero points for experts: set `symmetric: true`")


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(map(str, numbers))


_SERVED = {
    "dense_format": "hf",
    "quantized_format": COMPRESSED_TENSORS,
    "uniform_experts": True,
    "bits_per": "layer",
    # What the Marlin kernel of both servers takes; others take more, but which kernel runs is the server's choice.
    "group_sizes": (32, 64, 128),
    "asymmetric": False,
    "biases": False,
    "per_expert": True,
    "matrix_bytes": SHAPE_BYTES,
}

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "native",
            "transformers with this package imported, or moe_compress.load: everything",
            dense_format="hf",
            quantized_format="native",
            uniform_experts=False,
            bits_per="matrix",
            bits=(1, TERNARY, 2, 3, 4, 5, 6, 8),
        ),
        Target(
            "transformers",
            "plain transformers, vLLM, SGLang and every converter: dense weights, as the source is stored",
            dense_format="hf",
            quantized_format=None,
            uniform_experts=True,
            bits_per="layer",
            bits=(),
        ),
        Target(
            "vllm",
            "vLLM 0.33: compressed-tensors, one width of 2 to 8 bits per layer (older vLLM: 4 or 8)",
            bits=(2, 3, 4, 5, 6, 7, 8),
            **_SERVED,  # type: ignore[arg-type]
        ),
        Target(
            "sglang",
            "SGLang 0.5: compressed-tensors, 4 or 8 bits per layer (vLLM loads it too)",
            bits=(4, 8),
            gateless=False,
            **_SERVED,  # type: ignore[arg-type]
        ),
        Target(
            "llama.cpp",
            "llama.cpp and what is built on it: one .gguf, a block type per layer and projection (quantize.gguf)",
            dense_format=None,
            quantized_format=GGUF,
            uniform_experts=True,
            bits_per="projection",
            bits=(),
            biases=False,
            gateless=False,
        ),
    )
}


def find_target(name: str) -> Target:
    """The target of that name. Raises RecipeError with the nearest there is."""
    if name not in TARGETS:
        raise RecipeError(f"no target is called {name!r}{nearest(name, TARGETS)}")
    return TARGETS[name]
