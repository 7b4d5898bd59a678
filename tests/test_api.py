"""`moe_compress.compress` on models in memory: what it gives, what it leaves behind, what it refuses."""

import json
import re

import pytest
import torch
from families import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.calib.text import Calibration, load_batches
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import InputError, MoeCompressError, RecipeError, RunError
from moe_compress.export.targets import find_target
from moe_compress.passes import find_pass
from moe_compress.probe import TOLERANCE
from moe_compress.prune.experts import PruneExperts
from moe_compress.quant.mixed import QuantizeMixed

PROTECT = {"protect_super_experts": False}
PRUNE = {"prune.experts": {"experts": 6, **PROTECT}}
QUANTIZE = {"quantize.mixed": {"bits": 5, "group_size": 8, **PROTECT}}
BOTH = [PRUNE, QUANTIZE]
RTN = {"quantize.mixed": {"bits": 5, "group_size": 8, "allocation": "uniform", "method": "rtn", **PROTECT}}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    """A tiny model with the demo's vocabulary, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    tiny_model("qwen3_moe", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def from_disk(source, calibration, tmp_path_factory):
    """The same recipe carried out from disk to disk."""
    output = tmp_path_factory.mktemp("disk") / "out"
    return moe_compress.run({"model": str(source), "output": str(output), "passes": BOTH, "calibration": calibration})


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


IDS = torch.randint(3, 4000, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def same_tensors(one, two):
    with Checkpoint(one) as a, Checkpoint(two) as b:
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.get(name), b.get(name)) for name in a.tensors)


def offloaded_by(way, folder, tmp_path):
    if way == "plain":
        return loaded(folder)
    if way == "one device":
        return loaded(folder, device_map={"": "cpu"})
    if way == "disk":
        model = loaded(
            folder, device_map="auto", max_memory={"cpu": "250KB"}, offload_folder=str(tmp_path / "offloaded")
        )
        assert "disk" in model.hf_device_map.values()
    else:
        from accelerate import cpu_offload

        model = cpu_offload(loaded(folder), execution_device="cpu")
    assert any(p.is_meta for p in model.parameters())
    return model


@pytest.mark.parametrize("way", ["plain", "one device", "disk", "memory"])
def test_same_as_from_disk(way, source, calibration, tokenizer, from_disk, tmp_path):
    """Plans, report, tensors: the same as of the run from disk; saved, loaded, asked: the same logits."""
    model = offloaded_by(way, source, tmp_path)
    before = logits(model)
    result = moe_compress.compress(model, tokenizer=tokenizer, passes=BOTH, calibration=calibration)
    assert result.model is model
    assert result.report["passes"] == from_disk.report["passes"]
    assert result.report["layers"] == from_disk.report["layers"]
    for key in ("before", "after"):
        assert result.report[key] == from_disk.report[key]
    after = logits(model)
    assert not torch.allclose(after, before)
    result.save(tmp_path / "saved")
    same_tensors(tmp_path / "saved", from_disk.output)
    assert torch.equal(logits(moe_compress.load(tmp_path / "saved", dtype=torch.float32)), after)
    assert moe_compress.verify(tmp_path / "saved").tensors > 0
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    if way == "plain":
        model.save_pretrained(tmp_path / "by transformers")
        assert torch.equal(logits(loaded(tmp_path / "by transformers")), after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_result_is_verified_in_the_dtype_of_its_model(dtype, source, calibration, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    packed = {"quantize.mixed": {"bits": 7, "group_size": 8, "include": ["experts", "embeddings"], **PROTECT}}
    moe_compress.compress(model, tokenizer=tokenizer, passes=[packed], calibration=calibration).save(tmp_path / "out")
    assert moe_compress.verify(tmp_path / "out").tolerance == TOLERANCE[dtype]


def test_result_speaks(source, calibration, tokenizer, demo, tmp_path):
    """`print` and `.report` say sizes and scores before and after; `.score` agrees with the report."""
    (tmp_path / "held.txt").write_text((demo / "calibration.jsonl").read_text()[:4000])
    wanted = {"text": [str(tmp_path / "held.txt")], "length": 32, "max_tokens": 256}
    result = moe_compress.compress(loaded(source), tokenizer=tokenizer, passes=[RTN], evaluate=wanted, calibration=None)
    before, after = result.report["before"], result.report["after"]
    assert after["expert_bytes"] < before["expert_bytes"]
    assert before["perplexity"].keys() == after["perplexity"].keys() == {"held"}
    assert result.report["after"]["kl"]["held"] > 0
    shown = str(result)
    assert shown == f"{result}"
    rows = {name: values for name, *values in (re.split(r"\s{2,}", line) for line in shown.splitlines())}
    assert float(rows["perplexity held"][0]) == pytest.approx(before["perplexity"]["held"], rel=1e-3)
    assert float(rows["perplexity held"][1]) == pytest.approx(after["perplexity"]["held"], rel=1e-3)
    assert float(rows["KL to original held"][-1]) == pytest.approx(after["kl"]["held"], rel=1e-2)
    assert result.score(str(tmp_path / "held.txt"), length=32)["held"] > 0
    result.save(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "report.json").read_text())
    assert written["recipe"].pop("output") == str(tmp_path / "saved")
    assert written == json.loads(json.dumps(result.report))
    told = (tmp_path / "saved" / "report.md").read_text()
    assert told.startswith(f"# {source} → {tmp_path / 'saved'}\n")
    assert f"| perplexity held | {before['perplexity']['held']:.4g} | {after['perplexity']['held']:.4g} |" in told
    moe_compress.verify(tmp_path / "saved")


def test_calibration_in_every_form(source, calibration, tokenizer):
    """A mapping, a Calibration, token batches, tensors: the same tokens give the same result."""
    ids = load_batches(Calibration(**calibration), tokenizer, ".", vocab_size=len(tokenizer))
    forms = [calibration, Calibration(**calibration), ids, [ids.ids[:3], ids.ids[3:]], ids.ids]
    found = []
    for form in forms:
        needs = tokenizer if isinstance(form, dict | Calibration) else None
        result = moe_compress.compress(loaded(source), tokenizer=needs, passes=[PRUNE], calibration=form)
        assert result.report["tokens_seen"] == 6 * 32
        found.append((result.report["layers"], logits(result.model)))
    for layers, output in found[1:]:
        assert layers == found[0][0]
        torch.testing.assert_close(output, found[0][1])


def test_a_path_is_calibration_too(source, tokenizer, tmp_path):
    """With the default number and length of sequences, which a short file doesn't hold."""
    (tmp_path / "one.txt").write_text("a few words " * 50)
    roomy = tiny_model("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=4096)
    for form in (str(tmp_path / "one.txt"), tmp_path / "one.txt", [tmp_path / "one.txt"]):
        with pytest.raises(MoeCompressError, match="sequences"):
            moe_compress.compress(roomy, tokenizer=tokenizer, passes=[PRUNE], calibration=form)


def test_passes_in_every_form(source):
    """Names, mappings, Pass objects, one without a list."""
    goal = find_target("native")
    ready = find_pass("quantize.mixed")(QuantizeMixed.Options(**RTN["quantize.mixed"]), goal)
    outputs = [
        logits(moe_compress.compress(loaded(source), passes=form).model)
        for form in ([RTN], [ready], (RTN,), RTN, ready)
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    with pytest.raises(MoeCompressError, match="experts"):
        moe_compress.compress(loaded(source), passes=["prune.experts"], calibration=IDS)


def test_one_after_the_other(source, calibration, tokenizer, from_disk, tmp_path):
    """Two calls do what one with both passes does: the model says what it became."""
    model = loaded(source)
    first = moe_compress.compress(model, tokenizer=tokenizer, passes=[PRUNE], calibration=calibration)
    assert model.config.num_experts == 6
    model.save_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(loaded(tmp_path / "pruned")), logits(model))
    first.save(tmp_path / "saved")
    same_tensors(tmp_path / "saved", tmp_path / "pruned")
    second = moe_compress.compress(model, tokenizer=tokenizer, passes=[QUANTIZE], calibration=calibration)
    second.save(tmp_path / "both")
    same_tensors(tmp_path / "both", from_disk.output)
    with pytest.raises(InputError, match="changed again since"):  # its report is of other experts
        first.save(tmp_path / "stale")
    assert not (tmp_path / "stale").exists()
    with pytest.raises(MoeCompressError, match="the experts of layer 0 are packed already"):
        moe_compress.compress(model, tokenizer=tokenizer, passes=[QUANTIZE], calibration=calibration)
    second.save(tmp_path / "still")  # nothing was changed by what was refused


def test_unequal_layers_and_back(source, calibration, tokenizer, tmp_path):
    """Pruned globally the layers differ: native with dense experts; made equal again it is plain transformers."""
    model = loaded(source)
    moe_compress.compress(
        model,
        tokenizer=tokenizer,
        passes=[{"prune.experts": {"keep": 0.8, "scope": "global", "criterion": "frequency", **PROTECT}}],
        calibration=calibration,
    )
    counts = [layer.mlp.experts.num_experts for layer in model.model.layers]
    assert len(set(counts)) > 1
    model.save_pretrained(tmp_path / "unequal")
    again = loaded(tmp_path / "unequal")
    assert torch.equal(logits(again), logits(model))
    assert [layer.mlp.experts.num_experts for layer in again.model.layers] == counts
    for one in (model, again):
        moe_compress.compress(
            one, tokenizer=tokenizer, passes=[{"prune.experts": {"experts": 4, **PROTECT}}], calibration=calibration
        )
        one.save_pretrained(tmp_path / "equal")
        config = json.loads((tmp_path / "equal" / "config.json").read_text())
        assert AutoConfig.from_pretrained(tmp_path / "equal").num_experts == 4
        assert not {"quantization_config", "experts_implementation"} & config.keys()
        assert torch.equal(logits(loaded(tmp_path / "equal")), logits(one))


# ---- What goes wrong ----

WRONG = {
    "no passes": ({"passes": []}, "nothing to do"),
    "unknown pass": ({"passes": ["prune.expert"]}, r"passes\[0\].*did you mean 'prune.experts'"),
    "unknown option": ({"passes": [{"prune.experts": {"keeep": 1}}]}, r"passes\[0\].*did you mean 'keep'"),
    "two in one": ({"passes": [PRUNE | QUANTIZE]}, r"passes\[0\]: a pass is"),
    "not a pass": ({"passes": [7]}, r"passes\[0\]: a pass is"),
    "wrong value": ({"passes": [{"prune.experts": {"keep": "most"}}]}, r"passes\[0\].*keep"),
    "impossible order": ({"passes": [RTN, PRUNE]}, "can't follow quantize.mixed"),
    "budget": ({"passes": [{"quantize.mixed": {**RTN["quantize.mixed"], "bits": 0.5}}]}, "the budget is"),
    "unknown target": ({"target": "vlm"}, "did you mean 'vllm'"),
    "no calibration": ({"calibration": None}, "measures the model on text"),
    "unknown key of calibration": ({"calibration": {"sources": "x", "lenght": 3}}, "calibration.lenght.*'length'"),
    "no sources": ({"calibration": {"length": 3}}, "calibration.sources: this key is needed"),
    "calibration of another type": ({"calibration": 5}, "calibration: int can't be read as Calibration"),
    "missing file": ({"calibration": {"sources": "nowhere.jsonl", "length": 8}}, "nowhere.jsonl"),
    "floats": ({"calibration": torch.rand(2, 8)}, "integers"),
    "ids too large": ({"calibration": [torch.full((2, 8), 5000)]}, "the model knows"),
    "one row": ({"calibration": torch.arange(8)}, r"\[sequences, length\]"),
    "unequal lengths": ({"calibration": [IDS, IDS[:, :5]]}, "of one length"),
    "too long": ({"calibration": torch.ones(1, 200, dtype=torch.int64)}, "at most 128 tokens"),
    "unknown key of evaluate": ({"evaluate": {"texts": []}}, "evaluate.texts.*'text'"),
    "tasks": ({"evaluate": {"tasks": ["arc_easy"]}}, "tasks need a saved model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, source, tokenizer):
    """One line of this package's errors, and the model is what it was."""
    arguments, message = WRONG[case]
    model = loaded(source)
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(MoeCompressError, match=message) as caught:
        moe_compress.compress(model, **{"passes": [PRUNE], "tokenizer": tokenizer, "calibration": IDS, **arguments})
    assert "\n" not in str(caught.value)
    assert "changed in part" not in str(caught.value)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


def test_text_without_a_tokenizer(source, calibration):
    for arguments in ({"calibration": calibration}, {"calibration": IDS, "evaluate": {"text": ["x.txt"]}}):
        with pytest.raises(MoeCompressError, match="tokenizer="):
            moe_compress.compress(loaded(source), passes=[PRUNE], **arguments)


def test_a_dense_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    with pytest.raises(MoeCompressError, match="dense model"):
        moe_compress.compress(dense, passes=[RTN])


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_an_error_on_the_way_says_what_is_left(kind, source, monkeypatch):
    """The second pass fails in its second layer: the first is in the model, and the error says to load it again."""
    error = RunError("the disk is full") if kind == "ours" else ZeroDivisionError("oops")
    real = QuantizeMixed.apply
    calls = []

    def failing(self, block, decision, inputs):
        calls.append(block.layer)
        if len(calls) == 2:
            raise error
        return real(self, block, decision, inputs)

    monkeypatch.setattr(QuantizeMixed, "apply", failing)
    model = loaded(source)
    with pytest.raises(RunError if kind == "ours" else ZeroDivisionError) as caught:
        moe_compress.compress(model, passes=[PRUNE, RTN], calibration=IDS)
    said = str(caught.value) if kind == "ours" else caught.value.__notes__[0]
    assert "the model is changed in part (4 layers done): load it again" in said
    assert model.model.layers[0].mlp.experts.num_experts == 6


def test_an_error_before_any_change_leaves_the_model_alone(source, monkeypatch):
    def failing(self, profile):
        raise RunError("the solver gave up")

    monkeypatch.setattr(PruneExperts, "plan", failing)
    model = loaded(source)
    before = logits(model)
    with pytest.raises(RunError, match=r"^the solver gave up$"):
        moe_compress.compress(model, passes=[PRUNE], calibration=IDS)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("target", ["native", "vllm"])
def test_a_model_in_bfloat16_is_verified_in_bfloat16(target, demo_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16).eval()
    result = moe_compress.compress(model, passes=[{"quantize.scheme": {"scheme": "fp8-block"}}], target=target)
    result.save(tmp_path / "out")
    assert moe_compress.verify(tmp_path / "out").distance < 1e-2  # in float32 some tokens go to other experts: 0.1


def test_saving_over_something(source, tmp_path):
    result = moe_compress.compress(loaded(source), passes=[RTN])
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for name in ("file", "full"):
        with pytest.raises(MoeCompressError, match=name):
            result.save(tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == "x"
    result.save(tmp_path / "full", overwrite=True)
    assert torch.equal(logits(loaded(tmp_path / "full")), logits(result.model))


# ---- Recipes ----


def test_run_takes_a_dict_or_a_file(source, from_disk, tmp_path, calibration):
    recipe = {"model": str(source), "output": str(tmp_path / "out"), "passes": BOTH, "calibration": calibration}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    finished = moe_compress.run(tmp_path / "recipe.yaml")
    same_tensors(finished.output, from_disk.output)
    assert moe_compress.read_recipe(tmp_path / "recipe.yaml").plain()["output"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "modle: unknown key 'modle'; did you mean 'model'"),
        ({"passes": [{"prune.experts": {"keeep": 1}}]}, r"passes\[0\].prune.experts.keeep: unknown key"),
        ({"calibration": {"sources": "x", "lenght": 1}}, "calibration.lenght: unknown key"),
        ({"target": "nativ"}, "target: no target is called"),
    ],
)
def test_wrong_dicts(change, message, source, tmp_path):
    with pytest.raises(RecipeError, match=message):
        moe_compress.run({"model": str(source), "output": str(tmp_path / "out"), "passes": [RTN], **change})
    assert not (tmp_path / "out").exists()
