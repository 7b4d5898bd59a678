"""Expert balance: the greedy choice against a plain loop, counts against the model's own routing, whole runs."""

import json

import pytest
import torch
from checkpoints import PRUNE, recipe, write_recipe
from families import input_batch, tiny_model
from pydantic import ValidationError
from reference import experts_calls, measure
from running import digest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compress.calib.balance import SequenceRouting, balance, shares
from moe_compress.calib.batches import TokenBatches
from moe_compress.calib.batches import digest as digest_of
from moe_compress.calib.draft import finish
from moe_compress.calib.text import Calibration, load_batches, read_draft
from moe_compress.errors import DataError
from moe_compress.model import MoEModel
from moe_compress.progress import Monitor


def slow_choice(layers, asked, ratio, most):
    """The same, one expert and one candidate at a time."""
    tokens, need, fair = {}, {}, {}
    for layer, counts in layers.items():
        rows = counts.tolist()
        sums = [sum(row[e] for row in rows[:asked]) for e in range(len(rows[0]))]
        fair[layer] = sum(sums) / len(sums)
        for e, total in enumerate(sums):
            tokens[layer, e], need[layer, e] = total, ratio * fair[layer]
    rest, added = list(range(len(rows) - asked)), []
    while asked + len(added) < most:
        gains = []
        for p in rest:
            gain = 0.0
            for (layer, e), wanted in need.items():
                lacking = max(0.0, wanted - tokens[layer, e])
                gain += min(float(layers[layer][asked + p, e]), lacking) / fair[layer]
            gains.append(round(gain, 9))
        if not gains or max(gains) <= 0:
            break
        best = rest.pop(next(i for i, g in enumerate(gains) if g == max(gains)))
        added.append(best)
        for layer, e in tokens:
            tokens[layer, e] += int(layers[layer][asked + best, e])
    starved = {}
    for (layer, e), wanted in need.items():
        if tokens[layer, e] < wanted - 1e-9:
            starved.setdefault(str(layer), []).append(e)
    return added, starved


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_greedy_one(seed):
    torch.manual_seed(seed)
    skew = torch.rand(2, 6) ** 3
    layers = {3: torch.poisson(20 * skew[0].expand(40, 6)).int(), 5: torch.poisson(20 * skew[1].expand(40, 6)).int()}
    for ratio, most in ((0.3, 40), (0.8, 14), (2.0, 100)):
        found = balance(layers, 8, ratio, most)
        assert (found.added, found.report["starved"]) == slow_choice(layers, 8, ratio, most)
        assert 8 + len(found.added) <= most


def test_a_rare_expert_is_lifted_by_whoever_visits_it():
    counts = torch.full((12, 4), 10)
    counts[:, 3] = 0  # nobody visits it, but candidates 5 (little) and 2 (much)
    counts[4 + 2, 3], counts[4 + 5, 3] = 40, 5
    found = balance({0: counts}, 4, 0.5, 12)
    assert found.added == [2]  # 40 tokens, of the 15 that a half of (3·40 + 0)/4 is
    assert found.report["starved"] == {}
    assert found.report["starved_before"] == 1
    assert found.report["before"]["min"] == 0
    assert found.report["after"]["min"] == pytest.approx(40 / ((3 * 50 + 40) / 4), abs=1e-6)
    counts[4 + 2, 3] = 0
    found = balance({0: counts}, 4, 0.5, 12)
    assert (found.added, found.report["starved"]) == ([5], {"0": [3]})  # nothing else helps


def test_what_is_balanced_stays_as_it_is():
    assert balance({0: torch.full((9, 4), 3)}, 5, 1.0, 9).added == []


def test_shares():
    first, second = torch.tensor([[1, 2], [3, 2]]), torch.tensor([[0, 6], [2, 0]])
    found = shares([first, second])
    assert found["min"] == 0.5  # 2 of a mean of 4, in the second layer
    assert found["mean"] == 1
    assert found["std"] == pytest.approx((0 + 0.5) / 2)


@pytest.mark.parametrize("name", ["qwen3_moe", "zaya"])
def test_each_sequence_has_its_own_counts(name):
    model = tiny_model(name)
    batches = [input_batch(model, *shape) for shape in ((2, 12, 1), (1, 7, 2), (3, 5, 3))]
    view = MoEModel.wrap(model)
    profile = measure(view, batches, [SequenceRouting(6)])
    rows = [12, 12, 7, 5, 5, 5]
    for layer, calls in experts_calls(model, batches).items():
        expected = torch.zeros(6, view.block(layer).num_experts)
        sequences = [s for s, count in enumerate(rows) for _ in range(count)]
        start = 0
        for call in calls:
            for token, expert, _ in call.choices():
                if expert < expected.shape[1]:
                    expected[sequences[start + token], expert] += 1
            start += len(call.hidden_TH)
        assert torch.equal(profile.of(layer, SequenceRouting(6))["counts"], expected.int())


def test_joining_and_choosing_keep_sequences_and_tags_together():
    def made(first, count, images):
        samples = [{"input_ids": torch.full((1, 3 + i), first + 50 + i)} for i in range(images)]
        ids = torch.arange(first, first + count).unsqueeze(1).expand(count, 4).contiguous()
        tags = [str(first + i) for i in range(count)] + [str(first + 50 + i) for i in range(images)]
        return TokenBatches(ids, tags, digest_of([ids], tags, samples), {}, tuple(samples))

    both = made(0, 3, 2).joined(made(100, 2, 1))
    for which in (both, both.chosen([6, 0, 4, 7]), both.chosen([])):
        forwards = which.forwards(2)
        firsts = [int(ids[0]) for batch in forwards for ids in batch["input_ids"]]
        assert [str(i) for i in firsts] == which.domain
        assert which.tokens == sum(batch["input_ids"].numel() for batch in forwards)
    assert both.domain == ["0", "1", "2", "100", "101", "50", "51", "150"]
    assert both.chosen([6, 0, 4, 7]).domain == ["0", "101", "51", "150"]
    assert both.chosen([0, 1]).digest != both.chosen([1, 0]).digest
    weighed = both.weighed({"text": 0.5})
    for which, plain in ((weighed.chosen([0, 1]), both.chosen([0, 1])), (weighed.joined(both), both.joined(both))):
        assert which.modality_weights == {"text": 0.5}
        assert which.digest not in (plain.digest, weighed.digest)


