"""Text that the model writes: the search against a plain loop, both ways of running the model, and whole runs."""

import functools
import json
import math

import pytest
import torch
from checkpoints import PRUNE, recipe, write_recipe
from families import tiny_model
from pydantic import ValidationError
from reference import measure
from running import digest
from transformers import AutoModelForCausalLM

from moe_compress.calib.balance import SequenceRouting
from moe_compress.calib.collect import MemoryStore
from moe_compress.calib.self_sampling import Loads, SelfSampling, Written, _Cached, _Swept, search, self_sample, writing
from moe_compress.calib.text import Calibration
from moe_compress.model import MoEModel
from moe_compress.progress import Monitor

SIZES, VOCABULARY = [3, 4], 9


def said(text):
    """What an imagined model says to a text, and whom its last token visits."""
    generator = torch.Generator().manual_seed(1 + functools.reduce(lambda h, t: (h * 31 + t) % (1 << 40), text, 7))
    counts = torch.zeros(7)
    for start, size in ((0, 3), (3, 4)):
        counts[start + torch.randperm(size, generator=generator)[:2]] = 1
    return 2 * torch.randn(VOCABULARY + 2, generator=generator), counts


class Imagined:
    """A writer over `said`."""

    def step(self, ids_R, parent_R):
        before = [[]] * len(ids_R) if parent_R is None else [self.texts[p] for p in parent_R.tolist()]
        self.texts = [[*text, token] for text, token in zip(before, ids_R.tolist(), strict=True)]
        logits, counts = zip(*(said(text) for text in self.texts), strict=True)
        return torch.stack(logits), torch.stack(counts)


def spread(counts):
    """σ of one set of loads, as it is defined."""
    found = []
    for start, size in ((0, 3), (3, 4)):
        part = counts[start : start + size]
        mean = sum(part) / size
        found.append(math.sqrt(sum((c / mean - 1) ** 2 for c in part) / size))
    return sum(found) / 2


