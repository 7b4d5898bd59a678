"""`moe_compress.compress` on native results in memory, packed or of other sizes than config.json says: as from disk."""

import pytest
import torch
from accelerate import cpu_offload
from families import tiny_model

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint, read_json
from moe_compress.errors import MoeCompressError, UnsupportedModelError

IDS = torch.randint(3, 4000, (2, 20), generator=torch.Generator().manual_seed(0))
PROTECT = {"protect_super_experts": False}
SIZED = {"method": "rtn", "group_size": 16, **PROTECT}
EVERYTHING = {"quantize.mixed": {**SIZED, "size": "700 kB", "include": ["experts", "attention", "embeddings"]}}
MADE = {
    "packed": {"quantize.mixed": {**SIZED, "bits": 5, "allocation": "uniform"}},
    "everything": EVERYTHING,
    "factored": {"merge.factorise": {"keep": 0.75}},
    "ragged": {"prune.neurons": {"keep": 0.7, "width": "free"}},
    "scaled": {"quantize.scheme": {"scheme": "w8a8"}},
    "narrowed": {"prune.neurons": {"keep": 0.6, "width": "layer", "multiple": 4}},
}
HEAL, SKIP = {"heal.router": {"epochs": 1}}, {"skip.top_p": {"share": 0.6}}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model("qwen3_moe", vocab_size=len(tokenizer))
    model.model.layers[1].mlp.experts.down_proj.data[..., 4:] *= 0.01  # neurons of this layer go first
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source, calibration, tmp_path_factory):
    """The folder of a native result, by name; each made once."""
    folders = {}

    def make(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "out"
            recipe = {
                "model": str(source),
                "output": str(folders[name]),
                "passes": [MADE[name]],
                "calibration": calibration,
            }
            moe_compress.run(recipe)
        return folders[name]

    return make


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("packed", SKIP),
        ("packed", HEAL),
        ("packed", {"skip.learned": {"experts_per_token": 1.5}}),
        ("everything", SKIP),
        ("everything", HEAL),
        ("factored", SKIP),
        ("factored", {"quantize.factors": {"bits": 4, "group_size": 8}}),
        ("ragged", SKIP),
        ("scaled", SKIP),
        ("narrowed", HEAL),
    ],
)
def test_same_as_from_disk(name, step, made, calibration, tokenizer, tmp_path):
    """Report, tensors and description of the run from disk; saved and loaded, the logits of the model in memory."""
    folder = made(name)
    recipe = {"model": str(folder), "output": str(tmp_path / "run"), "passes": [step], "calibration": calibration}
    ran = moe_compress.run(recipe)
    model = moe_compress.load(folder, dtype=torch.float32)
    result = moe_compress.compress(model, tokenizer=tokenizer, passes=[step], calibration=calibration, original=folder)
    for key in ("before", "after", "layers", "beside", "passes"):
        assert result.report[key] == ran.report[key]
    result.save(tmp_path / "saved")
    with Checkpoint(tmp_path / "saved") as one, Checkpoint(tmp_path / "run") as two:
        assert all(torch.equal(one.get(n), two.get(n)) for n in one.tensors.keys() & two.tensors.keys())
        assert sum(i.nbytes for i in one.tensors.values()) == sum(i.nbytes for i in two.tensors.values())
    described = [read_json(tmp_path / of / "config.json")["quantization_config"] for of in ("saved", "run")]
    assert described[0] == described[1]
    assert moe_compress.verify(tmp_path / "saved").distance < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(
            moe_compress.load(tmp_path / "saved", dtype=torch.float32)(IDS).logits, model(IDS).logits
        )


@pytest.mark.parametrize("name", ["packed", "everything"])
def test_offloaded(name, made, calibration, tokenizer, tmp_path):
    """Where weights wait elsewhere between calls, the same tensors."""
    for way in ("here", "offloaded"):
        model = moe_compress.load(made(name), dtype=torch.float32)
        if way == "offloaded":
            model = cpu_offload(model, execution_device="cpu")
        result = moe_compress.compress(model, tokenizer=tokenizer, passes=[SKIP], calibration=calibration)
        result.save(tmp_path / way)
    with Checkpoint(tmp_path / "here") as one, Checkpoint(tmp_path / "offloaded") as two:
        assert all(torch.equal(one.get(name), two.get(name)) for name in one.tensors)


def test_verified_in_the_dtype_that_it_computes_in(made, calibration, tokenizer, tmp_path):
    """Not in that of the packed embeddings' scales, which are in bfloat16."""
    model = moe_compress.load(made("everything"), dtype=torch.float32)
    moe_compress.compress(model, tokenizer=tokenizer, passes=[SKIP], calibration=calibration).save(tmp_path / "out")
    assert read_json(tmp_path / "out" / "moe_compress.json")["probe"]["dtype"] == "float32"


def test_one_after_the_other(source, calibration, tokenizer, tmp_path):
    """Packed and then skipped in memory: the tensors of one call with both."""
    for way, calls in (("two calls", [[MADE["packed"]], [SKIP]]), ("one call", [[MADE["packed"], SKIP]])):
        model = moe_compress.load(source, dtype=torch.float32)
        for passes in calls:
            result = moe_compress.compress(model, tokenizer=tokenizer, passes=passes, calibration=calibration)
        result.save(tmp_path / way)
    with Checkpoint(tmp_path / "two calls") as two, Checkpoint(tmp_path / "one call") as one:
        assert two.tensors.keys() == one.tensors.keys()
        assert all(torch.equal(two.get(name), one.get(name)) for name in one.tensors)


@pytest.mark.parametrize("name", ["packed", "factored", "ragged", "scaled"])
@pytest.mark.parametrize("step", [{"prune.experts": {"experts": 4}}, MADE["packed"], MADE["scaled"]])
def test_what_changes_experts_is_refused_as_from_disk(name, step, made, calibration, tokenizer, tmp_path):
    recipe = {"model": str(made(name)), "output": str(tmp_path / "out"), "passes": [step], "calibration": calibration}
    with pytest.raises(MoeCompressError, match="can't change this model") as from_disk:
        moe_compress.run(recipe)
    model = moe_compress.load(made(name), dtype=torch.float32)
    with pytest.raises(MoeCompressError) as in_memory:
        moe_compress.compress(model, tokenizer=tokenizer, passes=[step], calibration=calibration)
    assert str(in_memory.value) == str(from_disk.value)


def test_what_others_quantized_is_refused(source):
    model = moe_compress.load(source)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UnsupportedModelError, match=r"quantized already \(bitsandbytes\)"):
        moe_compress.compress(model, passes=[SKIP])
