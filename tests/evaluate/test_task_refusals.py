"""What a model or a tokenizer can't score of lm-eval's tasks: said in one line, or counted."""

import copy

import numpy as np
import pytest
import torch
from scoring import Counting, items_of, score, task_file
from transformers import PreTrainedConfig

from moe_compress.errors import InputError
from moe_compress.evaluate import harness, tasks
from moe_compress.evaluate.tasks import check_tasks

# --- lengths and tokens --------------------------------------------------------------------------------------------


def test_long_contexts_lose_their_beginning_and_are_counted(model, demo, loaded, tokenizer, caplog, monkeypatch):
    length, seen = 40, []
    original = harness.Lengths.check
    monkeypatch.setattr(harness.Lengths, "check", lambda self, r, pairs: (seen.extend(pairs), original(self, r, pairs)))
    found = score(model, tokenizer, ["demo_continuation_novels"], demo / "tasks", limit=2, max_length=length)
    assert caplog.messages == ["8 of 8 task requests are longer than 40 tokens and lost their beginning"]
    right = 0
    for start, item in zip((0, 4), items_of(demo, "continuation_novels", 2), strict=True):
        values = []
        for context, wanted in seen[start : start + 4]:
            ids = (context + wanted)[-(length + 1) :]
            with torch.no_grad():
                log_p = loaded(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
            values.append(sum(log_p[i - len(wanted), t].item() for i, t in enumerate(wanted)))
        right += np.argmax(values) == item["label"]
    assert found["demo_continuation_novels"]["acc"] == right / 2


def test_an_answer_longer_than_the_context(model, demo, tokenizer):
    with pytest.raises(
        InputError, match=r"'demo_continuation_novels': an answer of \d+ tokens .* 1 to 4 \(max_length\)"
    ):
        score(model, tokenizer, ["demo_continuation_novels"], demo / "tasks", limit=1, max_length=4)


def test_context_length(loaded, tokenizer):
    assert harness.context_length(loaded.config, tokenizer) == 512
    config = PreTrainedConfig()
    assert harness.context_length(config, tokenizer) == 512  # the tokenizer's
    other = copy.deepcopy(tokenizer)
    other.model_max_length = int(1e30)
    assert harness.context_length(config, other) == 2048


def test_tokenizers(demo, model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        score(model, bare, ["demo_arithmetic"], demo / "tasks", limit=1)
    bare.eos_token, bare.pad_token = tokenizer.eos_token, None
    found = score(model, bare, ["demo_arithmetic"], demo / "tasks", limit=2)
    assert found == score(model, tokenizer, ["demo_arithmetic"], demo / "tasks", limit=2)
    assert bare.pad_token is None


# --- tasks that can't be scored ------------------------------------------------------------------------------------


def test_unknown_tasks(demo, streamed, tokenizer, tmp_path, no_lm_eval_tasks):
    path = demo / "tasks"
    check_tasks(["demo", "demo_arithmetic"], path)
    check_tasks(["demo_arithmetic", "hellaswag"], path)
    with pytest.raises(InputError, match=r"^unknown task 'demo_arithmetc'; did you mean 'demo_arithmetic'\?$"):
        check_tasks(["demo", "demo_arithmetc"], path)
    with pytest.raises(InputError, match=r"^unknown task 'helaswag'; did you mean 'hellaswag'\?$"):
        score(streamed, tokenizer, ["helaswag"], None)
    with pytest.raises(InputError, match=r"^unknown task 'xyz'; .*tasks has demo, demo_arithmetic"):
        check_tasks(["xyz"], path)
    with pytest.raises(InputError, match=r"^unknown task 'xyz'; `lm-eval ls tasks`"):
        check_tasks(["xyz"], None)
    with pytest.raises(InputError, match="missing is not a folder"):
        check_tasks(["demo"], tmp_path / "missing")
    (tmp_path / "mine.yaml").write_text("task: mine\n  broken: [")
    with pytest.raises(InputError, match=r"unknown task 'mine'; .*mine\.yaml is not valid YAML: .*line 2"):
        check_tasks(["mine"], tmp_path)


@pytest.mark.slow
def test_tasks_of_lm_eval(demo):
    check_tasks(["hellaswag", "demo", "mmlu"], demo / "tasks")
    with pytest.raises(InputError, match="unknown task 'helaswag'; did you mean"):
        check_tasks(["helaswag"], None)


def test_data_that_is_not_there(streamed, tokenizer, tmp_path):
    """A data set of the hub without network, and a file of one's own that is missing."""
    path = tmp_path / "hub.yaml"
    path.write_text("task: hub\ndataset_path: nobody/nothing\ndataset_name: en\ntest_split: test\ndoc_to_text: x\n")
    progress = Counting()
    with pytest.raises(
        InputError, match=r"task 'hub' needs the data set 'nobody/nothing' \(en\).*HF_HUB_OFFLINE"
    ) as found:
        score(streamed, tokenizer, ["hub"], tmp_path, progress=progress)
    assert "\n" not in str(found.value)
    task_file(tmp_path, "mine", [], "output_type: loglikelihood\n")
    (tmp_path / "mine.json").unlink()
    with pytest.raises(InputError, match=r"'mine'.*mine\.json"):
        score(streamed, tokenizer, ["mine"], tmp_path, progress=progress)
    assert progress.layers == []


def test_refusals(demo, streamed, tokenizer, tmp_path):
    path = demo / "tasks"
    with pytest.raises(InputError, match="'demo_arithmetic' is in 'demo' and in 'demo_arithmetic'"):
        score(streamed, tokenizer, ["demo", "demo_arithmetic"], path)
    assert list(score(streamed, tokenizer, ["demo_arithmetic"] * 2, path, limit=1)) == ["demo_arithmetic"]
    with pytest.raises(InputError, match="limit: must be at least 1"):
        score(streamed, tokenizer, ["demo"], path, limit=0)
    with pytest.raises(InputError, match="batch_size: must be at least 1"):
        score(streamed, tokenizer, ["demo"], path, batch_size=0)
    text = "output_type: loglikelihood\ndoc_to_text: text\ndoc_to_target: text\n"
    task_file(tmp_path, "code", [{"text": "x"}], text + "unsafe_code: true\n")
    with pytest.raises(InputError, match="'code' runs code"):
        score(streamed, tokenizer, ["code"], tmp_path)
    task_file(tmp_path, "picture", [{"text": "x"}], text + "doc_to_image: text\n")
    with pytest.raises(InputError, match="'picture' shows the model more than text"):
        score(streamed, tokenizer, ["picture"], tmp_path)


def test_metrics():
    found = {
        "alias": "x",
        "name": "x",
        "sample_len": 3,
        "acc,none": np.float64(0.5),
        "acc_stderr,none": "N/A",
        "exact_match,strict-match": 1,
        "odd,none": [1],
        "pass@1,2,none": 0.25,
    }
    assert tasks._metrics(found) == {"acc": 0.5, "exact_match (strict-match)": 1.0, "pass@1,2": 0.25}
