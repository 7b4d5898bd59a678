"""What runtimes load, as data: constraints for passes that decide, rules for the exporter that checks."""

from __future__ import annotations

from dataclasses import dataclass

from moe_compress.errors import RecipeError, nearest


@dataclass(frozen=True)
class Target:
    """A runtime that the result is made for.

    Attributes:
        name, summary: how recipes call it, and what it is.
        dense_format, quantized_format: what is written for it.
        uniform_experts: the same number of experts in every layer.
        bits_per: "expert" where every expert may have its own width, "layer" where a layer shares one.
        bits: widths that it loads.
    """

    name: str
    summary: str
    dense_format: str
    quantized_format: str | None
    uniform_experts: bool
    bits_per: str
    bits: tuple[int, ...]


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "native",
            "transformers with this package imported, or moe_compress.load: everything",
            dense_format="hf",
            quantized_format="native",
            uniform_experts=False,
            bits_per="expert",
            bits=(1, 2, 3, 4, 8),
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
            "vLLM: one width per layer",
            dense_format="hf",
            quantized_format="native",
            uniform_experts=True,
            bits_per="layer",
            bits=(2, 3, 4, 8),
        ),
    )
}


def find_target(name: str) -> Target:
    """The target of that name. Raises RecipeError with the nearest there is."""
    if name not in TARGETS:
        raise RecipeError(f"no target is called {name!r}{nearest(name, TARGETS)}")
    return TARGETS[name]
