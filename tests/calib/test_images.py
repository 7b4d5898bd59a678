"""Images in calibration: what the model reads, what each modality's tokens count, and what stays as it is."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from families import input_batch, tiny_model
from PIL import Image
from pydantic import ValidationError
from reference import activations_ETI, experts_calls, measure
from safetensors.torch import load_file
from seeing import picture, pictures, png, seeing_checkpoint
from transformers import AutoTokenizer, Qwen3VLMoeForConditionalGeneration

import moe_compress
from moe_compress.calib.batches import MODALITY, TOKEN_WEIGHT
from moe_compress.calib.images import find_processor
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.outputs import OutputGram, OutputMoments, TokenContribution
from moe_compress.calib.statistics import ChosenLogits, OutputNorms, Routing
from moe_compress.calib.text import Calibration, load_batches
from moe_compress.errors import DataError, InputError
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.sweep import Sweep
from moe_compress.prune.diep import MixtureMoments
from moe_compress.quant.cost import QuantizationError
from moe_compress.quant.gguf_cost import BlockTypeError
from moe_compress.quant.gram import GramError
from moe_compress.quant.importance import channel_squares

IMAGE = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return seeing_checkpoint(tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures") / "p")


@pytest.fixture(scope="module")
def processor(checkpoint):
    return find_processor(checkpoint)


def settings(files, **more):
    sources = [{"path": str(files / "rows.jsonl"), "image_field": "image"}, {"path": str(files / "text.jsonl")}]
    return {"sources": sources, "sequences": 12, "length": 48, "batch_size": 4, "shuffle": False, **more}


@pytest.fixture(scope="module")
def read(files, processor):
    def call(**more):
        return load_batches(Calibration(**settings(files, **more)), processor.tokenizer, "/", processor=processor)

    return call


def test_samples_are_what_the_processor_makes(read, processor, files):
    got = read()
    assert got.ids.shape == (6, 48)
    assert len(got.samples) == 6
    for i, sample in enumerate(got.samples):
        with (files / "img" / f"{i}.png").open("rb") as file:
            prompt = f"u:<|vision_start|><|image_pad|><|vision_end|>what is number {i}? "
            expected = processor(text=[prompt], images=[Image.open(file).convert("RGB")], return_tensors="pt")
        assert next(iter(sample)) == "input_ids"
        assert set(sample) == {*expected, MODALITY} - {"attention_mask"}
        assert all(torch.equal(sample[name], expected[name]) for name in sample if name != MODALITY)
        tokens = 3 * (2 + i % 3)
        assert int((sample["input_ids"] == IMAGE).sum()) == tokens
        assert torch.equal(sample[MODALITY], (sample["input_ids"] == IMAGE).long())
    assert got.tokens == got.report["tokens_used"] == 6 * 48 + sum(s["input_ids"].numel() for s in got.samples)
    per_modality = got.report["tokens_per_modality"]
    assert per_modality == {"text": got.tokens - 54, "image": 54}
    assert read().digest == got.digest != read(length=47).digest
    assert got.report["images"]["image_processor"].startswith("Qwen2VLImageProcessor")


def test_several_images_messages_and_rows_without_any(read):
    got = read(sequences=14, sources=settings_of(read, "rows.jsonl"), allow_fewer=True)
    assert [int((s["input_ids"] == IMAGE).sum()) for s in got.samples] == [6, 9, 12, 6, 9, 12, 15, 4]
    assert [len(s["image_grid_thw"]) for s in got.samples] == [1] * 6 + [2, 1]
    assert got.report["skipped"] == {"no image": 1}
    assert got.ids.shape == (0, 48)


def settings_of(read, name):
    files = read.__closure__[0].cell_contents
    return [{"path": str(files / name), "image_field": "image"}]


def test_cut_behind_the_images_and_never_in_them(read):
    got = read(sequences=9, sources=settings_of(read, "rows.jsonl"), allow_fewer=True, length=14)
    # "u:", start, image tokens, end: 6 and 9 fit in 14 tokens, and 4; 12 and 15 don't.
    assert [int((s["input_ids"] == IMAGE).sum()) for s in got.samples] == [6, 9, 6, 9, 4]
    assert all(
        s["input_ids"].shape == s["mm_token_type_ids"].shape == s[MODALITY].shape == (1, 14) for s in got.samples
    )
    assert got.report["skipped"] == {"no image": 1, "images longer than a sequence": 3}


def test_images_in_parquet_and_relative_to_the_file(processor, tmp_path):
    image = picture(24, 16, 3)
    (tmp_path / "deep").mkdir()
    image.save(tmp_path / "deep" / "a.png")
    rows = [{"bytes": png(image), "path": None}, {"bytes": None, "path": "a.png"}]
    table = pyarrow.table({"text": ["as bytes", "as a path"], "image": rows, "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "deep" / "rows.parquet")
    source = [{"path": "deep", "image_field": "image"}]
    wanted = Calibration(sources=source, sequences=2, length=40, shuffle=False)
    first, second = load_batches(wanted, processor.tokenizer, tmp_path, processor=processor).samples
    assert torch.equal(first["pixel_values"], second["pixel_values"])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "a", "image": "gone.png"}, "rows.jsonl:1: image can't be opened"),
        ({"text": "a", "image": 7}, "rows.jsonl:1: an image is a path"),
        ({"text": "a", "image": "data:image/png;base64,§§"}, "isn't base64"),
        ({"text": "a", "picture": "x"}, "no field 'image'"),
        ({"text": "<|image_pad|><|image_pad|>", "image": "one.png"}, "rows.jsonl:1: the processor refuses it"),
    ],
)
def test_images_that_cannot_be_used(row, complaint, processor, tmp_path):
    picture(16, 16, 0).save(tmp_path / "one.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    wanted = Calibration(sources=[{"path": "rows.jsonl", "image_field": "image"}], sequences=1, length=40)
    with pytest.raises(DataError, match=complaint):
        load_batches(wanted, processor.tokenizer, tmp_path, processor=processor)


def test_no_processor(read, files, processor, demo):
    with pytest.raises(InputError, match="need the checkpoint's processor"):
        load_batches(Calibration(**settings(files)), processor.tokenizer, "/")
    with pytest.raises(
        InputError, match=r"moe-demo has no processor .* `image_field` needs it: transformers has no processor"
    ):
        find_processor(demo / "moe-demo")


def test_a_streamed_forward_equals_the_loaded_model(checkpoint, read):
    """Image features, their positions and what the tower adds to the first layers arrive as in the model itself."""
    batches = read().forwards(4)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint).eval()
    with Sweep(MoEModel.open(checkpoint), batches) as sweep:
        for step in sweep:
            step.advance()
        for (_, logits), batch in zip(sweep.outputs(), batches, strict=True):
            with torch.no_grad():
                expected = model(**{k: v for k, v in batch.items() if k != MODALITY}).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def observed(view, batches):
    found = {}
    with Sweep(view, batches) as sweep:
        for step in sweep:
            if step.layer.block is not None:
                found[step.index] = BlockInputs()
                step.run(found[step.index].observe)
    return found


@pytest.mark.parametrize("weights", [{"text": 1.0, "image": 0.3}, {"image": 0.0}, {"text": 0.0, "image": 2.0}, "auto"])
def test_hessians_count_tokens_by_modality(checkpoint, read, weights):
    got = read(modality_weights=weights)
    tokens = got.modalities()
    resolved = got.report["modality_weights"]
    if weights == "auto":  # both count alike, and as much as all did before
        assert resolved["text"] * tokens["text"] == pytest.approx(resolved["image"] * tokens["image"])
        assert sum(resolved[m] * tokens[m] for m in tokens) == pytest.approx(got.tokens)
    else:
        assert resolved == {"text": 1.0, "image": 1.0} | weights
    assert got.digest != read().digest
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint).eval()
    view, batches = MoEModel.wrap(model), got.forwards(4)
    plain = [{k: v for k, v in batch.items() if k not in (MODALITY, TOKEN_WEIGHT)} for batch in batches]
    for layer, calls in experts_calls(model, plain).items():
        experts = view.block(layer).experts_module
        inward, outward, rows = (
            torch.zeros(8, 32, 32).double(),
            torch.zeros(8, 16, 16).double(),
            torch.zeros(8).double(),
        )
        for call, batch in zip(calls, batches, strict=True):
            activations = activations_ETI(experts, call.hidden_TH)
            ids = batch["input_ids"].flatten()
            for token, expert, _ in call.choices():
                counted = resolved["image" if ids[token] == IMAGE else "text"]
                x, a = call.hidden_TH[token].double(), activations[expert, token]
                inward[expert] += counted * torch.outer(x, x)
                outward[expert] += counted * torch.outer(a, a)
                rows[expert] += counted
        inputs = observed(view, batches)[layer]
        moments = list(inputs.moments(FusedExperts(experts), 20_000))
        assert len(moments) > 1  # in chunks
        for name, expected in (("rows_C", rows), ("input_CHH", inward), ("activation_CII", outward)):
            found = torch.cat([getattr(part, name) for part in moments]).double()
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        if weights == {"image": 0.0}:  # exactly what the text alone gives
            keep = torch.cat([b["input_ids"].flatten() != IMAGE for b in batches])
            alone = BlockInputs()
            alone._parts = [(inputs.hidden_TH[keep], inputs.index_TK[keep], inputs.weight_TK[keep])]
            joined = [
                torch.cat([m.input_CHH for m in ms]) for ms in (moments, list(alone.moments(FusedExperts(experts))))
            ]
            torch.testing.assert_close(joined[0], joined[1], rtol=1e-5, atol=1e-5)


def test_row_weights_multiply(checkpoint, read):
    """A solver's own weight of a row comes on top of its token's."""
    model = MoEModel.wrap(Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint).eval())
    layer, inputs = next(iter(observed(model, read(modality_weights={"image": 0.3}).forwards(4)).items()))
    experts = FusedExperts(model.block(layer).experts_module)
    (found,) = inputs.moments(experts, row_weight=lambda dispatch: dispatch.weight_R)
    expected, rows = torch.zeros(8, 32, 32).double(), torch.zeros(8).double()
    for token in range(inputs.tokens):
        for expert, gate in zip(inputs.index_TK[token].tolist(), inputs.weight_TK[token].double(), strict=True):
            x = inputs.hidden_TH[token].double()
            expected[expert] += gate * inputs.token_weight_T[token] * torch.outer(x, x)
            rows[expert] += gate * inputs.token_weight_T[token]
    torch.testing.assert_close(found.input_CHH.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.rows_C, rows, rtol=1e-6, atol=1e-6)


def test_importances_count_tokens_as_they_weigh():
    """Means are of the tokens that weigh anything; an expert's few rows are joined by the mean of the same."""
    view = MoEModel.wrap(tiny_model("qwen3_moe"))
    block = view.block(view.moe_layers[0])
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(60, block.experts.hidden_size, generator=generator)
    weight_TK, index_TK = torch.rand(60, block.num_experts, generator=generator).topk(2)
    counts_T = torch.rand(60, generator=generator, dtype=torch.float64).mul(4).floor()
    inputs = BlockInputs()
    inputs._parts.append((hidden_TH, index_TK, weight_TK))
    inputs._counted, inputs._weighed = [counts_T], True
    found = channel_squares(inputs, block.experts)
    repeated = BlockInputs()  # a token that weighs 3 is three of it
    repeated._parts.append(tuple(v.repeat_interleave(counts_T.long(), 0) for v in (hidden_TH, index_TK, weight_TK)))
    expected = channel_squares(repeated, block.experts)
    torch.testing.assert_close(found.rows_E, expected.rows_E)
    for projection in ("up", "down"):
        torch.testing.assert_close(found.importance(projection), expected.importance(projection))


