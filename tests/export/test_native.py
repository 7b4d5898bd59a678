"""The native format: what its document says, byte for byte, and what loads it."""

import copy
import functools
import hashlib
import json

import pytest
import torch
from families import discover, input_batch
from loading import experts_of, from_pretrained
from native_reader import STORED, Native, read_tensors
from packs import Packed, put, three_quarters
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.export.verify import verify
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel
from moe_compress.progress import Progress

# Packed layers and a dense one, gate or none, biases, a norm inside the experts; see tests/quant/test_packed.py.
NAMES = sorted({"qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark", "deepseek_v3"} & set(discover()))


@torch.no_grad()
def logits(model):
    return model(**input_batch(model)).logits


@pytest.fixture(scope="module")
def expected(native):
    """Family → logits of the source with the packed values written into its dense experts."""

    @functools.cache
    def compute(name):
        source, _, values = native(name)
        model = from_pretrained(source)
        view = MoEModel.wrap(model)
        for layer in view.moe_layers:
            block = view.block(layer)
            if len(values[layer]["up"]) < block.num_experts:
                block.keep(three_quarters(block))
            put(block, values[layer])
        return logits(model)

    return compute


# ---- What the document says ----


@pytest.mark.parametrize("name", NAMES)
def test_read_by_the_document_alone(name, native):
    """Every packed matrix, decoded by tests/native_reader.py, is exactly what was packed and what the model uses."""
    _, folder, values = native(name)
    file = Native(folder)
    modules = experts_of(from_pretrained(folder))
    assert len(file.packed_layers()) == len(modules) == len(values) > 1
    encodings = set()
    for layer in file.packed_layers():
        path = file.prefix(layer).removesuffix(".")
        used = dict(modules[path].weights().items())
        read = file.weights(layer)
        assert used.keys() == read.keys()
        for key, array in read.items():
            assert torch.equal(torch.from_numpy(array), used[key].float())
            if key in values[int(layer)]:
                assert torch.equal(torch.from_numpy(array), values[int(layer)][key])
        encodings |= set(file.quantization["blocks"][layer]["layout"]["encodings"])
        rest = {n for n in file.tensors if n.startswith(path + ".")} - file.used
        assert rest == ({path + ".post_expert_norm.weight"} if name == "muse_spark" else set())
    assert {e[1] for e in encodings - {"dense"}} == set("12345678")
    assert "dense" in encodings
    assert any(e.endswith("z") for e in encodings)