def slow_search(begins, seeds, length, forbidden, settings, before, written):
    """Beam by beam, candidate by candidate."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    visited = [sum((said(text[: i + 1])[1] for i in range(len(text))), torch.zeros(7)).tolist() for text in begins]
    beams = [[(0.0, list(text), v)] for text, v in zip(begins, visited, strict=True)]
    for size in range(len(begins[0]) + 1, length + 1):
        proposals = []
        for b, own in enumerate(beams):
            noise = torch.rand(len(own), VOCABULARY + 2, generator=generators[b]) if settings.temperature else None
            found = []
            for w, (nats, text, counts) in enumerate(own):
                logits = said(text)[0]
                for token in [*forbidden, VOCABULARY, VOCABULARY + 1]:
                    logits[token] = -math.inf
                logp = torch.log_softmax(logits, 0)
                key = logp
                if settings.temperature:
                    key = logp / settings.temperature - torch.log(-torch.log(noise[w].clamp(1e-20, 1 - 1e-7)))
                for token in key.argsort(descending=True)[: settings.width].tolist():
                    new = [*text, token]
                    visits = [a + v for a, v in zip(counts, said(new)[1].tolist(), strict=True)]
                    found.append((nats - float(logp[token]), new, visits))
            proposals.append(found)
        best = [own[0] for own in beams]
        for b, found in enumerate(proposals):
            others = [before[e] + sum(best[o][2][e] for o in range(len(beams)) if o != b) for e in range(7)]
            cost = [
                settings.likelihood * nats
                + (written + len(beams) * size)
                / settings.tau
                * spread([o + c for o, c in zip(others, counts, strict=True)])
                for nats, _, counts in found
            ]
            order = sorted(range(len(found)), key=lambda i, cost=cost: cost[i])
            beams[b] = [found[i] for i in order[: settings.width]]
            best[b] = beams[b][0]
    return [own[0] for own in beams]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("width", "tau", "likelihood"), [(1, 1.2, 1.0), (3, 1.2, 1.0), (3, 0.2, 0.0), (2, 5.0, 0.5)])
def test_the_search_is_the_plain_one(width, tau, likelihood, temperature):
    settings = SelfSampling(width=width, tau=tau, likelihood=likelihood, temperature=temperature)
    loads = Loads(SIZES, VOCABULARY)
    before = [4.0, 9.0, 1.0, 2.0, 2.0, 7.0, 3.0]
    loads.add(Written(torch.zeros(1, 7), torch.tensor([before]), torch.zeros(1)))
    begins, seeds = [[1, 4], [5, 2], [8, 8]], [11, 12, 13]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = search(Imagined(), torch.tensor(begins), generators, 10, [0, 3], settings, loads)
    expected = slow_search(begins, seeds, 10, [0, 3], settings, before, 7)
    assert found.ids.tolist() == [text for _, text, _ in expected]
    assert found.counts.tolist() == [counts for _, _, counts in expected]
    assert found.nats.tolist() == pytest.approx([nats for nats, _, _ in expected], rel=1e-5)
    assert not {0, 3, VOCABULARY, VOCABULARY + 1} & {t for row in found.ids[:, 2:].tolist() for t in row}


def test_without_tau_loads_make_no_difference():
    settings = SelfSampling(width=2, tau=None)
    results = []
    for counts in ([1.0] * 7, [50.0, 0, 0, 0, 0, 0, 9]):
        loads = Loads(SIZES, VOCABULARY)
        loads.add(Written(torch.zeros(1, 7), torch.tensor([counts]), torch.zeros(1)))
        generator = [torch.Generator().manual_seed(3)]
        results.append(search(Imagined(), torch.tensor([[1]]), generator, 8, [], settings, loads).ids.tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "qwen3_next", "zaya"])
@torch.no_grad()
def test_both_ways_of_running_the_model_say_the_same(name):
    view = MoEModel.wrap(tiny_model(name))
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 6, 5, 8)
    parents = [None] + [torch.randint(sizes[i - 1], (sizes[i],), generator=generator) for i in (1, 2, 3)]
    steps = [(torch.randint(3, 100, (n,), generator=generator), p) for n, p in zip(sizes, parents, strict=True)]
    with writing(view, lambda tokens: None) as writer:
        found = [writer.step(*step) for step in steps]
    assert isinstance(writer, _Cached)
    swept = _Swept(view, lambda tokens: None)
    for (logits, counts), step in zip(found, steps, strict=True):
        expected, visits = swept.step(*step)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(counts, visits)


@torch.no_grad()
def test_greedy_writing_is_greedy_decoding():
    model = tiny_model("qwen3_moe")
    view = MoEModel.wrap(model)
    begin = torch.tensor([[1, 17], [1, 90]])
    loads = Loads([view.block(i).num_experts for i in view.moe_layers], 120)
    with writing(view, lambda tokens: None) as writer:
        settings = SelfSampling(width=1, temperature=0, tau=None)
        found = search(writer, begin, [torch.Generator()] * 2, 12, [0, 1, 2], settings, loads)
    unknown = [0, 1, 2, *range(120, 128)]
    expected = model.generate(begin, max_new_tokens=10, do_sample=False, suppress_tokens=unknown, eos_token_id=None)
    assert torch.equal(found.ids, expected)
    logp = model(found.ids).logits.index_fill(2, torch.tensor(unknown), -torch.inf).log_softmax(-1)
    nats = -logp[:, 1:-1].gather(2, found.ids[:, 2:, None]).sum((1, 2))
    torch.testing.assert_close(found.nats.float(), nats, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def demo_view(demo_model):
    return MoEModel.wrap(AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval())


def write(view, tokenizer, settings, store=None, seed="0", prefix=()):
    return self_sample(
        view, settings, 5, 20, seed, tokenizer, prefix, store or MemoryStore(), lambda tokens: None, Monitor(False)
    )


def test_even_loads_where_they_count(demo_view, tokenizer):
    """The less tau, the more even the loads and the less likely the text; and the account says what the model says."""
    found = {}
    for tau in (0.1, 1.2, None):
        store = MemoryStore()
        ids, account = write(demo_view, tokenizer, SelfSampling(width=3, tau=tau, parallel=5), store)
        found[tau] = account["shares"]["std"], account["nats_per_token"]
        routing = measure(demo_view, [{"input_ids": ids}], [SequenceRouting(5)])
        counts = torch.cat([routing.of(i, SequenceRouting(5))["counts"] for i in demo_view.moe_layers], dim=1)
        (kept,) = store.results.values()
        assert torch.equal(kept["counts"], counts.float())
        assert torch.equal(kept["ids"], ids)
        assert not set(ids.flatten().tolist()) & set(tokenizer.all_special_ids)
    assert found[0.1][0] < found[1.2][0] < found[None][0]
    assert found[0.1][1] > found[None][1]


def test_a_finished_group_is_kept_and_gives_the_same(demo_view, tokenizer):
    settings = SelfSampling(width=2, parallel=2)
    whole = write(demo_view, tokenizer, settings)

    class Failing(MemoryStore):
        def put(self, layer, key, result):
            if layer == 1 and not hasattr(self, "failed"):
                self.failed = True
                raise KeyboardInterrupt
            assert (layer, key) not in self.results
            super().put(layer, key, result)

    store = Failing()
    with pytest.raises(KeyboardInterrupt):
        write(demo_view, tokenizer, settings, store)
    again = write(demo_view, tokenizer, settings, store)
    assert torch.equal(again[0], whole[0])
    assert again[1] == whole[1]
    assert whole[0].shape == (5, 20)
    assert len({tuple(row) for row in whole[0].tolist()}) == 5
    assert not torch.equal(write(demo_view, tokenizer, settings, seed="1")[0], whole[0])
    assert write(demo_view, tokenizer, settings, prefix=[7, 9])[0][:, :2].tolist() == [[7, 9]] * 5


MIXED = {"sequences": 5, "length": 12, "batch_size": 2}


def test_runs_write_once_and_the_same(small, text, tmp_path, commands):
    own = {"self_sampling": {"width": 2, "parallel": 2}, "weight": 3, "domain": "own"}
    sources = [{"path": str(text / "calibration.jsonl"), "weight": 2}, own]
    values = recipe(small, tmp_path / "a", [PRUNE], calibration={"sources": sources, **MIXED})
    file = write_recipe(tmp_path / "recipe.yaml", values)
    assert commands("run", file).code == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["calibration"]["sequences_per_domain"] == {"(untagged)": 2, "own": 3}
    assert report["calibration"]["sources"][1]["sequences"] == 3
    assert report["tokens_seen"] == 60

    # Killed when a group is written: the next run reads it, and writes the other.
    kill = """
