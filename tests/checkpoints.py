"""A small checkpoint with a tokenizer, recipes for it, and calibration text: what end-to-end tests run on.

Promise: three layers of eight experts, 260 kB of tensors, bfloat16, in two shards; a run on it takes about a second.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from places import DEMO
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS = 3, 8


def small_checkpoint(folder: Path, **changes: Any) -> Path:
    """Write the checkpoint. `changes`: of its config."""
    settings = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, initializer_range=0.2)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "moe-demo" / name, folder / name)
    return folder


def texts(folder: Path) -> Path:
    """Calibration text, and a held-out one beside it."""
    folder.mkdir()
    lines = (DEMO / "calibration.jsonl").read_text().splitlines()
    (folder / "calibration.jsonl").write_text("\n".join(lines[:12]) + "\n")
    (folder / "held-out.txt").write_text("\n".join(json.loads(line)["text"][:200] for line in lines[20:24]))
    return folder


PRUNE = {"prune.experts": {"experts": 6, "criterion": "reap"}}
MERGE = {"merge.average": {"experts": 6}}
RTN = {"quantize.mixed": {"bits": 5.0, "method": "rtn", "allocation": "uniform", "group_size": 32, "widths": [2, 4]}}
GPTQ = {"quantize.mixed": {"bits": 3.5, "method": "gptq", "group_size": 32, "widths": [2, 3, 4]}}


def recipe(model: Path, output: Path, passes: list[Any], text: Path | None = None, **more: Any) -> dict[str, Any]:
    """A recipe as a dict; with calibration and scoring if `text` is the folder that `texts` made."""
    values: dict[str, Any] = {"model": str(model), "output": str(output), "passes": passes}
    if text is not None:
        values["calibration"] = {"sources": [str(text / "calibration.jsonl")], "sequences": 4, "length": 32}
        values["calibration"]["batch_size"] = 2
        values["evaluate"] = {"text": [str(text / "held-out.txt")], "length": 32, "max_tokens": 128}
    return {**values, **more}


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
