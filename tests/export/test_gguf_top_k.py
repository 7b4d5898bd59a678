"""A smaller top-k for llama.cpp: a number in the file's metadata, where that is what the rule computes."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from ggufs import EXACT, checkpoint, recipe
from places import DEMO
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress.errors import MoeCompressError

IDS = torch.randint(3, 4000, (2, 24), generator=torch.Generator().manual_seed(0))


def skipping(model: Path, output: Path, **options: object) -> dict:
    """A recipe in F32 throughout, three experts per token unless told otherwise."""
    values = recipe(model, output, EXACT, DEMO / "calibration.jsonl")
    values["passes"].insert(0, {"skip.top_k": {"experts_per_token": 3, "layers": "uniform", **options}})
    return values


@pytest.mark.parametrize(
    ("family", "architecture", "normalised"),
    [
        ("qwen3_moe", "qwen3moe", True),
        ("mixtral", "llama", True),
        ("qwen2_moe", "qwen2moe", False),
        ("olmoe", "olmoe", False),
        ("deepseek_v2", "deepseek2", False),
    ],
)
@torch.no_grad()
def test_the_file_says_the_smaller_number(family, architecture, normalised, tmp_path):
    """Read by the `gguf` package; the logits are those of transformers on the source with that number."""
    model = checkpoint(tmp_path / "model", family, num_experts_per_tok=4)
    report = moe_compress.run(skipping(model, tmp_path / "out", renormalize=normalised)).report
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields[f"{architecture}.expert_used_count"].contents() == 3
    assert fields[f"{architecture}.expert_count"].contents() == 8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 3
    assert report["verification"]["distance"] < 1e-4
    fewer = AutoModelForCausalLM.from_pretrained(model, num_experts_per_tok=3, dtype=torch.float32).eval()
    written = moe_compress.load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(written(IDS).logits, fewer(IDS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("qwen3_moe", {"skip.top_k": {"experts_per_token": 2.5}}, "has one number of experts per token for all layers"),
        ("qwen3_moe", {"skip.ratio": {"experts_per_token": 2.5}}, "'llama.cpp' runs no rules that skip experts"),
        (
            "qwen3_moe",
            {"skip.top_k": {"experts_per_token": 3, "layers": "uniform", "renormalize": False}},
            "this family normalises .* 'llama.cpp' runs what the family does: set `renormalize: true`",
        ),
        (
            "deepseek_v2",
            {"skip.top_k": {"experts_per_token": 3, "layers": "uniform"}},
            "this family doesn't normalise .* set `renormalize: false`",
        ),
        (
            "deepseek_v3",
            {"skip.top_k": {"experts_per_token": 3, "layers": "uniform"}},
            "chooses experts by .*correction_bias as well",
        ),
    ],
)
def test_what_a_number_can_not_say_is_refused(family, step, message, tmp_path):
    model = checkpoint(tmp_path / "model", family, num_experts_per_tok=4)
    values = recipe(model, tmp_path / "out", EXACT, DEMO / "calibration.jsonl")
    values["passes"].insert(0, step)
    with pytest.raises(MoeCompressError, match=message):
        moe_compress.run(values)


def test_other_normalisation_than_llama_cpps_is_refused(tmp_path):
    """OLMoE may normalise, and llama.cpp's never does."""
    model = checkpoint(tmp_path / "model", "olmoe", num_experts_per_tok=4, norm_topk_prob=True)
    with pytest.raises(MoeCompressError, match=r"norm_topk_prob is True, llama\.cpp takes False for granted"):
        moe_compress.run(skipping(model, tmp_path / "out"))
