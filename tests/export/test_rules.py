"""Each rule of the exporter, broken on purpose: the file must not appear, and the message names the rule.

Rules that a description can break are broken in the description; those about what is written, in what is written.
"""

import copy
import re

import pytest
import torch
from checkpoints import small_checkpoint
from packs import layout, pack_block

from moe_compress.errors import RunError
from moe_compress.export import gptq_format, rules, served
from moe_compress.export.compressed_tensors import layer_scheme, layer_tensors, quantization_config
from moe_compress.export.matching import WrittenLayer
from moe_compress.export.schemes import SCALED, Scheme
from moe_compress.export.targets import TARGETS
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel
from moe_compress.model.expert_names import ExpertNames
from moe_compress.progress import Progress
from moe_compress.quant.scheme import QuantizeScheme, SchemeOptions
from moe_compress.quant.stack import Encoding

CT = "compressed-tensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("rules") / "model", hidden_size=128, moe_intermediate_size=128)


class Chosen:
    """An overlay: each layer by what is named for it: (bits, group size, symmetric), a function of projection and
    expert that gives one, a scheme of `quantize.scheme`, or None for a layer that stays dense."""

    def __init__(self, folder, layers, keep=None):
        model = MoEModel.open(folder)
        self.states = {}
        for index, choice in zip(model.moe_layers, layers, strict=True):
            if choice is None:
                continue
            with model.layer(index, stored=True) as live:
                if keep is not None and index in keep:
                    live.block.keep(keep[index])
                if isinstance(choice, str):
                    step = QuantizeScheme(SchemeOptions(scheme=choice), TARGETS["native"])
                    step.apply(live.block, {"scheme": step.scheme.to_json()}, None)
                else:
                    pack_block(live.block, choice if callable(choice) else lambda *_, c=choice: c)
                tensors, description = live.block.state()
                stored = model.stored_dtypes(index)
                self.states[index] = {n: t.to(stored.get(n, t.dtype)).clone() for n, t in tensors.items()}, description

    def get(self, layer):
        return self.states.get(layer)


def write(folder, output, layers, form=CT, target=None, change=None, keep=None):
    model = MoEModel.open(folder)
    model.overlay = Chosen(folder, layers, keep)
    if change is not None:
        change(model, model.overlay.states)
    goal = None if target is None else TARGETS[target]
    return write_folder(model, output, {}, Progress(), quantized=form, target=goal)


W4, W8, W3 = (4, 32, True), (8, 32, True), (3, 32, True)


def assert_breaks(number, name, message=""):
    rule = next(r for r in rules.RULES if r.number == number)
    assert rule.name == name
    return pytest.raises(RunError, match=f"{message}.*{re.escape(f'[export rule {number}: {name}]')}")


ONE, WHOLE, NAMES, ROUTING, COMPLETE, PACKING, KERNELS, FORMAT = ((r.number, r.name) for r in rules.RULES)


def test_rules_are_numbered_from_one():
    assert [r.number for r in rules.RULES] == list(range(1, 9))
    assert len({r.name for r in rules.RULES}) == 8


@pytest.mark.parametrize(
    ("layers", "rule", "message"),
    [
        ([lambda _, e: W4 if e != 5 else (2, 32, True), W4, W4], ONE, r"layer 0: experts differ .*b2g32, b4g32"),
        ([W4, lambda p, _: W4 if p != "down" else W8, W4], ONE, r"layer 1: experts differ .*b4g32, b8g32"),
        ([W4, lambda _, e: W4 if e else (0, -1, True), W4], ONE, r"b4g32, dense"),
        ([(4, 32, False), W4, W4], WHOLE, r"layer 0: 'b4g32z' has zero points"),
        ([W4, W4, (4, -1, True)], PACKING, r"layer 2: 'b4row' has a scale per row"),
        ([(3, -1, True), W4, W4], PACKING, r"layer 0: 'b3row' has a scale per row"),
        ([(1, 32, True), W4, W4], PACKING, r"'b1g32' has a width of 1 bits"),
    ],
)
def test_descriptions_that_servers_would_misread(source, tmp_path, layers, rule, message):
    with assert_breaks(*rule, message):
        write(source, tmp_path / "out", layers)
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (layout(Encoding(4, 32), in_features=48), "blocks of 1×32 don't tile a matrix of 32×48"),
        (layout(Encoding(3, 20), in_features=20), "20 codes of 3 bits aren't whole 32-bit words"),
        (layout(Encoding(4, 32), biases=["up_bias"]), "biases"),
        ({**layout(out_features=64), "scheme": Scheme.served("fp8-block").to_json()}, "blocks of 128×128 don't tile"),
        ({**layout(), "scheme": Scheme.served("w4a8", 128).to_json()}, "blocks of 1×128 don't tile"),
    ],
)
def test_sizes_that_do_not_divide(described, message):
    with assert_breaks(*WHOLE, message):
        layer_scheme(0, described)


