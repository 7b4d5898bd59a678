"""Healing experts: gradients and errors against plain loops, held-out error goes down, zeros stay, disk as memory."""

import copy

import pytest
import torch
from checkpoints import PRUNE, recipe, small_checkpoint, texts
from families import input_batch, tiny_model
from reference import experts_calls, joined, outputs_ETH
from running import digest
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.calib.batches import held_out
from moe_compress.errors import InputError
from moe_compress.heal.distil import Wanted, distil
from moe_compress.heal.experts import ExpertOptions
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.progress import Monitor

FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"]
SPARSE = {"prune.weights": {"criterion": "magnitude", "pattern": "2:4"}}
UNFITTED = {"prune.experts": PRUNE["prune.experts"] | {"refit": False}}  # what is refitted leaves little to heal here


def noisy(model, amount=0.5, seed=2):
    """A copy whose experts are noisy."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    view = MoEModel.wrap(changed)
    for layer in view.moe_layers:
        for _, value in FusedExperts(view.block(layer).experts_module).weights().matrices():
            value += amount * value.std() * torch.randn(value.shape, generator=generator)
    return changed


def wanted_of(original, model, layer, sequences=24):
    """What a layer's experts read in `model`, and what the original's put out on the same; tokens held out."""
    batch = input_batch(original, sequences, 16, 5)
    call = joined(experts_calls(model, [batch])[layer])
    module = MoEModel.wrap(original).block(layer).experts_module
    with torch.no_grad():
        target = module(call.hidden_TH, call.index_TK, call.weight_TK)
    counted = torch.ones(len(target), dtype=torch.float64)
    held = torch.arange(len(target)) % 5 == 0
    return Wanted(call.hidden_TH, call.index_TK, call.weight_TK, target, counted), held, call


def plain_error(module, call, target_TH, token_T):
    """Σ‖Σ_e g f_e − y‖² / Σ‖y‖², one expert and one token at a time, float64."""
    outputs = outputs_ETH(module, call.hidden_TH)
    found = torch.zeros_like(target_TH, dtype=torch.float64)
    for token, expert, gate in call.choices():
        found[token] += gate * outputs[expert, token]
    wrong, size = ((v[token_T]).square().sum() for v in (found - target_TH.double(), target_TH.double()))
    return float(wrong / size)


@pytest.mark.parametrize("memory_limit", [1 << 30, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_errors_by_hand_and_they_go_down(name, memory_limit):
    original = tiny_model(name)
    model = noisy(original)
    view = MoEModel.wrap(model)
    layer = view.moe_layers[0]
    module = view.block(layer).experts_module
    wanted, held, call = wanted_of(original, model, layer)
    before = plain_error(module, call, wanted.target_TH, held)
    others = {n: p.clone() for n, p in model.named_parameters() if "_proj" not in n or "experts" not in n}
    experts = FusedExperts(module)
    names = [n for n, _ in experts.weights().matrices()]
    dtypes = dict.fromkeys(names, torch.float32)
    options = ExpertOptions(epochs=4, rate=0.05, tokens_per_step=64)
    done = distil(experts, wanted, held, {}, dtypes, options, names, memory_limit)
    assert done.kept
    assert done.held[0] == pytest.approx(before, rel=1e-4)
    assert done.held[1] == pytest.approx(plain_error(module, call, wanted.target_TH, held), rel=1e-4)
    assert done.taught[1] == pytest.approx(plain_error(module, call, wanted.target_TH, ~held), rel=1e-4)
    assert done.held[1] < 0.8 * done.held[0]
    assert done.taught[1] < done.taught[0]
    assert max(done.moved_E) > 0
    for parameter, value in others.items():
        assert torch.equal(model.get_parameter(parameter), value), parameter


def test_one_step_of_the_gradient_by_autograd():
    """One step of AdamW is the sign of the gradient: that of the plain loss of the family's own module, in float64."""
    original = tiny_model("qwen3_moe")
    model = noisy(original)
    module = MoEModel.wrap(model).block(0).experts_module
    wanted, held, call = wanted_of(original, model, 0)
    own = copy.deepcopy(module).double()
    for parameter in own.parameters():
        parameter.requires_grad_(True)
    from moe_compress.model import hf

    with hf.implementation(own, "eager"):
        output = own(call.hidden_TH.double(), call.index_TK, call.weight_TK.double())
    (output - wanted.target_TH.double())[~held].square().sum().backward()
    before = module.down_proj.clone()
    size = float(before.square().mean().sqrt())
    options = ExpertOptions(epochs=1, rate=1e-3, tokens_per_step=10_000)
    distil(FusedExperts(module), wanted, held, {}, {"down": torch.float32}, options, ["down"])
    step = module.down_proj - before
    gradient = own.down_proj.grad
    clear = gradient.abs() > 1e-3 * gradient.abs().max()
    assert float((step.sign() == -gradient.sign())[clear].double().mean()) > 0.999
    assert step.abs().max() <= 1.01e-3 * size


