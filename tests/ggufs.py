"""Small random checkpoints of the families that GGUF files are written for, with the demo's tokenizer.

Promise: two or three layers of eight experts, rows of 64 (of 256 where asked), random biases and correction biases, and
weights large enough for rope, routing and every projection to matter.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from places import DEMO

CORE = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MLA = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
# Name → (stem of the classes, settings).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 8, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "norm_topk_prob": False},
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": 8, "intermediate_size": 64, "norm_topk_prob": False, "num_key_value_heads": 4},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "intermediate_size": 64, "sliding_window": None}),
    "deepseek_v2": (
        "DeepseekV2",
        {**MLA, "q_lora_rank": 32, "topk_method": "greedy", "routed_scaling_factor": 1.5, "norm_topk_prob": False},
    ),
    "deepseek_v3": ("DeepseekV3", {**MLA, "q_lora_rank": 32, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}),
}


def checkpoint(folder: Path, family: str, **changes: Any) -> Path:
    """Write a checkpoint. `changes`: of its config."""
    stem, settings = FAMILIES[family]
    config = getattr(transformers, f"{stem}Config")(**{**CORE, **settings, **changes, "initializer_range": 0.15})
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith((".bias", "e_score_correction_bias")):
                tensor.normal_(std=0.2)
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "moe-demo" / name, folder / name)
    return folder


def recipe(model: Path, output: Path, options: dict[str, Any], text: Path | None = None) -> dict[str, Any]:
    """A recipe that quantizes for llama.cpp; with calibration if `text` is given."""
    values: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "target": "llama.cpp",
        "passes": [{"quantize.gguf": options}],
    }
    if text is not None:
        values["calibration"] = {"sources": [str(text)], "sequences": 4, "length": 32, "batch_size": 2}
    return values


EVERYTHING_F32 = dict.fromkeys(("embeddings", "output", "attention", "shared_experts", "feed_forward"), "F32")
EXACT = {"bits": 32, "types": ["F32"], "importance": False, "dense": EVERYTHING_F32}