SETTINGS = {"sequences": 6, "length": 32, "batch_size": 4, "shuffle": True}


def test_chosen_sequences_come_from_the_pool_and_serve_the_starved(small, text):
    """On a real model: the sequences asked for are the same as without, and what was added serves as reported."""
    tokenizer = AutoTokenizer.from_pretrained(small)
    view = MoEModel.wrap(AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32))
    source = {"sources": [str(text / "calibration.jsonl")], **SETTINGS}
    plain = load_batches(Calibration(**source), tokenizer, "/")
    draft = read_draft(Calibration(**source, expert_balance={"ratio": 1.5, "most": 10, "pool": 9}), tokenizer, "/")
    assert torch.equal(draft.text.ids, plain.ids)
    assert draft.text.digest == plain.digest
    assert len(draft.pool) == 9
    from moe_compress.calib.collect import MemoryStore

    stores = {}
    got = [
        finish(draft, view, lambda data: stores.setdefault(data, MemoryStore()), lambda tokens: None, Monitor(False))
        for _ in range(2)
    ]
    assert len(stores) == 1
    assert got[0].digest == got[1].digest != plain.digest
    assert torch.equal(got[0].ids[:6], plain.ids)
    candidates = {tuple(row) for row in draft.pool.ids.tolist()}
    assert all(tuple(row) in candidates for row in got[0].ids[6:].tolist())
    account = got[0].report["expert_balance"]
    assert len(got[0]) == 6 + account["added"] == got[0].report["sequences"] == 10
    # The account, from the model's own routing.
    for when, ids in (("before", plain.ids), ("after", got[0].ids)):
        calls = experts_calls(view.module, [{"input_ids": ids}])
        counts = {
            i: torch.tensor([[sum(e == x for _, e, _ in c[0].choices()) for x in range(view.block(i).num_experts)]])
            for i, c in calls.items()
        }
        assert account[when] == shares(list(counts.values()))
        if when == "before":
            wanted = {i: 1.5 * float(c.double().mean()) for i, c in counts.items()}
        else:
            starved = {str(i): (c[0] < wanted[i]).nonzero().flatten().tolist() for i, c in counts.items()}
            assert account["starved"] == {i: e for i, e in starved.items() if e}
    assert any("fair share" in warning for warning in got[0].report["warnings"]) == bool(account["starved"])
    json.dumps(got[0].report)


def test_domains_stay_balanced_in_the_pool(demo):
    source = {"path": str(demo / "calibration.jsonl"), "domain_field": "domain"}
    settings = {"sequences": 12, "length": 64, "balance": True, "expert_balance": {"ratio": 1.0, "pool": 24}}
    draft = read_draft(
        Calibration(sources=[source], **settings), AutoTokenizer.from_pretrained(demo / "moe-demo"), demo
    )
    together = [*draft.text.domain, *draft.pool.domain]
    assert {together.count(domain) for domain in together} == {6}


def test_a_run_that_is_killed_while_balancing_gives_the_same(small, text, tmp_path, commands):
    balanced = {"sources": [str(text / "calibration.jsonl")], **SETTINGS, "expert_balance": 1.5}
    values = recipe(small, tmp_path / "out", [PRUNE], calibration=balanced)
    file = write_recipe(tmp_path / "recipe.yaml", values)
    assert commands("run", file).code == 0
    whole = digest(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    account = report["calibration"]["expert_balance"]
    assert account["added"] > 0
    assert report["tokens_seen"] == 32 * (6 + account["added"])
    assert "calibration: expert balance" in [stage["name"] for stage in report["stages"]]

    kill = """
import os
from moe_compress.checkpoint.workspace import DiskStatistics
real = DiskStatistics.put
def put(self, layer, key, result):
    real(self, layer, key, result)
    if layer == 1 and key.startswith("sequence_routing"):
        os.kill(os.getpid(), 9)
DiskStatistics.put = put
"""
    assert commands("run", file, "--set", f"output={tmp_path / 'again'}", plant=kill).code == -9
    again = commands("run", file, "--set", f"output={tmp_path / 'again'}")
    assert again.code == 0
    assert "continuing" in again.err
    second = digest(tmp_path / "again")
    assert {k: v for k, v in second.items() if k.endswith("safetensors")} == {
        k: v for k, v in whole.items() if k.endswith("safetensors")
    }


def test_settings_that_are_refused(demo):
    for wrong, complaint in (({"ratio": 0}, "greater than 0"), ({"ratio": 1, "most": 3}, "most is less than the 6")):
        with pytest.raises(ValidationError, match=complaint):
            Calibration(sources="x", sequences=6, expert_balance=wrong)
    assert Calibration(sources="x", expert_balance=0.5).expert_balance.ratio == 0.5
    tokenizer = AutoTokenizer.from_pretrained(demo / "moe-demo")
    settings = Calibration(sources=str(demo / "calibration.jsonl"), sequences=2, length=16, expert_balance=0.5)
    with pytest.raises(DataError, match="run the model"):
        load_batches(settings, tokenizer, "/")