@pytest.mark.parametrize("what", ["shape", "dtype", "missing"])
def test_an_expert_that_isnt_like_expert_0(what):
    """What vLLM would narrow its buffer for and copy without a word."""
    experts = [{"weight": torch.zeros(4, 8), "weight_scale": torch.ones(4, 1)} for _ in range(3)]
    rules.check_alike(0, {"up": experts, "down": experts})
    odd = copy.deepcopy(experts)
    if what == "missing":
        del odd[2]["weight_scale"]
    else:
        odd[2]["weight"] = torch.zeros(4, 4) if what == "shape" else torch.zeros(4, 8).half()
    with assert_breaks(*ONE, "layer 0, down: expert 2 holds"):
        rules.check_alike(0, {"up": experts, "down": odd})
    with assert_breaks(*ONE, "different numbers of experts"):
        rules.check_alike(0, {"up": experts, "down": experts[:2]})


# --- names -----------------------------------------------------------------------------------------------------------

EXPERTS = ExpertNames("model.layers.0.mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})


@pytest.mark.parametrize("form", [quantization_config, gptq_format.quantization_config])
def test_modules_that_would_be_read_otherwise(form):
    layer = WrittenLayer(Scheme(4, 32), EXPERTS, 2)
    form({0: layer}, ["lm_head", "model.layers.0.mlp.gate", "mtp.layers.0.mlp.experts.0.up_proj"])
    with assert_breaks(
        *NAMES, "'model.layers.0.mlp.experts.0.up_proj' (would be read with another|is dense, and nothing)"
    ):
        form({0: layer}, [EXPERTS.linear(0, "up")])
    with assert_breaks(*NAMES, "doesn't name decoder layer 7"):
        form({7: layer}, [])


def test_two_stacks_that_no_pattern_tells_apart():
    """Experts of a second tower under names that the first one's target matches too."""
    again = ExpertNames("vision.layers.0.1.layers.1.mlp.experts", EXPERTS.leaves)
    layers = {0: WrittenLayer(Scheme(4, 32), EXPERTS, 2), 1: WrittenLayer(Scheme(8, 32), again, 2)}
    with assert_breaks(*NAMES, "would be read with another scheme"):
        quantization_config(layers, [])


# --- routers, counts, completeness -----------------------------------------------------------------------------------


def test_unequal_layers(source, tmp_path):
    with assert_breaks(*ROUTING, r"different numbers of experts \(\[6, 8\]\)"):
        write(source, tmp_path / "out", [W4, W4, W4], keep={1: [0, 1, 2, 3, 4, 5]})


def test_a_config_with_another_number(source, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_compress.export.write.with_count", lambda config, *_: config)  # forgotten
    with assert_breaks(*ROUTING, r"layers have \[6\] experts, the config says \[8\]"):
        write(source, tmp_path / "out", [W4, W4, W4], keep={i: [0, 1, 2, 3, 4, 5] for i in range(3)})


def test_a_count_that_routing_cannot_work_with(source, tmp_path):
    def fewer(_, states):
        for _, description in states.values():
            description["num_experts"] = 1

    with assert_breaks(*ROUTING, "layer 0 "):
        write(source, tmp_path / "out", [W4, W4, W4], change=fewer)


def test_a_router_in_another_dtype(source, tmp_path):
    def rounded(_, states):
        states[1][0]["mlp.gate.weight"] = states[1][0]["mlp.gate.weight"].float()

    with assert_breaks(*ROUTING, r"'model\.layers\.1\.mlp\.gate\.weight' is torch\.bfloat16 .* as torch\.float32"):
        write(source, tmp_path / "out", [W4, W4, W4], change=rounded)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_lost(source, tmp_path):
    def forget(_, states):
        del states[2][0]["mlp.gate.weight"]

    with assert_breaks(
        *COMPLETE, r"'model\.layers\.2\.mlp\.gate\.weight' is in the source and wasn't written \(1 such"
    ):
        write(source, tmp_path / "out", [W4, W4, W4], change=forget)
    assert not (tmp_path / "out").exists()
    assert write(source, tmp_path / "out", [W4, W4, W4]) == CT


def test_removed_experts_are_not_lost(source, tmp_path):
    keep = {i: [0, 1, 2, 3, 4, 7] for i in range(3)}
    for number, layers in enumerate(([W4, W4, W4], ["fp8", W4, "w8a8"])):
        assert write(source, tmp_path / str(number), layers, keep=keep) == CT


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "form", "layers", "rule", "message"),
    [
        ("sglang", CT, [W4, W3, W4], KERNELS, r"'sglang' loads \[4, 8\] bits, not 3"),
        ("sglang", CT, ["fp8", "w8a8", "fp8"], KERNELS, "'sglang' has no kernel for w8a8"),
        ("sglang", CT, [W4, "fp8", W4], FORMAT, "SGLang reads packed experts only where all groups are packed"),
        ("gptq", "gptq", [W4, W3, W4], KERNELS, "GPTQ readers load 4 or 8 bits for experts, not 3"),
        ("gptq", "gptq", [W4, "fp8", W4], KERNELS, "the format has no place for fp8 experts"),
        ("gptq", "gptq", [W4, (4, 64, True), W4], FORMAT, r"groups of \[32, 64\] weights, and a GPTQ file has one"),
        ("gptq", "gptq", [W4, (4, -1, True), W4], PACKING, "a scale per row"),
        ("gptq", "gptq", [(4, 32, False), W4, W4], WHOLE, "zero points"),
    ],
)
def test_what_a_target_would_load_wrongly(source, tmp_path, target, form, layers, rule, message):
    with assert_breaks(*rule, message):
        write(source, tmp_path / "out", layers, form, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "form", "layers"),
    [
        ("vllm", CT, [W4, "fp8", "w8a8"]),
        ("vllm", CT, [W3, "fp8-block", None]),
        ("sglang", CT, ["fp8", "fp8-block", None]),
        ("sglang", CT, [W4, W8, None]),
        ("gptq", "gptq", [W4, W8, None]),
    ],
)
def test_mixtures_that_it_loads_are_written_and_read_back(source, tmp_path, target, form, layers):
    assert write(source, tmp_path / "out", layers, form, target) == form
    model = MoEModel.open(tmp_path / "out")
    kinds = [model.block(i).kind for i in model.moe_layers]
    assert kinds == ["fused" if c is None else "scaled" if isinstance(c, str) else "packed" for c in layers]
    overlay = Chosen(source, layers)
    for index in model.moe_layers:
        with model.layer(index, stored=True) as live:
            own = overlay.get(index)
            if own is None:
                continue
            for name, tensor in live.block.state()[0].items():
                assert torch.equal(tensor.float(), own[0][name].float()), name


