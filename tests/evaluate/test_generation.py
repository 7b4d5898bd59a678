"""Greedy continuations: against argmax token by token, counted by hand; in reports of runs and of models in memory."""

import math

import pytest
import torch
from checkpoints import recipe, small_checkpoint, texts
from families import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.errors import DataError, InputError, RecipeError
from moe_compress.evaluate.generation import Continuations, choose_prompts, common_prefix, continued, repetition
from moe_compress.evaluate.text import WindowBatch
from moe_compress.progress import Monitor
from moe_compress.recipe import Generation, make_recipe

QUIET = Monitor(show=False)


def test_repetition_counts_ngrams_that_were_there_before():
    assert repetition([1, 2, 3, 4, 5], 2) == 0
    assert repetition([1, 2, 1, 2, 1, 2], 2) == pytest.approx(3 / 5)  # 12 21 12 21 12: three seen before
    assert repetition([7] * 10, 4) == pytest.approx(6 / 7)
    assert repetition([7] * 10, 1) == pytest.approx(9 / 10)
    assert repetition([1, 2, 3], 4) == 0
    assert [common_prefix(a, b) for a, b in (([1, 2], [1, 3]), ([1, 2], [1, 2, 3]), ([], [1]), ([2], [1]))] == [
        1,
        2,
        0,
        0,
    ]
    one, two = Continuations([[7] * 10, [1, 2, 3, 4]]), Continuations([[7] * 4, [1, 9]])
    assert one.summary(4) == {"repetition": pytest.approx(3 / 7), "looping": 0.5, "tokens": 7}
    assert one.summary(4, two)["as_original"] == pytest.approx((4 + 1) / 2)


def test_prompts_are_spread_over_the_texts():
    ids = torch.arange(120).view(12, 10)
    batches = [
        WindowBatch("a", ids[:8], [1] * 8),
        WindowBatch("b", ids[8:], [1] * 4),
        WindowBatch("c", ids[:1, :3], [1]),
    ]
    found = choose_prompts(batches, Generation(prompts=4, prompt=5))
    assert torch.equal(found, ids[[0, 3, 6, 9], :5])
    with pytest.raises(DataError, match="13 prompts of 5 tokens, and the texts have 12 windows"):
        choose_prompts(batches, Generation(prompts=13, prompt=5))


@torch.no_grad()
def test_continuations_are_greedy_and_end_where_the_model_ends():
    model = tiny_model("qwen3_moe")
    prompts = torch.randint(3, model.config.vocab_size, (9, 6), generator=torch.Generator().manual_seed(0))
    wanted = Generation(tokens=12)
    model.generation_config.repetition_penalty = 1.7  # not heeded: repetition is what is measured
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    before = model.generation_config
    free = continued(model, prompts, wanted)
    assert model.generation_config is before
    for prompt, tokens in zip(prompts, free.tokens, strict=True):
        ids = prompt[None]
        for token in tokens:
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert len(tokens) == 12
    end = free.tokens[0][5]
    model.generation_config.eos_token_id = [end]
    for tokens, stopped in zip(free.tokens, continued(model, prompts, wanted).tokens, strict=True):
        assert stopped == (tokens[: tokens.index(end)] if end in tokens else tokens)


def test_the_command_line_says_it_too(tmp_path, commands):
    model, text = small_checkpoint(tmp_path / "model"), texts(tmp_path / "text") / "held-out.txt"
    said = commands("evaluate", model, "--text", text, "--length", 64, "--max-tokens", 256, "--generation", 2)
    assert said.code == 2
    assert "evaluate.generation is 160, and the model reads at most 128 tokens" in said.line  # 32 + 128
    said = commands("evaluate", model, "--generation", 2)
    assert "--generation: generation takes its prompts from `text`" in said.line


def test_reports_hold_it_from_disk_and_in_memory(tmp_path):
    model, text = small_checkpoint(tmp_path / "model"), texts(tmp_path / "text")
    passes = [{"prune.experts": {"experts": 5, "refit": False}}]
    values = recipe(model, tmp_path / "out", passes, text)
    values["evaluate"] |= {"generation": {"prompts": 3, "prompt": 8, "tokens": 10, "ngram": 2}}
    report = moe_compress.run(values, monitor=QUIET).report
    words = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    calibration = values["calibration"]
    same = moe_compress.compress(
        loaded, tokenizer=words, passes=passes, calibration=calibration, evaluate=values["evaluate"], monitor=QUIET
    )
    assert same.report["before"]["generation"] == report["before"]["generation"]
    assert same.report["after"]["generation"] == report["after"]["generation"]
    before, after = (report[which]["generation"] for which in ("before", "after"))
    assert set(before) == {"repetition", "looping", "tokens"}
    assert set(after) == {*before, "as_original"}
    assert all(math.isfinite(v) for v in after.values())
    assert 0 <= after["as_original"] < 10
    assert "greedy text: repeated n-grams" in (tmp_path / "out" / "report.md").read_text()
    assert "greedy text: repeated n-grams" in str(same)

    values |= {"output": str(tmp_path / "other"), "compute": {"memory": "10 kB"}}
    with pytest.raises(InputError, match=r"evaluate.generation loads the model, which takes .*10 kB"):
        moe_compress.run(values, monitor=QUIET)
    values["evaluate"] |= {"text": []}
    with pytest.raises(RecipeError, match="generation takes its prompts from `text`"):
        make_recipe(values)