ADDITIVE = [
    Routing(),
    ChosenLogits(),
    OutputNorms(),
    MixtureMoments(),
    OutputGram(),
    OutputMoments(),
    TokenContribution(),
    QuantizationError(bits=(2, 4), group_size=8),
    GramError(bits=(2, 4), group_size=8),
    BlockTypeError(types=("F16", "BF16"), weighted=False, sample=0),
]


@pytest.mark.parametrize("statistic", ADDITIVE, ids=lambda s: s.name)
def test_statistics_that_weigh_tokens(statistic):
    """A sum over tokens that weigh c in one batch and d in another is c times the one's sum and d times the other's."""
    assert statistic.weighs_tokens
    model = tiny_model("qwen3_moe")
    first, second = input_batch(model, 2, 9, 1), input_batch(model, 1, 14, 2)
    view = MoEModel.wrap(model)

    def of(*batches):
        return measure(view, batches, [statistic]).of(view.moe_layers[-1], statistic)

    weigh = [{**b, TOKEN_WEIGHT: torch.full(b["input_ids"].shape, w)} for b, w in ((first, 0.25), (second, 3.0))]
    found, one, two = of(*weigh), of(first), of(second)
    for name, value in found.items():
        a, b = one[name].double(), two[name].double()
        if (statistic.name, name) == ("quantization_error", "error"):  # √ of a sequence's squared errors
            expected = 0.5 * a + 3**0.5 * b
        else:
            expected = torch.maximum(a, b) if name == "maximum" else 0.25 * a + 3 * b
        assert (value.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    zero = of({**first, TOKEN_WEIGHT: torch.zeros(2, 9)}, second)
    for name, value in zero.items():
        assert (value - two[name]).abs().max() <= 1e-5 * two[name].abs().max()


def test_a_run_leaves_the_tower_alone_and_quantizes_by_modality(checkpoint, files, tmp_path):
    quantize = {"quantize.mixed": {"bits": 4.5, "group_size": 16, "widths": [2, 4], "protect_super_experts": False}}
    source = load_file(checkpoint / "model.safetensors")
    results = {}
    for name, weights in (("plain", None), ("text", {"image": 0.0}), ("auto", "auto")):
        done = moe_compress.run(
            {
                "model": str(checkpoint),
                "output": str(tmp_path / name),
                "passes": [quantize],
                "calibration": settings(files, modality_weights=weights),
            }
        )
        parts = [load_file(file) for file in sorted((tmp_path / name).glob("*.safetensors"))]
        results[name] = {key: value for part in parts for key, value in part.items()}
        report = done.report
        assert report["calibration"]["tokens_per_modality"]["image"] == 54
        assert ("modality_weights" in report["calibration"]) == (weights is not None)
        kept = [key for key in source if ".mlp.experts." not in key]
        assert any(".visual." in key for key in kept)
        for key in kept:
            assert results[name][key].dtype == source[key].dtype, key
            assert results[name][key].numpy().tobytes() == source[key].numpy().tobytes(), key
        for file in ("preprocessor_config.json", "tokenizer.json"):
            assert (tmp_path / name / file).read_bytes() == (checkpoint / file).read_bytes()
        loaded = moe_compress.load(tmp_path / name)
        with torch.no_grad():
            sample = dict(load_sample(files, checkpoint))
            assert torch.isfinite(loaded(**sample).logits).all()
    assert not alike(results["plain"], results["text"])
    assert not alike(results["plain"], results["auto"])


def test_weights_of_modalities_reach_attention(checkpoint, files, tmp_path):
    """What GPTQ makes of the first layer's queries, which read the same whatever else is quantized."""
    options = {"bits": 4, "group_size": 16, "allocation": "uniform", "include": ["experts", "attention"]}
    codes = []
    for name, weights in (("plain", None), ("text", {"image": 0.0})):
        recipe = {"model": str(checkpoint), "output": str(tmp_path / name), "passes": [{"quantize.mixed": options}]}
        report = moe_compress.run({**recipe, "calibration": settings(files, modality_weights=weights)}).report
        assert not any("unweighed" in matrix for matrix in report["beside"])
        (file,) = (tmp_path / name).glob("*.safetensors")
        codes.append({n: t for n, t in load_file(file).items() if "layers.0.self_attn.q_proj" in n and "codes" in n})
    assert codes[0].keys() == codes[1].keys() != set()
    assert not alike(*codes)


def alike(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def load_sample(files, checkpoint):
    processor = find_processor(checkpoint)
    got = load_batches(Calibration(**settings(files)), processor.tokenizer, "/", processor=processor)
    return {k: v for k, v in got.samples[0].items() if k != MODALITY}


def test_the_same_in_memory(checkpoint, files, processor):
    def quantized(given):
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint).eval()
        passes = [{"prune.experts": {"experts": 6}}]
        return moe_compress.compress(model, passes=passes, tokenizer=given, calibration=settings(files))

    result = quantized(processor)
    assert result.report["calibration"]["tokens_per_modality"]["image"] == 54
    assert result.model.config.text_config.num_experts == 6
    with pytest.raises(InputError, match="need the checkpoint's processor"):
        quantized(AutoTokenizer.from_pretrained(checkpoint))


def test_settings_that_are_refused():
    for wrong in ({"smell": 1.0}, {"image": -1}, "equal"):
        with pytest.raises(ValidationError):
            Calibration(sources="x", modality_weights=wrong)
