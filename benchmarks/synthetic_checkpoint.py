"""Write a checkpoint with a real model's shapes and random weights, any number of layers, streaming.

    python benchmarks/synthetic_checkpoint.py OUT [--layers 8] [--experts 128] [--vocabulary 151936]

The shapes are Qwen3-30B-A3B's: hidden 2048, 128 experts of 768 neurons, top-8, 32 heads with 4 key-value heads. The
tokenizer is the demo's (its ids are valid in any larger vocabulary). One layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from moe_compress.checkpoint.reader import sidecar_files
from moe_compress.checkpoint.writer import CheckpointWriter

DEMO = Path(__file__).resolve().parent.parent / "demo" / "moe-demo"
HIDDEN, NEURONS, HEADS, KEY_VALUE_HEADS, HEAD = 2048, 768, 32, 4, 128


def random(generator: torch.Generator, *shape: int, std: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)


def layer(generator: torch.Generator, index: int, experts: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{index}."
    tensors = {
        f"{prefix}input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{prefix}self_attn.q_proj.weight": random(generator, HEADS * HEAD, HIDDEN),
        f"{prefix}self_attn.k_proj.weight": random(generator, KEY_VALUE_HEADS * HEAD, HIDDEN),
        f"{prefix}self_attn.v_proj.weight": random(generator, KEY_VALUE_HEADS * HEAD, HIDDEN),
        f"{prefix}self_attn.o_proj.weight": random(generator, HIDDEN, HEADS * HEAD),
        f"{prefix}self_attn.q_norm.weight": torch.ones(HEAD, dtype=torch.bfloat16),
        f"{prefix}self_attn.k_norm.weight": torch.ones(HEAD, dtype=torch.bfloat16),
        f"{prefix}mlp.gate.weight": random(generator, experts, HIDDEN),
    }
    # One draw per projection, not per expert: as fast as the generator.
    for name, shape in (("gate", (NEURONS, HIDDEN)), ("up", (NEURONS, HIDDEN)), ("down", (HIDDEN, NEURONS))):
        stacked = random(generator, experts, *shape)
        tensors |= {f"{prefix}mlp.experts.{e}.{name}_proj.weight": w for e, w in enumerate(stacked)}
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    arguments = parser.parse_args()
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    config = {
        **json.loads((DEMO / "config.json").read_text()),
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": NEURONS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD,
        "num_experts": arguments.experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": arguments.layers,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
        "vocab_size": arguments.vocabulary,
    }
    writer = CheckpointWriter(arguments.output)
    outer = {
        "model.embed_tokens.weight": random(generator, arguments.vocabulary, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": random(generator, arguments.vocabulary, HIDDEN),
    }
    writer.add(outer)
    for index in range(arguments.layers):
        writer.add(layer(generator, index, arguments.experts))
        print(f"layer {index}: {time.perf_counter() - start:.0f} s", flush=True)
    writer.finish(config, sidecar_files(DEMO), {})
    size = sum(entry["bytes"] for entry in writer.tensors.values())
    print(f"{arguments.output}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
