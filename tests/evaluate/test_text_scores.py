"""Perplexity, divergence and agreement of the streamed demo model, against plain float64 loops over transformers."""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compress.errors import DataError, RunError
from moe_compress.evaluate import text
from moe_compress.evaluate.text import WindowBatch, find_files, load_text, score_batches, score_text
from moe_compress.model import MoEModel
from moe_compress.progress import Progress
from moe_compress.recipe import Evaluation

LENGTH = 128


@pytest.fixture(scope="module")
def noisy(demo_model, tmp_path_factory):
    """The demo checkpoint with noise on its weights."""
    folder = tmp_path_factory.mktemp("noisy") / "model"
    shutil.copytree(demo_model, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        scale = 0.1 * tensor.float().std() if tensor.numel() > 1 else 0
        tensors[name] = (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def batches(demo):
    """A few windows each of two files, the last of a file shorter."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "moe-demo")
    files = [str(demo / "text" / f"text_{kind}.jsonl") for kind in ("novels", "python")]
    return load_text(tokenizer, Evaluation(text=files, length=LENGTH, max_tokens=8 * LENGTH + 50, batch_size=8))


@torch.no_grad()
def by_hand(folder, original, batches):
    """File → (perplexity, original's, mean KL(original ‖ this), share of equal argmax), window by window in float64."""
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, original)]
    sums = {}
    for batch in batches:
        total = sums.setdefault(batch.name, [0, 0.0, 0.0, 0.0, 0])
        for ids, first in zip(batch.ids, batch.first, strict=True):
            log_p, log_q = (model(input_ids=ids[None]).logits[0].double().log_softmax(-1) for model in models)
            for position in range(first, len(ids)):
                p, q = log_p[position - 1], log_q[position - 1]
                total[0] += 1
                total[1] -= p[ids[position]].item()
                total[2] -= q[ids[position]].item()
                total[3] += (q.exp() * (q - p)).sum().item()
                total[4] += int(p.argmax() == q.argmax())
    return {
        name: (math.exp(nll / n), math.exp(before / n), kl / n, agreed / n)
        for name, (n, nll, before, kl, agreed) in sums.items()
    }


def measured(folder, original, batches, hold=None):
    scores = score_text(MoEModel.open(folder), batches, MoEModel.open(original), hold, Progress())
    after, before, drift = scores.summary("after"), scores.summary("before"), scores.drift()
    return {
        name: (after["perplexity"][name], before["perplexity"][name], drift["kl"][name], drift["agreement"][name])
        for name in after["perplexity"]
    }


def test_windows_cover_the_text(demo, batches):
    """Documents joined by EOS and cut every LENGTH tokens; of each window all but the first token is predicted."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "moe-demo")
    for name in ("text_novels", "text_python"):
        ids = []
        with (demo / "text" / f"{name}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                ids += [tokenizer.eos_token_id] * bool(ids) + tokenizer(json.loads(line)["text"])["input_ids"]
        windows = [row for batch in batches if batch.name == name for row in batch.ids.tolist()]
        assert [token for row in windows for token in row] == ids[: 8 * LENGTH + 50]
        assert [len(row) for row in windows] == [LENGTH] * 8 + [50]
    assert all(first == 1 for batch in batches for first in batch.first)


def test_scores_equal_a_plain_loop(noisy, demo_model, batches, tmp_path, monkeypatch):
    """In memory, held on disk, in pieces of any size."""
    wanted = by_hand(noisy, demo_model, batches)
    assert set(wanted) == {"text_novels", "text_python"}
    assert all(kl > 1e-3 and 0.5 < agreed < 1 for _, _, kl, agreed in wanted.values())
    found = measured(noisy, demo_model, batches)
    for name, values in wanted.items():
        assert found[name][:3] == pytest.approx(values[:3], rel=1e-4)
        assert found[name][3] == pytest.approx(values[3], abs=2e-3)  # a tie of two tokens may fall either way
    assert measured(noisy, demo_model, batches, tmp_path) == found
    assert len(list(tmp_path.rglob("*.bin"))) > 0
    monkeypatch.setattr(text, "_POSITIONS", 7)
    for name, values in measured(noisy, demo_model, batches).items():
        assert values == pytest.approx(found[name], rel=1e-6)


def test_only_what_counts_is_counted(noisy, demo_model, batches):
    """Windows that begin with context: nothing before `first` is predicted."""
    ids = batches[0].ids[:3]
    overlapping = [WindowBatch("a", ids[:2], [1, 100]), WindowBatch("a", ids[2:], [LENGTH - 1])]
    wanted = by_hand(noisy, demo_model, overlapping)
    assert measured(noisy, demo_model, overlapping)["a"] == pytest.approx(wanted["a"], rel=1e-4)
    scores = score_text(MoEModel.open(noisy), overlapping, None, None, Progress())
    assert scores.after["a"].tokens == (LENGTH - 1) + (LENGTH - 100) + 1
    assert scores.before == {}
    assert scores.drift() == {}
    assert scores.summary("after")["perplexity"]["a"] == pytest.approx(wanted["a"][0], rel=1e-4)


def test_a_model_and_itself(demo_model, batches):
    for perplexity, before, kl, agreed in measured(demo_model, demo_model, batches[:1]).values():
        assert perplexity == before
        assert kl == 0
        assert agreed == 1


def test_a_model_in_memory(demo_model, noisy, batches):
    wrapped = MoEModel.wrap(AutoModelForCausalLM.from_pretrained(noisy, dtype=torch.float32).eval())
    scores = score_text(wrapped, batches[:1], MoEModel.open(demo_model), None, Progress())
    opened = score_text(MoEModel.open(noisy), batches[:1], MoEModel.open(demo_model), None, Progress())
    for name, score in opened.after.items():
        assert asdict(scores.after[name]) == pytest.approx(asdict(score), rel=1e-5)


def test_logits_by_hand():
    """Two tokens of a vocabulary of two, with the numbers worked out."""
    logits = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]]))
    original = torch.log(torch.tensor([[[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]]))
    batch = WindowBatch("x", torch.tensor([[0, 1, 0]]), [1])
    scores = score_batches([batch], iter([(0, logits)]), iter([(0, original)]))
    assert scores.after["x"].tokens == 2
    assert scores.after["x"].nll == pytest.approx(-math.log(0.75) - math.log(0.5))
    assert scores.before["x"].nll == pytest.approx(-math.log(0.5) - math.log(0.2))
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    assert scores.after["x"].kl == pytest.approx(first + second)
    assert scores.after["x"].perplexity == pytest.approx((0.75 * 0.5) ** -0.5)


def test_damaged_weights():
    batch = WindowBatch("x", torch.tensor([[0, 1]]), [1])
    with pytest.raises(RunError, match="predictions on x are not numbers"):
        score_batches([batch], iter([(0, torch.full((1, 2, 2), math.nan))]))


def test_files(demo, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo / "moe-demo")
    found = find_files([str(demo / "text" / "text_s*.jsonl"), str(demo / "text" / "text_novels.jsonl")])
    assert [file.stem for file in found] == ["text_scripture", "text_spanish", "text_novels"]
    assert [file.stem for file in find_files([str(demo / "text")])] == sorted(p.stem for p in (demo / "text").iterdir())
    (tmp_path / ".hidden.txt").write_text("not meant")
    with pytest.raises(DataError, match=r"the folder has no \.jsonl"):
        find_files([str(tmp_path)])
    for pattern in ("missing.txt", "missing*.txt"):
        with pytest.raises(DataError, match=r"no text file at .*missing"):
            find_files([str(tmp_path / pattern)])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("Some text to be scored.")
    with pytest.raises(DataError, match="same name in the report"):
        load_text(tokenizer, Evaluation(text=[str(tmp_path / d / "same.txt") for d in "ab"], length=16))
