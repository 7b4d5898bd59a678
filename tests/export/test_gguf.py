"""GGUF results: read by the `gguf` package, by this package, and by llama.cpp where it is installed."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ggufs import CORE, EXACT, FAMILIES, checkpoint, recipe
from places import DEMO
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import moe_compress
from moe_compress import probe
from moe_compress.checkpoint.gguf_file import read_gguf
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import BudgetError, CheckpointError, RecipeError, VerificationError
from moe_compress.export.gguf_architectures import Tensors, find_architecture
from moe_compress.export.gguf_layout import layout
from moe_compress.export.verify import verify
from moe_compress.pipeline import plan_run
from moe_compress.quant.gguf_blocks import TYPES, dequantize
from moe_compress.recipe import make_recipe

DENSE = {"embeddings": ["Q6_K"], "output": ["Q6_K"], "attention": ["Q5_0"], "shared_experts": ["Q8_0"]}


@pytest.fixture(scope="module")
def calibration() -> Path:
    return DEMO / "calibration.jsonl"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> tuple[Path, Path, dict[str, Any]]:
    """(model with rows of 256, its result at 3.6 bits, report)."""
    folder = tmp_path_factory.mktemp("wide")
    changes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2, "num_experts": 4}
    model = checkpoint(folder / "model", "qwen3_moe", **changes)
    options = {"bits": 3.6, "types": ["Q2_K", "Q3_K", "Q4_K", "IQ4_XS", "Q6_K", "IQ4_NL"], "dense": DENSE}
    report = moe_compress.run(recipe(model, folder / "out", options, calibration)).report
    return model, folder / "out", report


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors) by the package's reader."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_the_package_reads_what_was_written(wide):
    _, output, report = wide
    metadata, tensors = contents(output)
    assert metadata["general.architecture"] == "qwen3moe"
    assert metadata["qwen3moe.expert_count"] == 4
    assert metadata["qwen3moe.expert_used_count"] == 2
    assert metadata["qwen3moe.expert_feed_forward_length"] == 256
    assert metadata["qwen3moe.attention.key_length"] == 32
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert len(metadata["tokenizer.ggml.tokens"]) == 4096
    manifest = json.loads((output / "moe_compress.json").read_text())
    assert {n: e["type"] for n, e in manifest["tensors"].items()} == {n: t.tensor_type.name for n, t in tensors.items()}
    assert sum(int(t.n_bytes) for t in tensors.values()) == report["after"]["bytes"]
    for layer in (0, 1):
        chosen = report["layers"][layer]["passes"][0]["types"]
        for projection, name in chosen.items():
            stored = tensors[f"blk.{layer}.ffn_{projection}_exps.weight"]
            assert stored.tensor_type.name == name
            assert stored.shape.tolist() == [256, 256, 4]  # fastest dimension first
        assert tensors[f"blk.{layer}.ffn_gate_inp.weight"].tensor_type.name == "F32"
        assert tensors[f"blk.{layer}.attn_q.weight"].tensor_type.name == "Q5_0"
    assert tensors["token_embd.weight"].tensor_type.name == "Q6_K"


def test_the_loaded_model_has_the_weights_that_the_package_dequantizes(wide):
    model, output, _ = wide
    _, tensors = contents(output)
    loaded = moe_compress.load(output)
    experts = loaded.model.layers[1].mlp.experts.weights()
    for projection in ("gate", "up", "down"):
        stored = tensors[f"blk.1.ffn_{projection}_exps.weight"]
        expected = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(4, 256, 256)
        np.testing.assert_array_equal(getattr(experts, projection).numpy(), expected)
        with Checkpoint(model) as source:
            name = f"model.layers.1.mlp.experts.2.{projection}_proj.weight"
            original = source.get(name).float()
        error = float((torch.from_numpy(expected[2]) - original).norm() / original.norm())
        assert error < 0.35
    embedding = tensors["token_embd.weight"]
    expected = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    np.testing.assert_array_equal(loaded.model.embed_tokens.weight.detach().numpy(), expected)


def test_types_follow_the_budget(wide):
    _, output, report = wide
    summary = report["passes"][0]["summary"]
    assert summary["expert_bytes"] <= summary["budget_bytes"]
    assert report["after"]["bits_per_weight"] <= 3.6
    assert len([n for n in summary["projections_per_type"].values() if n]) > 1
    _, tensors = contents(output)
    stored = sum(int(t.n_bytes) for n, t in tensors.items() if "_exps" in n)
    assert stored == summary["expert_bytes"]


def test_a_changed_byte_is_found(wide, tmp_path):
    _, output, _ = wide
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in output.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert verify(folder).distance < 1e-4
    _, entries = read_gguf(folder / "model.gguf")
    place = next(e for e in entries if e.name == "blk.1.ffn_up_exps.weight")
    data = bytearray((folder / "model.gguf").read_bytes())
    data[place.offset + 7] ^= 1
    (folder / "model.gguf").write_bytes(data)
    with pytest.raises(VerificationError, match=r"model.gguf was changed"):
        verify(folder)
    (folder / "model.gguf").write_bytes(data[:-4000])
    with pytest.raises(VerificationError, match=r"model.gguf"):
        verify(folder)


def test_the_own_reader_finds_what_the_packages_finds_and_says_when_a_file_is_cut(wide, tmp_path):
    _, output, _ = wide
    metadata, tensors = contents(output)
    own, entries = read_gguf(output / "model.gguf")
    assert {key: value for key, value in metadata.items() if not key.startswith("GGUF.")} == own
    assert {e.name: (e.type, e.offset, e.nbytes, list(e.shape[::-1])) for e in entries} == {
        n: (t.tensor_type.name, t.data_offset, t.n_bytes, t.shape.tolist()) for n, t in tensors.items()
    }
    data = (output / "model.gguf").read_bytes()
    for length in (0, 3, 20, 100, 5_000, 60_000, entries[0].offset - 40, len(data) - 1_000):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_of_every_architecture_comes_back(family, tmp_path):
    """In F32 nothing is lost: the read model has the source's logits, so names, splits and joins belong together."""
    source = checkpoint(tmp_path / "model", family)
    report = moe_compress.run(recipe(source, tmp_path / "out", EXACT)).report
    assert report["verification"]["distance"] < 1e-4
    ids = torch.tensor([[5, 60, 700, 1234, 9, 77, 300, 2048]])
    original = moe_compress.load(source, dtype=torch.float32)
    result = moe_compress.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(result(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    metadata, tensors = contents(tmp_path / "out")
    assert all(t.tensor_type.name == "F32" for t in tensors.values())
    assert metadata[f"{metadata['general.architecture']}.expert_count"] == 8


def test_queries_and_keys_of_llama_are_stored_in_pairs():
    """Turning neighbours of the stored rows is turning halves of the source's (rope of GPT-NeoX against GPT-J)."""
    config = {**CORE, "model_type": "mixtral", "rms_norm_eps": 1e-6, "rope_parameters": {}}
    tensors = Tensors(find_architecture(config), config)
    torch.manual_seed(0)
    weight, x = torch.randn(64, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    stored = tensors.split("model.layers.0.self_attn.q_proj.weight", weight)["blk.0.attn_q.weight"]
    angle = torch.arange(8, dtype=torch.float64) * 0.37 + 0.1
    first, second = (weight @ x).view(4, 2, 8).unbind(1)
    halves = torch.stack([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], 1)
    even, odd = (stored @ x).view(4, 8, 2).unbind(2)
    pairs = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], 2)
    torch.testing.assert_close(pairs.permute(0, 2, 1), halves)


def test_latent_attention_is_split_as_it_is_absorbed():
    """q · (W_k c) = (W_kᵀ q) · c with the stored k_b, and v = v_b c."""
    config = {**CORE, **FAMILIES["deepseek_v3"][1], "model_type": "deepseek_v3", "num_hidden_layers": 2}
    tensors = Tensors(find_architecture(config), config)
    torch.manual_seed(0)
    weight, latent, query = (torch.randn(*s, dtype=torch.float64) for s in ((4 * 64, 32), (32,), (4, 32)))
    parts = tensors.split("model.layers.1.self_attn.kv_b_proj.weight", weight)
    assert {n: tuple(t.shape) for n, t in parts.items()} == tensors.shapes(
        "model.layers.1.self_attn.kv_b_proj.weight", (256, 32)
    )
    keys, values = (weight @ latent).view(4, 64).split([32, 32], dim=1)
    absorbed = torch.einsum("acn,an->ac", parts["blk.1.attn_k_b.weight"], query)
    torch.testing.assert_close(absorbed @ latent, (query * keys).sum(-1))
    torch.testing.assert_close(parts["blk.1.attn_v_b.weight"] @ latent, values)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in sorted(FAMILIES)),
    ("qwen3_moe", {"rope_parameters": YARN}),
    ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
    ("deepseek_v3", {"n_group": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_llama_cpp_computes_the_same(family, changes, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    source = checkpoint(tmp_path / "model", family, **changes)
    moe_compress.run(recipe(source, tmp_path / "out", EXACT))
    kept = json.loads((tmp_path / "out" / "moe_compress.json").read_text())["probe"]
    file = str(tmp_path / "out" / "model.gguf")
    model = llama_cpp.Llama(file, n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    model.eval(kept["input_ids"])
    logits = torch.tensor(np.array(model.scores[: len(kept["input_ids"])]))
    assert probe.distance(kept, logits) < 1e-3
    ours = AutoTokenizer.from_pretrained(source)
    for line in (DEMO / "calibration.jsonl").read_text().splitlines()[:20]:
        text = json.loads(line)["text"][:400]
        assert model.tokenize(text.encode(), add_bos=False) == ours(text)["input_ids"]


def test_pruned_models_are_written_with_their_own_number_of_experts(tmp_path, calibration):
    model = checkpoint(tmp_path / "model", "deepseek_v3", n_group=1)
    values = recipe(model, tmp_path / "out", {"bits": 9.0, "types": ["Q8_0", "Q4_0"]}, calibration)
    values["passes"].insert(0, {"prune.experts": {"experts": 6, "criterion": "frequency"}})
    report = moe_compress.run(values).report
    metadata, tensors = contents(tmp_path / "out")
    assert metadata["deepseek2.expert_count"] == 6
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [64, 64, 6]
    assert tensors["blk.1.ffn_gate_inp.weight"].shape.tolist() == [64, 6]
    assert tensors["blk.1.exp_probs_b.bias"].shape.tolist() == [6]
    assert report["after"]["bytes"] == sum(int(t.n_bytes) for t in tensors.values())


def test_of_a_draft_layer_one_line_says_that_it_is_left_out(tmp_path, calibration):
    model = checkpoint(tmp_path / "model", "deepseek_v3")
    tensors = load_file(model / "model.safetensors")
    drafted = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    save_file(tensors | drafted, model / "model.safetensors", {"format": "pt"})
    report = moe_compress.run(recipe(model, tmp_path / "out", {"bits": 9, "types": ["Q8_0"]}, calibration)).report
    (note,) = [note for note in report["passes"][0]["notes"] if "not in the file" in note]
    assert note.startswith("model.layers.2.")
    assert note.endswith(f" and {len(drafted) - 1} more are not in the file: a draft layer behind the model's own")
    manifest = json.loads((tmp_path / "out" / "moe_compress.json").read_text())
    assert manifest["left_out"].keys() == drafted.keys()


@pytest.mark.parametrize(
    ("family", "key"),
    [("qwen3_moe", "qwen3moe.expert_feed_forward_length"), ("mixtral", "llama.feed_forward_length")],
)
def test_narrower_experts_are_written_with_their_own_width(family, key, tmp_path, calibration):
    model = checkpoint(tmp_path / "model", family)
    values = recipe(model, tmp_path / "out", {"bits": 9.0, "types": ["Q8_0"]}, calibration)
    values["passes"].insert(0, {"prune.neurons": {"neurons": 32, "refit": False}})
    moe_compress.run(values)
    metadata, tensors = contents(tmp_path / "out")
    assert metadata[key] == 32  # llama.cpp allocates by it
    assert tensors["blk.1.ffn_gate_exps.weight"].shape.tolist() == [64, 32, 8]
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [32, 64, 8]


def test_the_same_recipe_gives_the_same_bytes(tmp_path, calibration):
    model = checkpoint(tmp_path / "model", "qwen2_moe")
    options = {"bits": 5.0, "types": ["Q4_0", "IQ4_NL", "Q5_0", "Q8_0"]}
    for name in ("one", "two"):
        moe_compress.run(recipe(model, tmp_path / name, options, calibration))
    one, two = ((tmp_path / name / "model.gguf").read_bytes() for name in ("one", "two"))
    assert one == two


# --- what is refused before any work ---------------------------------------------------------------------------------


def planned(model: Path, options: dict[str, Any], **more: Any) -> Any:
    return plan_run(make_recipe({**recipe(model, model.parent / "nothing", options), **more}))


def test_sizes_are_known_before_any_work(tmp_path):
    model = checkpoint(tmp_path / "model", "mixtral")
    _, forecast = planned(model, EXACT)
    with Checkpoint(model) as source:
        assert forecast.after.total_bytes == source.nbytes  # everything is float32 in the source too
    text = {"calibration": {"sources": [str(DEMO / "calibration.jsonl")], "length": 32}}
    _, forecast = planned(model, {"size": "1 MB", "types": ["Q4_0", "Q8_0"]}, **text)
    assert forecast.after.total_bytes <= 1_000_000
    with pytest.raises(BudgetError, match="in the smallest of Q8_0 that fit their rows they take"):
        planned(model, {"size": "700 kB", "types": ["Q8_0"], "importance": False})


def test_rows_that_no_type_fits_are_refused(tmp_path):
    model = checkpoint(tmp_path / "model", "qwen3_moe")
    with pytest.raises(RecipeError, match=r"rows of the gate .* have 64 weights, which are not whole blocks of Q4_K"):
        planned(model, {"bits": 5, "types": ["Q4_K"], "importance": False})
    with pytest.raises(RecipeError, match=r"rows of token_embd.weight have 64 .* add BF16 to dense.embeddings"):
        planned(model, {"bits": 9, "types": ["Q8_0"], "importance": False, "dense": {"embeddings": "Q6_K"}})


def test_models_that_llama_cpp_would_misread_are_refused(tmp_path):
    base = {**CORE, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default"}}
    for changes, reason in (
        ({"model_type": "glm4_moe"}, "no GGUF is written for model type 'glm4_moe', only for deepseek_v2"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "llama.cpp takes True for granted"),
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, "llama.cpp takes False for granted"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [0]}, "some of its layers are dense"),
        ({"model_type": "mixtral", "sliding_window": 64}, "a sliding window of 64"),
        ({"model_type": "mixtral", "rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"model_type": "olmoe", "num_key_value_heads": 4, "clip_qkv": 8.0}, "it clips queries"),
        (
            {**FAMILIES["deepseek_v2"][1], "model_type": "deepseek_v2", "q_lora_rank": None},
            "2 layers without q_lora_rank",
        ),
    ):
        with pytest.raises(RecipeError, match=reason):
            find_architecture({**base, **changes})
    config = {**base, "model_type": "mixtral"}
    with pytest.raises(RecipeError, match=r"has no bias 'model.layers.0.mlp.gate.bias'"):
        layout(config, {"model.layers.0.mlp.gate.bias": (8,)}, {})
    with pytest.raises(RecipeError, match=r"has no place for 'model.layers.0.mlp.extra.weight'"):
        layout(config, {"model.layers.0.mlp.extra.weight": (8, 8)}, {})


def test_other_targets_and_other_passes_are_refused(tmp_path):
    model = checkpoint(tmp_path / "model", "qwen3_moe")
    with pytest.raises(RecipeError, match=r"set `target: llama.cpp`"):
        planned(model, EXACT, target="native")
    with pytest.raises(RecipeError, match=r"take quantize.gguf"):
        planned(model, EXACT, passes=[{"quantize.mixed": {"bits": 4.5, "method": "rtn"}}])
    with pytest.raises(RecipeError, match=r"let `quantize.gguf` be the last pass"):
        planned(model, EXACT, passes=[{"prune.experts": {"experts": 6}}], calibration={"sources": ["x"]})
    with pytest.raises(RecipeError, match=r"'Q4_X' is not one that is written here; did you mean"):
        planned(model, {"bits": 4, "types": ["Q4_X"]})
    with pytest.raises(RecipeError, match="'atention' is no part of a model"):
        planned(model, {"bits": 4, "dense": {"atention": "Q8_0"}})


# --- cost ------------------------------------------------------------------------------------------------------------


def test_costs_of_types_are_the_layers_own_errors(tmp_path, calibration):
    """Against one forward of the experts' class with that projection replaced, and no sampling."""
    from moe_compress.calib.collect import MemoryStore, collect
    from moe_compress.model import FusedExperts, MoEModel
    from moe_compress.model.sweep import Sweep
    from moe_compress.progress import Progress
    from moe_compress.quant.gguf_cost import BlockTypeError
    from moe_compress.quant.gguf_quantize import quantize

    model = MoEModel.open(checkpoint(tmp_path / "model", "qwen3_moe"))
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 4096, (2, 24))} for _ in range(2)]
    statistic = BlockTypeError(("Q4_0", "Q4_K", "IQ4_NL"), weighted=False, sample=0)
    store, taps = MemoryStore(), []
    with Sweep(model, batches) as sweep:
        collect(sweep, [statistic], store, Progress())
    with Sweep(model, batches) as sweep:
        for step in sweep:
            step.advance(taps.append if step.index == 1 else None)
            if step.index == 1:
                weights = FusedExperts(step.layer.block.experts_module).weights().map(torch.clone)
    found = store.get(1, statistic.key)["squared"]
    assert torch.equal(found[:, 1], torch.full((3,), -1.0, dtype=torch.float64))  # rows of 64 are no blocks of 256
    for b, name in ((0, "Q4_0"), (2, "IQ4_NL")):
        for p, projection in enumerate(("gate", "up", "down")):
            total = 0.0
            kind = TYPES[name]
            for tap in taps:
                for token in range(len(tap.hidden_TH)):
                    for expert, gate in zip(tap.index_TK[token].tolist(), tap.weight_TK[token].tolist(), strict=True):
                        one = {n: m[expert].double() for n, m in weights.matrices()}
                        x = tap.hidden_TH[token].double()

                        def output(w: dict[str, torch.Tensor], x: torch.Tensor = x) -> torch.Tensor:
                            return w["down"] @ (torch.nn.functional.silu(w["gate"] @ x) * (w["up"] @ x))

                        rounded = dequantize(quantize(one[projection].float(), kind), kind).double()
                        change = output(one) - output({**one, projection: rounded})
                        total += gate**2 * float(change.square().sum())
            assert math.isclose(float(found[p, b]), total, rel_tol=1e-3)
