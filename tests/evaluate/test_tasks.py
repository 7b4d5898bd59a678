"""lm-eval's scores of the demo model, in memory and streamed, against plain loops over transformers' own forward."""

import json
import logging
import math
import random
import shutil

import accelerate
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from scoring import Counting, items_of, score, task_file
from transformers import AutoModelForCausalLM

from moe_compress.errors import InputError, RunError
from moe_compress.evaluate import harness, likelihood, tasks
from moe_compress.evaluate.tasks import check_tasks
from moe_compress.export.loader import load
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel
from moe_compress.progress import Progress
from moe_compress.quant.grid import Grid
from moe_compress.quant.packed import pack_experts
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.stack import Stack

KINDS = ["arithmetic", *(f"continuation_{k}" for k in ("novels", "scripture", "spanish", "wordnet", "python"))]


@torch.no_grad()
def by_hand(model, tokenizer, context, choice):
    """Σ log p of the choice's tokens: one forward, nothing padded. Spaces at the context's end go with the choice."""
    head = context.rstrip()
    begin = len(tokenizer(head)["input_ids"])
    ids = tokenizer(context + choice)["input_ids"]
    log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(begin, len(ids)))


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_scores_equal_a_plain_loop(count, demo, demo_model, loaded, streamed, tokenizer, monkeypatch, tmp_path, capfd):
    """Every likelihood, every task's accuracies and the group's, of both ways; quietly, from any folder, repeatably."""
    plain = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    wanted, sums = {}, []
    for kind in KINDS:
        right = {"acc": 0, "acc_norm": 0}
        for item in items_of(demo, kind, count):
            values = [by_hand(plain, tokenizer, item["context"], choice) for choice in item["choices"]]
            sums += values
            lengths = [len(choice.encode()) for choice in item["choices"]]
            right["acc"] += np.argmax(values) == item["label"]
            right["acc_norm"] += np.argmax(np.array(values) / lengths) == item["label"]
        wanted[f"demo_{kind}"] = {metric: number / count for metric, number in right.items()}
    wanted["demo"] = {m: np.mean([wanted[f"demo_{kind}"][m] for kind in KINDS]) for m in ("acc", "acc_norm")}

    seen = {}

    def recording(*arguments, **keywords):
        lm = harness.language_model(*arguments, **keywords)
        inner = lm.loglikelihood

        def record(requests, *rest, **more):
            seen[type(lm).__name__] = inner(requests, *rest, **more)
            return seen[type(lm).__name__]

        lm.loglikelihood = record
        return lm

    monkeypatch.setattr(tasks, "language_model", recording)
    monkeypatch.chdir(tmp_path)
    state, level = random.getstate(), logging.getLogger("lm_eval").level
    noise = torch.get_rng_state(), np.random.get_state()[1].copy()
    for model in (loaded, streamed):
        capfd.readouterr()
        progress = Counting()
        found = score(model, tokenizer, ["demo"], demo / "tasks", limit=count, progress=progress)
        assert list(found) == [*(f"demo_{kind}" for kind in KINDS), "demo"]
        for name, metrics in wanted.items():
            assert found[name] == pytest.approx(metrics)
        assert capfd.readouterr() == ("", "")
        # One turn through the layers for all tasks.
        assert progress.layers == ([0, 1, 2, 3] if model is streamed else [])
        assert (progress.steps > 0) == (model is loaded)
    assert state == random.getstate()
    assert torch.equal(noise[0], torch.get_rng_state())
    assert (noise[1] == np.random.get_state()[1]).all()
    assert logging.getLogger("lm_eval").level == level
    for values in seen.values():
        torch.testing.assert_close(torch.tensor([v for v, _ in values]), torch.tensor(sums), rtol=0, atol=1e-3)
    assert [greedy for _, greedy in seen["LoadedLM"]] == [greedy for _, greedy in seen["StreamedLM"]]
    assert any(greedy for _, greedy in seen["StreamedLM"])


def test_limit_takes_the_first_and_calls_repeat(model, demo, loaded, tokenizer):
    path = demo / "tasks"
    items = items_of(demo, "continuation_spanish", 5)
    right = []
    for item in items:
        values = [by_hand(loaded, tokenizer, item["context"], choice) for choice in item["choices"]]
        right.append(np.argmax(values) == item["label"])
    assert len({sum(right[:limit]) / limit for limit in (1, 2, 5)}) > 1  # otherwise limits can't be told apart
    for limit in (1, 2, 5):
        found = score(model, tokenizer, ["demo_continuation_spanish"], path, limit=limit)
        assert found["demo_continuation_spanish"]["acc"] == pytest.approx(sum(right[:limit]) / limit)
    assert found == score(model, tokenizer, ["demo_continuation_spanish"], path, limit=5)


def test_no_tasks(streamed, tokenizer):
    check_tasks([], None)
    assert score(streamed, tokenizer, [], None) == {}


