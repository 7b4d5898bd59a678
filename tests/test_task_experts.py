"""Patterns of domains, and loading a task's experts: the right ones, as pruning gives, nothing else read."""

import json
from dataclasses import replace

import pytest
import torch
from families import input_batch, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import moe_compress
from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.text import Calibration, load_batches
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.domains import FILE, Patterns, find_patterns, identity_of, pattern_of
from moe_compress.errors import CheckpointError, DataError, InputError, RecipeError, UnsupportedModelError
from moe_compress.export.partial import load_experts
from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress
from moe_compress.prune.criteria import Selection, find_criterion

TAGS = ("arithmetic", "python", "spanish")


@pytest.fixture(scope="module")
def text(demo, demo_model):
    settings = Calibration(
        sources=[{"path": str(demo / "calibration.jsonl"), "domain_field": "domain"}],
        sequences=9,
        length=64,
        balance=True,
        domains=list(TAGS),
    )
    return load_batches(settings, AutoTokenizer.from_pretrained(demo_model), demo)


@pytest.fixture(scope="module")
def found(demo_model, text):
    return find_patterns(demo_model, text)


@pytest.fixture(scope="module")
def file(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("patterns") / "patterns.safetensors"
    found.save(path)
    return path


@pytest.mark.parametrize("criterion", ["tcess", "reap"])
def test_scores_are_those_of_each_domain_alone(demo_model, text, criterion):
    view, wanted = MoEModel.open(demo_model), find_criterion(criterion)
    patterns = find_patterns(demo_model, text, criterion=criterion)
    assert criterion != "tcess" or torch.equal(patterns.features, patterns.scores[0])
    assert patterns.domains == TAGS
    assert patterns.tokens == dict.fromkeys(TAGS, 3 * 64)
    for number, tag in enumerate(TAGS):
        part = text.chosen([i for i, own in enumerate(text.domain) if own == tag])
        store = MemoryStore()
        with Sweep(view, part.forwards(2)) as sweep:
            collect(sweep, list(wanted.statistics), store, Progress())
        for layer, scores in patterns.scores.items():
            measured = {s.name: store.get(layer, s.key) for s in wanted.statistics}
            expected = wanted.score(measured, Selection(None, 8, [], None))
            assert torch.allclose(scores[number], expected.double(), rtol=1e-4)


def test_a_file_holds_them(found, file):
    again = Patterns.open(file)
    assert all(torch.equal(again.scores[i], scores) for i, scores in found.scores.items())
    assert torch.equal(again.features, found.features)
    assert replace(again, scores={}, features=None) == replace(found, scores={}, features=None)


def test_the_nearest_domain(demo_model, demo, found):
    """Held-out text; and a domain's own pattern is at distance 0 whatever its length."""
    for number, tag in enumerate(TAGS):
        assert found.distances(7 * found.features[number])[tag] == pytest.approx(0, abs=1e-7)
        rows = (demo / "text" / f"text_{tag}.jsonl").read_text().splitlines()[:4]
        view = MoEModel.open(demo_model)
        nearest = [next(iter(found.distances(pattern_of(view, json.loads(r)["text"][:300])))) for r in rows]
        assert nearest.count(tag) >= 3
    pattern = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = [row / row.norm() for row in found.features]
    by_hand = {tag: float((unit - pattern / pattern.norm()).norm()) for tag, unit in zip(TAGS, units, strict=True)}
    assert found.distances(pattern) == pytest.approx(by_hand)
    assert list(found.distances(pattern)) == sorted(by_hand, key=by_hand.get)


class Reads:
    """Which tensors, and which parts of them, come from a folder's files."""

    def __init__(self, monkeypatch):
        self.bytes: dict[str, int] = {}
        get, lazy = Checkpoint.get, Checkpoint.slice
        reads = self

        def watched_get(source, name):
            tensor = get(source, name)
            reads.bytes[name] = reads.bytes.get(name, 0) + tensor.numel() * tensor.element_size()
            return tensor

        class Slice:
            def __init__(self, inner, name):
                self.inner, self.name = inner, name

            def __getitem__(self, key):
                part = self.inner[key]
                reads.bytes[self.name] = reads.bytes.get(self.name, 0) + part.numel() * part.element_size()
                return part

            def __getattr__(self, name):
                return getattr(self.inner, name)

        monkeypatch.setattr(Checkpoint, "get", watched_get)
        monkeypatch.setattr(Checkpoint, "slice", lambda source, name: Slice(lazy(source, name), name))


def test_a_task_reads_its_experts_only(demo_model, found, file, monkeypatch, capsys):
    layers = {i: found.chosen("python", _layers(demo_model))[i] for i in range(4)}
    reads = Reads(monkeypatch)
    model = moe_compress.load(demo_model, task="python", patterns=file, keep=0.25, dtype=torch.float32)
    quarter = {i: found.chosen("python", _layers(demo_model), 0.25)[i] for i in range(4)}
    assert all(set(quarter[i]) < set(layers[i]) and len(quarter[i]) == 4 for i in range(4))
    experts = {n: b for n, b in reads.bytes.items() if ".experts." in n}
    parts = {n: (int(n.split(".")[2]), n.split(".")[5]) for n in experts}
    if all(e.isdigit() for _, e in parts.values()):
        assert {(i, int(e)) for i, e in parts.values()} == {(i, e) for i, own in quarter.items() for e in own}
    with Checkpoint(demo_model) as source:
        stored = sum(info.nbytes for name, info in source.tensors.items() if ".experts." in name)
    assert sum(experts.values()) == stored // 4
    assert model.config.num_experts == 4
    assert model.model.layers[0].mlp.gate.weight.shape[0] == 4
    assert "task 'python': loading 16 of 64 experts" in capsys.readouterr().err


def _layers(folder):
    from moe_compress.model.shape import model_shape

    return model_shape(MoEModel.open(folder)).layers


def test_a_prompt_chooses(demo_model, file, capsys):
    prompt = "def area(self, width, height):\n    return self.width * self.height\n"
    by_prompt = moe_compress.load(demo_model, task=prompt, patterns=file)
    assert "nearest: python (" in capsys.readouterr().err
    by_name = moe_compress.load(demo_model, task="python", patterns=file)
    assert all(torch.equal(a, b) for a, b in zip(by_prompt.parameters(), by_name.parameters(), strict=True))


# Stored one by one (twice); with groups, a correction bias and shared experts; together, with biases; without gate;
# together, in another layout than the model's.
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_vl_moe"])
def test_the_same_model_as_pruning_gives(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    view = MoEModel.open(tmp_path)
    uneven = name == "mixtral"  # layers of different numbers need the native format's config
    keep = {i: [0, 2, 3, 4, 5, 7][: 5 if uneven and i else 6] for i in view.moe_layers}
    if view.block(view.moe_layers[0]).groups:
        keep = {i: [0, 2, 3, 5, 6, 7] for i in keep}
    part = load_experts(view, keep, dtype=torch.float32)
    pruned = MoEModel.wrap(model)
    for index, kept in keep.items():
        pruned.block(index).keep(kept)
    batch = input_batch(part, 2, 9, 0)
    with torch.no_grad():
        assert torch.allclose(part(**batch).logits, model(**batch).logits, atol=1e-4)


def test_what_is_not_read_may_be_anything(demo_model, found, file, tmp_path):
    """Experts that the task leaves out are not numbers: nobody notices. Its own are: the model does."""
    for source in demo_model.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    stay = found.chosen("spanish", _layers(demo_model))
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            layer = int(name.split(".")[2])
            expert = name.split(".")[5]
            gone = [int(expert)] if expert.isdigit() else range(16)
            for e in set(gone) - set(stay[layer]):
                (tensor if expert.isdigit() else tensor[e]).fill_(float("nan"))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        logits = moe_compress.load(tmp_path, task="spanish", patterns=file)(input_ids=ids).logits
        other = moe_compress.load(tmp_path, task="python", patterns=file)(input_ids=ids).logits
    assert logits.isfinite().all()
    assert not other.isfinite().all()


def test_super_experts_stay(found, demo_model):
    layers = _layers(demo_model)
    low = {i: int(scores[0].argmin()) for i, scores in found.scores.items()}
    guarded = replace(found, super_experts={1: [low[1]]})
    assert low[1] not in found.chosen(TAGS[0], layers)[1]
    assert low[1] in guarded.chosen(TAGS[0], layers)[1]


def test_the_command(commands, small, demo, tmp_path):
    file = tmp_path / FILE
    options = ["--calibrate", demo / "calibration.jsonl", "--sequences", 24, "--length", 32, "--output", file]
    said = commands("domains", small, *options, "--keep", 0.75)
    assert (said.code, said.err) == (0, "")
    assert f"domains: {file}" in said.out
    row = next(line.split() for line in said.out.splitlines() if line.startswith("python"))
    assert row[1] == str(24 // 6 * 32)
    assert "100%" in row
    model = moe_compress.load(small, task="python", patterns=file)
    assert model.config.num_experts == 6
    assert Patterns.open(file).identity == identity_of(MoEModel.open(small))


def test_what_is_wrong(commands, small, demo, demo_model, file, text, tmp_path):
    with pytest.raises(CheckpointError, match="of another checkpoint"):
        moe_compress.load(small, task="python", patterns=file)
    with pytest.raises(InputError, match="moe-compress domains MODEL"):
        moe_compress.load(demo_model, task="python")
    with pytest.raises(InputError, match="belong to a `task`"):
        moe_compress.load(demo_model, keep=0.5)
    with pytest.raises(RecipeError, match="1 would be left"):
        moe_compress.load(demo_model, task="python", patterns=file, keep=0.05)
    with pytest.raises(RecipeError, match=r"at most 1, not 1\.5"):
        moe_compress.load(demo_model, task="python", patterns=file, keep=1.5)
    with pytest.raises(DataError, match="prompt is empty"):
        moe_compress.load(demo_model, task="", patterns=file)
    with pytest.raises(CheckpointError, match="patterns of domains"):
        Patterns.open(demo_model / "model.safetensors")
    with pytest.raises(DataError, match="no text says its domain"):
        find_patterns(demo_model, replace(text, domain=[None] * len(text)))
    for criterion in ("naee", "stun"):
        with pytest.raises(RecipeError, match=f"criterion '{criterion}' can't score domains"):
            find_patterns(demo_model, text, criterion=criterion)
    hashed = tiny_model("deepseek_v4")
    hashed.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="table of token ids"):
        find_patterns(tmp_path, text)
    said = commands("domains", small, "--calibrate", demo / "calibration.jsonl", "--domain-field", "nothing")
    assert (said.code, "nothing" in said.line) == (2, True)
    said = commands("domains", small, "--calibrate", demo / "calibration.jsonl", "--output", tmp_path / "no" / "f")
    assert (said.code, "--output" in said.line) == (2, True)
    assert not (small / FILE).exists()
