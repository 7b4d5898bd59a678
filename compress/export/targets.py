"""What runtimes load, as data: constraints for passes that decide, rules for the exporter that checks.

docs/targets.md says the same for users, with where each constraint is from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_compress.constants import COMPRESSED_TENSORS, GGUF, GPTQ
from moe_compress.errors import RecipeError, named
from moe_compress.model.beside import KINDS
from moe_compress.quant.grid import WIDTHS

from . import gptq_format
from .compressed_tensors import SHAPE_BYTES
from .schemes import SCALED


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
        matrix_bytes: what the format stores with each packed matrix beside codes and scales, whatever its size.
        schemes: of `quantize.scheme`, those that it has kernels for.
        hidden_multiple: what the hidden size of experts must be a multiple of where they are packed.
        packs: kinds of matrices beside the experts (compress/model/beside.py) that it loads packed.
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
    schemes: tuple[str, ...] = ()
    hidden_multiple: int = 1
    packs: tuple[str, ...] = ()

    def beside(self, bits: float, group_size: int, rows: int, columns: int) -> int:
        """Bytes that the file has for a packed matrix beside codes and scales."""
        if self.quantized_format == GPTQ:
            return gptq_format.beside(int(bits), group_size, rows, columns)
        return self.matrix_bytes

    def beside_layer(self, layout: Mapping[str, Any]) -> int:
        """The same of all matrices of a layer, from what its experts' `describe` says; 0 where they aren't packed."""
        total = 0
        for entry in layout["projections"].values() if "encodings" in layout else ():
            for name in entry["experts"]:
                encoding = layout["encodings"][name]
                shape = entry["out_features"], entry["in_features"]
                total += self.beside(encoding["bits"], encoding.get("group_size", -1), *shape)
        return total

    def check_scheme(self, step: str, scheme: str) -> None:
        """Raise RecipeError when it has no kernel for a scheme of `quantize.scheme`; `step` names the pass."""
        if scheme in self.schemes:
            return
        has = f"it loads {', '.join(self.schemes)}" if self.schemes else "it loads none such"
        others = [t.name for t in TARGETS.values() if scheme in t.schemes]
        raise RecipeError(
            f"{step}: the target {self.name!r} has no kernel for {scheme} experts ({has}); {_list(others)} have"
        )

    def check_grid(
        self, step: str, widths: Sequence[float], group_size: int, symmetric: bool, option: str = "widths"
    ) -> None:
        """Raise RecipeError when it doesn't load such quantized weights.

        Args:
            step: name of the pass, for messages.
            widths: bits that experts may get.
            group_size: weights that share a scale, -1 for a whole row.
            symmetric: no zero points.
            option: what the widths were given as.
        """
        who = f"{step}: the target {self.name!r}"
        if self.quantized_format is None:
            raise RecipeError(f"{who} loads no quantized experts, widths are {list(widths)}")
        if self.quantized_format == GGUF:
            raise RecipeError(f"{who} loads blocks of GGUF types, not integers in groups: take quantize.gguf")
        if foreign := sorted(set(widths) - set(self.bits)):
            raise RecipeError(f"{who} loads {_list(self.bits)} bits, not {_list(foreign)}: set `{option}`")
        if self.group_sizes is not None and group_size not in self.group_sizes:
            row = ", not whole rows" if group_size == -1 else f", not {group_size}"
            raise RecipeError(f"{who} loads groups of {_list(self.group_sizes)} weights{row}: set `group_size`")
        if not symmetric and not self.asymmetric:
            raise RecipeError(f"{who} loads no zero points for experts: set `symmetric: true`")


def _list(numbers: Sequence[object]) -> str:
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
    "packs": ("attention", "shared_experts", "dense_mlp"),
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
            bits=WIDTHS,
            schemes=SCALED,
            packs=KINDS,
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
            "vLLM 0.33: compressed-tensors, one width of 2 to 8 bits per layer (older vLLM: 4 or 8), FP8, W8A8, W4A8",
            bits=(2, 3, 4, 5, 6, 7, 8),
            schemes=SCALED,
            **_SERVED,  # type: ignore[arg-type]
        ),
        Target(
            "sglang",
            "SGLang 0.5: compressed-tensors, 4 or 8 bits per layer, or FP8 (vLLM loads it too)",
            bits=(4, 8),
            gateless=False,
            schemes=("fp8", "fp8-block"),  # integers with integer activations: on NPUs only
            **_SERVED,  # type: ignore[arg-type]
        ),
        Target(
            "gptq",
            "vLLM and SGLang: GPTQ files, 4 or 8 bits (SGLang: one width for all layers)",
            bits=gptq_format.WIDTHS,
            gateless=False,
            hidden_multiple=128,  # else vLLM falls back to a kernel that looks at no rule of `dynamic`
            **{**_SERVED, "quantized_format": GPTQ, "matrix_bytes": 0, "packs": ()},  # type: ignore[arg-type]
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
    return named(name, TARGETS, "target")