@pytest.mark.parametrize("name", NAMES)
def test_everything_else_is_the_source(name, native):
    """Names, dtypes and bytes of what isn't packed; config.json but for two keys; the manifest's digests."""
    source, folder, _ = native(name)
    file, before = Native(folder), read_tensors(source)
    for layer in file.packed_layers():
        file.weights(layer)
    rest = {n: t for n, t in file.tensors.items() if n not in file.used}
    fewer = {n for n, t in rest.items() if t[1] != before[n][1]}  # router rows of the layer that lost an expert
    assert fewer
    assert all(rest[n] == before[n] for n in rest.keys() - fewer)
    assert all(rest[n][0] == before[n][0] for n in fewer)
    assert all(".experts." in n for n in before.keys() - rest.keys())
    config = json.loads((source / "config.json").read_text())
    assert file.config.pop("experts_implementation") == "moe_compress"
    assert {k: v for k, v in file.config.items() if k != "quantization_config"} == config
    assert set(file.quantization) == {"quant_method", "format_version", "stack", "axes", "blocks"}
    manifest = json.loads((folder / "moe_compress.json").read_text())["tensors"]
    assert manifest.keys() == file.tensors.keys()
    for key, (dtype, shape, raw) in file.tensors.items():
        entry = manifest[key]
        assert entry["sha256"] == hashlib.sha256(raw).hexdigest()
        assert (STORED.get(entry["dtype"], "I32" if entry["dtype"] == "int32" else "?"), entry["shape"]) == (
            dtype,
            shape,
        )
        assert (entry["bytes"], entry["file"]) == (len(raw), "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_axes_say_what_counts_experts(name, native):
    """Shapes of routers and dense experts follow from `axes` and `num_experts` alone."""
    _, folder, _ = native(name)
    file = Native(folder)
    for layer, block in file.quantization["blocks"].items():
        axes = file.quantization["axes"][block["axes"]]["tensors"]
        checked = 0
        for tensor, (dimension, more) in axes.items():
            for stored in [n for n in file.tensors if n.endswith(f"layers.{layer}.{tensor}")]:
                assert file.tensors[stored][1][dimension] == block["num_experts"] + more
                checked += 1
        assert checked


# ---- Who loads it ----


@pytest.mark.parametrize("name", NAMES)
def test_loaded_equals_dense_values(name, native, expected):
    _, folder, _ = native(name)
    loaded = from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), expected(name), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(moe_compress.load(folder, dtype=torch.float32)), logits(loaded))
    assert verify(folder).distance <= verify(folder).tolerance


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_the_file_is(name, native):
    """Loaded in the dtype of the file, parameters and buffers take the file's bytes, and share no larger storage."""
    _, folder, _ = native(name)
    stored = read_tensors(folder)
    loaded = from_pretrained(folder, dtype=torch.bfloat16)
    state = {id(t): t for t in loaded.state_dict(keep_vars=True).values()}.values()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
    wider = sum(2 * t.numel() for t in state if t.dtype == torch.float32)  # the file has none
    assert sum(held.values()) == sum(len(t[2]) for t in stored.values()) + wider
    assert wider < 0.02 * sum(held.values())  # a few vectors that a family keeps in float32
    for dtype in (torch.float32, torch.float16):
        for path, module in experts_of(from_pretrained(folder, dtype=dtype)).items():
            size = sum(t.untyped_storage().nbytes() for n, t in module.state_dict().items() if "norm" not in n)
            assert size == sum(len(t[2]) for n, t in stored.items() if n.startswith(path + ".") and "norm" not in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_dtypes(dtype, native, expected):
    """Weights compute in the dtype asked for; what is stored of packed experts stays as it is."""
    _, folder, _ = native("gpt_oss")
    stored = read_tensors(folder)
    for option in ("dtype", "torch_dtype"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **{option: dtype})
        assert loaded.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
        for path, module in experts_of(loaded).items():
            for name, tensor in module.state_dict().items():
                assert STORED.get(str(tensor.dtype)[6:], "I32") == stored[f"{path}.{name}"][0]
        output = logits(loaded)
        assert output.dtype == loaded.dtype
        distance = (output.float() - expected("gpt_oss")).norm() / expected("gpt_oss").norm()
        assert distance < (1e-4 if dtype == torch.float32 else 0.1)


def test_casting_a_loaded_model(native):
    """`.to(dtype)` gives what loading in that dtype gives; `.half()` and `.float()` are refused by transformers."""
    _, folder, _ = native("gpt_oss")
    wide, narrow = from_pretrained(folder), from_pretrained(folder, dtype=torch.bfloat16)
    exact = logits(wide)
    cast = copy.deepcopy(wide).to(torch.bfloat16)
    for name, buffer in narrow.named_buffers():  # the rotary frequencies, which loading keeps in float32
        path, _, leaf = name.rpartition(".")
        cast.get_submodule(path)._buffers[leaf] = buffer
    assert torch.equal(logits(cast), logits(narrow))
    back = from_pretrained(folder).to(torch.float16).to(torch.float32)
    for path, module in experts_of(back).items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, wide.get_submodule(path).state_dict()[name])
    for cast in (wide.half, wide.float):
        with pytest.raises(ValueError, match="not supported for quantized"):
            cast()
    assert torch.equal(logits(wide), exact)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_device_maps(name, native, tmp_path):
    """On one device, or with layers left on the disk by accelerate: the same numbers."""
    _, folder, _ = native(name)
    exact = logits(from_pretrained(folder))
    assert torch.equal(logits(from_pretrained(folder, device_map="cpu")), exact)
    assert torch.equal(logits(from_pretrained(folder, device_map="auto")), exact)
    some = sum(len(raw) for _, _, raw in read_tensors(folder).values())  # stored in 2 bytes, most is held in 4
    spread = from_pretrained(
        folder, device_map="auto", max_memory={"cpu": some}, offload_folder=str(tmp_path / "offloaded")
    )
    where = set(spread.hf_device_map.values())
    assert "disk" in where
    assert any(p.is_meta for m in experts_of(spread).values() for p in m.parameters())
    assert torch.equal(logits(spread), exact)
    assert torch.equal(logits(spread), exact)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again(name, native, tmp_path):
    """`save_pretrained` of a loaded model writes the same tensors and description; they load to the same logits."""
    _, folder, _ = native(name)
    loaded = from_pretrained(folder, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(loaded))
    one, two = Native(folder), Native(tmp_path / "again")
    assert two.quantization == one.quantization
    assert two.config["experts_implementation"] == one.config["experts_implementation"]
    for layer in one.packed_layers():
        one.weights(layer)
    assert {n: two.tensors[n] for n in one.used} == {n: one.tensors[n] for n in one.used}
    # In another dtype the packed tensors are the same still.
    from_pretrained(folder).save_pretrained(tmp_path / "wide")
    wide = Native(tmp_path / "wide")
    assert {n: wide.tensors[n] for n in one.used} == {n: one.tensors[n] for n in one.used}
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "wide")), logits(from_pretrained(folder)))


