"""What lies above the view of a model and is called by it all the same: by name, because it imports no method."""

from __future__ import annotations

import importlib
from typing import Any

from moe_compress.constants import COMPRESSED_TENSORS, GGUF, GPTQ

# How a block's experts are rebuilt from a saved state: kind → function, called with block and description, giving an
# experts module on meta.
EXPERTS_KINDS: dict[str, str] = {
    "packed": "moe_compress.quant.packed:build_packed",
    "scaled": "moe_compress.quant.scaled:build_scaled",
    "ragged": "moe_compress.prune.ragged:build_ragged",
    "factored": "moe_compress.merge.factored:build_factored",
}
# What makes a packed module of a dense one beside the experts, and what makes a head of packed embeddings.
PACKED_MATRIX = "moe_compress.quant.packed_linear:build"
PACKED_HEAD = "moe_compress.quant.packed_linear:tie"

# What presents a folder in another quantized format as a dense one.
DECODER = "moe_compress.quant.sources:decode"
# Formats of others that are read as if they were native: quant_method → function, called with a model and its folder,
# giving the folder presented anew, the description of each layer, and of matrices beside the experts.
PRESENTED: dict[str, str] = {
    COMPRESSED_TENSORS: "moe_compress.export.compressed_reader:present",
    GPTQ: "moe_compress.export.gptq_reader:present",
    GGUF: "moe_compress.export.gguf_reader:present",
}


def function_at(where: str) -> Any:
    """The function that "module:function" names."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