def test_a_copy_of_the_tasks_uses_its_own_items(demo, streamed, tokenizer, tmp_path):
    shutil.copytree(demo / "tasks", tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "items").mkdir()
    item = {"context": "1 + 2 = 3\n3 + 4 = 7\n2 + 2 =", "choices": [" 4", " 5", " 6", " 7"]}
    rows = [item | {"label": label} for label in (0, 0, 1, 2)]
    (tmp_path / "items" / "arithmetic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score(streamed, tokenizer, ["demo_arithmetic"], tmp_path / "tasks")
    assert found == {"demo_arithmetic": {"acc": 0.5, "acc_norm": 0.5}}


@pytest.mark.parametrize("max_length", [24, 64])
def test_rolling_perplexity(max_length, model, loaded, tokenizer, tmp_path):
    """Windows as lm-eval defines them: disjoint predictions, each from at most max_length tokens."""
    texts = ["It is a truth universally acknowledged, that a single man in possession of a good fortune", "En el", ""]
    text = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    task_file(tmp_path, "rolling", [{"text": t} for t in texts], text)
    nll = words = size = 0
    for each in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(each)["input_ids"]]
        for start in range(1, len(ids), max_length):
            end = min(start + max_length, len(ids))
            # The first window begins at the prefix token, a later one reaches back as far as it can.
            window = ids[max(end - 1 - max_length, 0) : end - 1]
            with torch.no_grad():
                log_p = loaded(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
            nll -= sum(log_p[i - end, ids[i]].item() for i in range(start, end))
        words += len(each.split()) if each else 1
        size += len(each.encode())
    assert max_length > 24 or len(tokenizer(texts[0])["input_ids"]) > max_length
    found = score(model, tokenizer, ["rolling"], tmp_path, max_length=max_length)["rolling"]
    assert found == pytest.approx(
        {
            "word_perplexity": math.exp(nll / words),
            "byte_perplexity": math.exp(nll / size),
            "bits_per_byte": nll / size / math.log(2),
        },
        rel=1e-5,
    )


def test_the_same_text_split_in_two_ways(model, loaded, tokenizer):
    """lm-eval's own model scores the wrong tokens of such a pair; other pairs share a forward."""
    pairs = [
        ("It is a truth universally", " acknowledged, that a"),
        ("It is a truth", " universally acknowledged, that a"),
        ("It is a truth", " universally acknowledged, that the"),
        ("2 + 2 =", " 4"),
        ("2 + 2 =", " 5"),
    ]
    lm = harness.language_model(model, tokenizer, batch_size=4, max_length=None, progress=Progress())
    for part in (pairs, pairs[1:]):
        requests = [Instance("loglikelihood", {}, pair, 0, metadata=("split", n, 1)) for n, pair in enumerate(part)]
        found = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        assert found == pytest.approx([by_hand(loaded, tokenizer, *pair) for pair in part], abs=1e-3)


def test_both_kinds_of_likelihood_together(demo, loaded, streamed, tokenizer, tmp_path):
    task_file(
        tmp_path,
        "both",
        [{"text": "1 + 1 ="}, {"text": "2 + 3 ="}],
        "output_type: loglikelihood\ndoc_to_text: text\ndoc_to_target: '4'\n",
    )
    rolling = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    task_file(tmp_path, "rolling", [{"text": "1 + 1 ="}], rolling)
    progress = Counting()
    found = score(streamed, tokenizer, ["both", "rolling"], tmp_path, progress=progress)
    assert progress.layers == [0, 1, 2, 3] * 2
    for name, metrics in score(loaded, tokenizer, ["both", "rolling"], tmp_path).items():
        assert found[name] == pytest.approx(metrics, rel=1e-5)


def test_generation(loaded, streamed, tokenizer, tmp_path):
    """A loaded model writes; a streamed one refuses before it runs."""
    text = """
    output_type: generate_until
    doc_to_text: question
    doc_to_target: answer
    generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
    metric_list:
      - {metric: exact_match, aggregation: mean, higher_is_better: true}
    filter_list:
      - {name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}
    """
    rows = [{"question": "1 + 2 = 3\n3 + 4 = 7\n2 + 2 =", "answer": "4"}, {"question": "1 +", "answer": "nothing"}]
    task_file(tmp_path, "writing", rows, text)
    assert score(loaded, tokenizer, ["writing"], tmp_path) == {"writing": {"exact_match (stripped)": 0.5}}
    progress = Counting()
    with pytest.raises(InputError, match=r"'writing' lets the model write text.*streamed.*memory"):
        score(streamed, tokenizer, ["writing"], tmp_path, progress=progress)
    assert progress.layers == []
    lm = harness.language_model(streamed, tokenizer, batch_size=1, max_length=None, progress=Progress())
    with pytest.raises(InputError, match="'writing' lets the model write text"):
        lm.generate_until([Instance("generate_until", {}, ("1", {}), 0, metadata=("writing", 0, 1))])


# --- models --------------------------------------------------------------------------------------------------------


def test_a_wrapped_model_is_a_loaded_one(demo, loaded, tokenizer):
    progress = Counting()
    path = demo / "tasks"
    found = score(MoEModel.wrap(loaded), tokenizer, ["demo_arithmetic"], path, limit=3, progress=progress)
    assert found == score(loaded, tokenizer, ["demo_arithmetic"], path, limit=3)
    assert progress.steps > 0


def test_an_offloaded_model(demo, demo_model, loaded, tokenizer):
    offloaded = accelerate.cpu_offload(load(demo_model, dtype=torch.float32), "cpu")
    assert offloaded.device.type == "meta"
    path = demo / "tasks"
    found = score(offloaded, tokenizer, ["demo_continuation_python"], path, limit=3)
    assert found == score(loaded, tokenizer, ["demo_continuation_python"], path, limit=3)


def test_native_experts(demo, demo_model, tokenizer, tmp_path):
    """A checkpoint with packed experts, loaded and streamed, as the rounded model in plain transformers."""
    source = MoEModel.open(demo_model)
    source.overlay = Packed(source)
    assert write_folder(source, tmp_path, {}, Progress()) == "native"
    packed = load(tmp_path, dtype=torch.float32)
    pairs = [([1, 5, 9], [20, 21]), ([7] * 30, [3])]
    expected = []
    for context, wanted in pairs:
        with torch.no_grad():
            log_p = packed(input_ids=torch.tensor([context + wanted])).logits[0].double().log_softmax(-1)
        expected.append(sum(log_p[len(context) - 1 + i, t].item() for i, t in enumerate(wanted)))
    found = likelihood.StreamedLikelihood(MoEModel.open(tmp_path), 2, 512, Progress())(pairs)
    assert [v for v, _ in found] == pytest.approx(expected, abs=1e-3)
    names, path = ["demo_continuation_novels"], demo / "tasks"
    assert score(packed, tokenizer, names, path, limit=3) == score(
        MoEModel.open(tmp_path), tokenizer, names, path, limit=3
    )


class Packed:
    """An overlay: every expert in four bits."""

    def __init__(self, model):
        self.states = {}
        for layer in model.moe_layers:
            with model.layer(layer, stored=True) as live:
                weights = live.block.experts.weights()
                experts = list(range(live.block.num_experts))
                grids = {name: round_to_nearest(stacked, Grid(4, 32)) for name, stacked in weights.matrices()}
                pack_experts(
                    live.block, {name: [(experts, Stack.holding(quantized))] for name, quantized in grids.items()}
                )
                tensors, description = live.block.state()
                self.states[layer] = ({name: tensor.clone() for name, tensor in tensors.items()}, description)

    def get(self, layer):
        return self.states.get(layer)


def test_padding_and_company_change_nothing(streamed):
    """A sequence alone, and in a batch with longer ones: right padding is behind what is read."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for length in (5, 9, 40, 41, 80):
        ids = torch.randint(0, 4096, (length,), generator=generator).tolist()
        pairs.append((ids[:-3], ids[-3:]))
    together = likelihood.StreamedLikelihood(streamed, 8, 512, Progress())(pairs)
    for pair, (value, greedy) in zip(pairs, together, strict=True):
        alone = likelihood.StreamedLikelihood(streamed, 8, 512, Progress())([pair])
        assert alone[0] == (pytest.approx(value, abs=1e-4), greedy)


def test_less_room(streamed, monkeypatch):
    """Limits of memory and threads make more sweeps and smaller batches, and no other numbers."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randint(0, 4096, (n,), generator=generator).tolist(), [n, 2 * n]) for n in range(3, 20)]

    def run():
        progress = Counting()
        found = likelihood.StreamedLikelihood(streamed, 4, 512, progress)(pairs)
        return found, len(progress.layers) // 4

    expected, sweeps = run()
    assert sweeps == 1
    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "CALLS", 2)
        assert run() == (expected, 3)
    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "_free_memory", lambda device: 0)
        assert run() == (expected, 5)
    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "LOGITS", 1)  # batches of one
        patch.setattr(likelihood, "CALLS", 17)
        patch.setattr(likelihood, "POSITIONS", 1)
        found, sweeps = run()
        assert sweeps == 1
        assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)


def test_damaged_weights(demo, demo_model, tokenizer, tmp_path):
    broken = load(demo_model, dtype=torch.float32)
    broken.model.norm.weight.data.fill_(math.nan)
    broken.save_pretrained(tmp_path)
    for model in (broken, MoEModel.open(tmp_path)):
        with pytest.raises(RunError, match="not numbers"):
            score(model, tokenizer, ["demo_arithmetic"], demo / "tasks", limit=1)