def test_copies(native, tmp_path):
    """deepcopy, pickle, state_dict: the same logits, nothing shared."""
    _, folder, _ = native("gpt_oss")
    loaded = from_pretrained(folder)
    output = logits(loaded)
    torch.save(loaded, tmp_path / "model.pt")
    fresh = from_pretrained(folder)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    assert not torch.equal(logits(fresh), output)
    assert not any(fresh.load_state_dict(loaded.state_dict()))
    copies = [copy.deepcopy(loaded), torch.load(tmp_path / "model.pt", weights_only=False), fresh]
    for parameter in loaded.parameters():
        parameter.data.zero_()
    for one in copies:
        assert torch.equal(logits(one), output)
    copies[0].save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), output)


def test_generate(native, expected):
    """Greedy, with the key-value cache: the tokens that full forwards choose."""
    _, folder, _ = native("qwen3_moe")
    loaded = from_pretrained(folder)
    ids = input_batch(loaded)["input_ids"]
    found = loaded.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for _ in range(5):
        with torch.no_grad():
            scores = loaded(input_ids=ids).logits[:, -1]
        scores[:, loaded.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_generate_alone_and_in_a_padded_batch(demo_model, tmp_path):
    """The demo's checkpoint, packed at 2 to 4 bits: a text goes on as with the same weights dense, alone or beside
    longer ones, with the key-value cache or without."""
    model = MoEModel.open(demo_model)
    model.overlay = Packed(model, lambda projection, expert: ((2, 3, 4)[expert % 3], 64, projection != "down"))
    write_folder(model, tmp_path / "native", {}, Progress())
    loaded, dense = from_pretrained(tmp_path / "native"), from_pretrained(demo_model)
    view = MoEModel.wrap(dense)
    for layer in view.moe_layers:
        put(view.block(layer), model.overlay.values[layer])
    tokenizer = AutoTokenizer.from_pretrained(demo_model, padding_side="left")
    texts = ["The river", "She opened the door and", "def add(a, b):\n    return"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert not batch["attention_mask"].all()

    def new_tokens(model, batch, **options):
        asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return model.generate(ids, attention_mask=mask, **asked)[:, ids.shape[1] :]

    together = new_tokens(loaded, batch)
    assert together.shape == (3, 8)
    assert torch.equal(together, new_tokens(dense, batch))
    assert torch.equal(together, new_tokens(loaded, batch, use_cache=False))
    assert torch.equal(together, new_tokens(moe_compress.load(tmp_path / "native", dtype=torch.float32), batch))
    for text, tokens in zip(texts, together, strict=True):
        assert torch.equal(new_tokens(loaded, tokenizer(text, return_tensors="pt"))[0], tokens)


def test_base_model_without_head(native):
    """AutoModel loads the decoder alone, whose modules lack the prefix."""
    _, folder, _ = native("qwen3_moe")
    whole, base = from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = input_batch(whole)["input_ids"]
    with torch.no_grad():
        assert torch.equal(whole.lm_head(base(ids).last_hidden_state), whole(ids).logits)
    assert len(experts_of(base)) == len(experts_of(whole))