import os
from moe_compress.checkpoint.workspace import DiskStatistics
real = DiskStatistics.put
def put(self, layer, key, result):
    real(self, layer, key, result)
    if key.startswith("self_sampling"):
        os.kill(os.getpid(), 9)
DiskStatistics.put = put
"""
    assert commands("run", file, "--set", f"output={tmp_path / 'b'}", plant=kill).code == -9
    assert commands("run", file, "--set", f"output={tmp_path / 'b'}", plant=kill).code == -9
    again = commands("run", file, "--set", f"output={tmp_path / 'b'}", plant=kill)
    assert again.code == 0
    assert "continuing" in again.err
    # A model that may not be in memory as a whole is swept, and says so.
    swept = commands("run", file, "--set", f"output={tmp_path / 'c'}", "--set", "compute.memory=1 kB")
    assert swept.code == 0
    assert "each of 24 tokens is a sweep" in swept.err
    results = [
        {k: v for k, v in digest(tmp_path / name).items() if k.endswith("safetensors")} for name in ("a", "b", "c")
    ]
    assert results[0] == results[1] == results[2]


def test_settings_that_are_refused():
    for wrong, complaint in (
        ({"sources": [{"path": "x", "self_sampling": {}}]}, "either a `path` or a `dataset`, or `self_sampling`"),
        ({"sources": [{"self_sampling": {"tau": 0}}]}, "greater than 0"),
        ({"sources": [{"self_sampling": {}}], "expert_balance": 0.5}, "all sources are `self_sampling`"),
        ({"sources": ["x", {"self_sampling": {}}], "domains": ["a"]}, "not one of `domains`"),
    ):
        with pytest.raises(ValidationError, match=complaint):
            Calibration(**wrong)