def test_what_is_worse_is_not_kept():
    original = tiny_model("qwen3_moe")
    model = noisy(original, amount=0.01)
    module = MoEModel.wrap(model).block(0).experts_module
    before = {n: p.clone() for n, p in module.named_parameters()}
    wanted, held, _ = wanted_of(original, model, 0)
    options = ExpertOptions(epochs=2, rate=30.0)
    dtypes = dict.fromkeys(("gate", "up", "down"), torch.float32)
    done = distil(FusedExperts(module), wanted, held, {}, dtypes, options, ["gate", "up", "down"])
    assert not done.kept
    assert done.held[0] == done.held[1]
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("reads", ["own", "same"])
def test_whole_model_zeros_stay_and_it_gets_better(reads):
    original = tiny_model("qwen3_moe")
    ids = input_batch(original, 40, 16, 7)["input_ids"]
    held = input_batch(original, 16, 16, 11)["input_ids"]
    models = {}
    for name, passes in {
        "sparse": [SPARSE],
        "healed": [SPARSE, {"heal.experts": {"reads": reads, "rate": 0.05}}],
        "free": [SPARSE, {"heal.experts": {"reads": reads, "rate": 0.05, "keep_zeros": False}}],
    }.items():
        models[name] = copy.deepcopy(original)
        result = moe_compress.compress(
            models[name], passes=passes, calibration=ids, original=original, monitor=Monitor(show=False)
        )
        report = [layer["passes"][-1] for layer in result.report["layers"]]
        if name == "healed":
            assert all(r["kept"] and r["error_after"] < r["error_before"] for r in report)
            assert all(r["zeros_before"] == r["zeros_after"] == 0.5 for r in report)
        if name == "free":
            assert all(r["zeros_after"] < 0.1 for r in report)
    with torch.no_grad():
        logits = {n: m(input_ids=held).logits.double().log_softmax(-1) for n, m in {**models, "o": original}.items()}
    kl = {n: float((logits["o"].exp() * (logits["o"] - v)).sum(-1).mean()) for n, v in logits.items()}
    assert kl["healed"] < 0.95 * kl["sparse"]
    for (n, p), q in zip(models["sparse"].named_parameters(), models["healed"].parameters(), strict=True):
        if ".experts." in n:
            assert torch.equal(p == 0, q == 0)
        else:
            assert torch.equal(p, q)  # nothing else is trained


def test_own_and_same_ask_for_different_things():
    """In the first layer both read the same; where earlier layers have changed, "same" gives a smaller error."""
    original = tiny_model("qwen3_moe")
    ids = input_batch(original, 24, 16, 7)["input_ids"]
    errors = {}
    for reads in ("own", "same"):
        heal = {"heal.experts": {"reads": reads, "rate": 1e-9, "epochs": 1}}
        result = moe_compress.compress(
            copy.deepcopy(original),
            passes=[SPARSE, heal],
            calibration=ids,
            original=original,
            monitor=Monitor(show=False),
        )
        errors[reads] = [layer["passes"][-1]["error_before"] for layer in result.report["layers"]]
    assert errors["own"][0] == pytest.approx(errors["same"][0], rel=1e-5)
    assert all(s < o for o, s in zip(errors["own"][1:], errors["same"][1:], strict=True))


@pytest.mark.parametrize("passes", [[SPARSE], [UNFITTED]], ids=["sparse", "pruned"])
def test_from_disk_as_in_memory_and_again(passes, tmp_path):
    model, text = small_checkpoint(tmp_path / "model"), texts(tmp_path / "text")
    heal = {"heal.experts": {"epochs": 2, "held_out": 0.25}}
    finished = []
    for output in ("one", "two"):
        values = recipe(model, tmp_path / output, [*passes, heal], text)
        values["calibration"]["sequences"] = 6
        finished.append(moe_compress.run(values, monitor=Monitor(show=False)))
    files = [{n: d for n, d in digest(f.output).items() if n.endswith(".safetensors")} for f in finished]
    assert files[0] == files[1]
    entries = [layer["passes"][-1] for layer in finished[0].report["layers"]]
    assert all(e["error_after"] <= e["error_before"] for e in entries)
    assert any(e["kept"] for e in entries)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    result = moe_compress.compress(
        loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        passes=[*passes, heal],
        calibration=values["calibration"],
        original=model,
        monitor=Monitor(show=False),
    )
    own = [layer["passes"][-1] for layer in result.report["layers"]]
    for mine, theirs in zip(own, entries, strict=True):
        assert mine["error_before"] == pytest.approx(theirs["error_before"], rel=0.05)


def test_stopped_and_continued(tmp_path, monkeypatch):
    """Killed while the second layer is healed: the same bytes in the end."""
    from moe_compress.heal import experts as module

    model, text = small_checkpoint(tmp_path / "model"), texts(tmp_path / "text")
    heal = {"heal.experts": {"epochs": 1, "held_out": 0.25}}
    whole = moe_compress.run(recipe(model, tmp_path / "one", [PRUNE, heal], text), monitor=Monitor(show=False))
    real, calls = module.distil, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "distil", stop)
    values = recipe(model, tmp_path / "two", [PRUNE, heal], text)
    with pytest.raises(KeyboardInterrupt):
        moe_compress.run(values, monitor=Monitor(show=False))
    monkeypatch.setattr(module, "distil", real)
    done = moe_compress.run(values, monitor=Monitor(show=False))
    files = [{n: d for n, d in digest(f.output).items() if n.endswith(".safetensors")} for f in (whole, done)]
    assert files[0] == files[1]


def test_what_it_needs():
    model = tiny_model("qwen3_moe")
    ids = input_batch(model, 4, 8, 1)["input_ids"]
    with pytest.raises(InputError, match=r"heal.experts learns from the original.*pass `original=`"):
        moe_compress.compress(model, passes="heal.experts", calibration=ids)
    assert held_out(8, 0.25) == [0, 7]
    with pytest.raises(InputError, match="at least 2"):
        held_out(1, 0.5)