def test_a_format_that_isnt_the_groups():
    config = quantization_config({0: WrittenLayer(Scheme(4, 32), EXPERTS, 2)}, [])
    rules.check_format(config, "sglang")
    with assert_breaks(*FORMAT, "the config's format is 'mixed-precision', its groups make it 'pack-quantized'"):
        rules.check_format({**config, "format": "mixed-precision"}, None)
    two = WrittenLayer(Scheme.served("fp8"), ExpertNames("model.layers.1.mlp.experts", EXPERTS.leaves), 2)
    mixed = quantization_config({0: WrittenLayer(Scheme(4, 32), EXPERTS, 2), 1: two}, [], "vllm")
    assert mixed["format"] == "mixed-precision"
    assert [g["format"] for g in mixed["config_groups"].values()] == ["pack-quantized", "float-quantized"]


def test_every_scheme_has_a_target_and_every_target_known_schemes():
    for name in SCALED:
        assert [t for t in TARGETS.values() if name in t.schemes and t.quantized_format in served.SERVED]
    assert all(set(t.schemes) <= set(SCALED) for t in TARGETS.values())


def test_scales_out_of_range():
    codes, scale = torch.zeros(2, 32, 8, dtype=torch.int32), torch.full((2, 32, 2), 1e6).bfloat16()
    stack = {f"{p}_proj.b4g32.{n}": t for p in ("up", "down") for n, t in (("codes", codes), ("scale", scale))}
    described = layout(Encoding(4, 32), Encoding(4, 32))
    names = ExpertNames("model.layers.0.mlp.experts", {"up": "up_proj", "down": "down_proj"})
    with pytest.raises(RunError, match=r"layer 0: a scale of up is out of the range of torch\.float16"):
        layer_tensors(0, stack, described, names, torch.float16)
