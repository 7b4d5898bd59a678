"""Statistics against plain loops over tokens and slots, with the model's own experts in float64."""

import functools
import itertools
import json

import pytest
import torch
from families import input_batch
from places import DEMO
from reference import (
    KINDS,
    activations_ETI,
    assert_close,
    build,
    experts_calls,
    joined,
    measure,
    outputs_ETH,
    tokens_of,
)
from transformers import AutoConfig, AutoTokenizer

from moe_compress.calib.collect import MemoryStore, missing
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import Accumulator, OutputNorms, OutputSimilarity, Routing, Statistic
from moe_compress.checkpoint.workspace import DiskStatistics
from moe_compress.model import MoEModel, hf
from moe_compress.model.sweep import Sweep

SAMPLE = 10_000  # more than there are tokens
ALL = (Routing(), OutputNorms(), OutputSimilarity(sample=SAMPLE, chunk=5))
every_kind = pytest.mark.parametrize("name", [*KINDS, "demo"])


@functools.cache
def model_of(name):
    return build(name, DEMO / "moe-demo")


@functools.cache
def batches_of(name):
    """Batches of unequal shapes."""
    if name != "demo":
        return [input_batch(model_of(name), *shape) for shape in ((2, 12, 1), (1, 7, 2), (3, 5, 3))]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "moe-demo")
    texts = [json.loads(line)["text"] for line in (DEMO / "text" / "text_novels.jsonl").open()][:3]
    ids = tokenizer(texts, return_tensors="pt", truncation=True, max_length=10)["input_ids"]
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]


@functools.cache
def reference(name):
    """Layer → (joined call, outputs [E, T, H], activations [E, T, I])."""
    model = model_of(name)
    view = MoEModel.wrap(model)
    found = {}
    for layer, calls in experts_calls(model, batches_of(name)).items():
        call, module = joined(calls), view.block(layer).experts_module
        found[layer] = (call, outputs_ETH(module, call.hidden_TH), activations_ETI(module, call.hidden_TH))
    return found


@functools.cache
def measured(name):
    return measure(MoEModel.wrap(model_of(name)), batches_of(name), ALL)


@every_kind
def test_routing(name):
    for layer, (call, outputs, _) in reference(name).items():
        found = measured(name).of(layer, Routing())
        counts, gate, squared = (torch.zeros(len(outputs), dtype=torch.float64) for _ in range(3))
        for _, expert, weight in call.choices():
            counts[expert] += 1
            gate[expert] += weight
            squared[expert] += weight**2
        assert int(found["tokens"]) == len(call.hidden_TH) == tokens_of(batches_of(name))
        assert torch.equal(found["counts"], counts)
        assert_close(found["gate"], gate, 1e-7)
        assert_close(found["gate_squared"], squared, 1e-7)


@every_kind
def test_output_norms(name):
    for layer, (call, outputs, _) in reference(name).items():
        found = measured(name).of(layer, OutputNorms())
        norm, gated, squared, maximum = (torch.zeros(len(outputs), dtype=torch.float64) for _ in range(4))
        for token, expert, weight in call.choices():
            size = float(outputs[expert, token].square().sum().sqrt())
            norm[expert] += size
            gated[expert] += weight * size
            squared[expert] += weight**2 * size**2
            maximum[expert] = max(maximum[expert], outputs[expert, token].abs().max())
        assert_close(found["norm"], norm)
        assert_close(found["gated_norm"], gated)
        assert_close(found["gated_norm_squared"], squared)
        assert_close(found["maximum"], maximum)


def mean_cosine(outputs, tokens):
    total = 0
    for token in tokens:
        unit = torch.stack([out / (out @ out).sqrt() for out in outputs[:, token]])
        total = total + unit @ unit.T
    return total / len(tokens)


@every_kind
def test_output_similarity_on_all_tokens(name):
    for layer, (_, outputs, _) in reference(name).items():
        found = measured(name).of(layer, ALL[2])
        similarity = found["similarity"]
        assert int(found["tokens"]) == outputs.shape[1]
        torch.testing.assert_close(similarity, similarity.T, rtol=0, atol=1e-7)
        torch.testing.assert_close(
            similarity.diagonal(), torch.ones(len(outputs), dtype=torch.float64), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(similarity, mean_cosine(outputs, range(outputs.shape[1])), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sample", [1, 7, 23, 45, 46])
def test_output_similarity_on_a_sample(sample):
    """Evenly spread over all batches, however long each is."""
    name = "deepseek_v3"
    settings = OutputSimilarity(sample=sample, chunk=4)
    profile = measure(MoEModel.wrap(model_of(name)), batches_of(name), [settings])
    total = tokens_of(batches_of(name))
    assert total == 46
    taken = [t for t in range(total) if (t + 1) * sample // total > t * sample // total]
    assert len(taken) == sample
    gaps = {b - a for a, b in itertools.pairwise(taken)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    for layer, (_, outputs, _) in reference(name).items():
        found = profile.of(layer, settings)
        assert int(found["tokens"]) == sample
        torch.testing.assert_close(found["similarity"], mean_cosine(outputs, taken), rtol=0, atol=1e-5)


def test_experts_that_saw_no_token():
    """They count nothing, their sums are zero and finite; their similarity is measured all the same."""
    unseen = 0
    for name in KINDS:
        for layer in reference(name):
            counts = measured(name).of(layer, Routing())["counts"]
            idle = (counts == 0).nonzero().flatten()
            unseen += len(idle)
            for tensor in measured(name).of(layer, OutputNorms()).values():
                assert tensor.isfinite().all()
                assert (tensor[idle] == 0).all()
            assert (measured(name).of(layer, ALL[2])["similarity"][idle] != 0).all()
    assert unseen > 0


def test_the_class_for_no_expert_is_not_an_expert():
    """Zaya hands it on as expert 0 with weight 0: expert 0 must not count these tokens."""
    skipped = 0
    for layer, (call, _, _) in reference("zaya").items():
        none = call.weight_TK == 0
        skipped += int(none.sum())
        assert (call.index_TK[none] == 0).all()
        real = int(((call.index_TK == 0) & ~none).sum())
        assert float(measured("zaya").of(layer, Routing())["counts"][0]) == real
    assert skipped > 0


# Moments per chunk of experts


def moments(call, outputs, activations):
    """Rows of each expert, Σ x xᵀ of what gate and up read, Σ a aᵀ of what down reads."""
    hidden = call.hidden_TH.double()
    inputs, inner = (
        torch.zeros(len(outputs), size, size, dtype=torch.float64) for size in (hidden.shape[1], activations.shape[2])
    )
    counts = torch.zeros(len(outputs), dtype=torch.float64)
    for token, expert, _ in call.choices():
        counts[expert] += 1
        inputs[expert] += torch.outer(hidden[token], hidden[token])
        inner[expert] += torch.outer(activations[expert, token], activations[expert, token])
    return counts, inputs, inner


@every_kind
def test_moments_of_what_a_block_read(name):
    """In chunks of one expert, of a few, of all; zeros for experts that no token visits."""
    view = MoEModel.wrap(model_of(name))
    with Sweep(view, batches_of(name)) as sweep:
        for step in sweep:
            block = step.layer.block
            if block is None:
                continue
            inputs = BlockInputs()
            step.run(inputs.observe)
            call = reference(name)[step.index][0]
            assert inputs.tokens == len(call.hidden_TH)
            assert torch.equal(inputs.index_TK, call.index_TK)
            assert_close(inputs.hidden_TH, call.hidden_TH, 1e-4)
            assert_close(inputs.weight_TK, call.weight_TK, 1e-4)
            counts, inward, inner = moments(*reference(name)[step.index])
            for memory_limit in (1, 60_000, 1 << 30):
                seen, chunks = [], 0
                for part in inputs.moments(block.experts, memory_limit):
                    chosen = list(part.experts)
                    seen += chosen
                    chunks += 1
                    assert torch.equal(part.rows_C, counts[chosen])
                    assert_close(part.input_CHH, inward[chosen])
                    assert_close(part.activation_CII, inner[chosen])
                assert seen == list(range(block.num_experts))
                assert chunks == {1: block.num_experts, 1 << 30: 1}.get(memory_limit, chunks)


# The same whatever the way


def test_independent_of_the_split_into_batches():
    for name in ("gpt_oss", "zaya", "nemotron_h"):
        model = model_of(name)
        ids = input_batch(model, batch=6, length=8)["input_ids"]
        settings = (*ALL[:2], OutputSimilarity(sample=17))
        profiles = [
            measure(MoEModel.wrap(model), [{"input_ids": part} for part in ids.split(size)], settings)
            for size in (6, 2, 1)
        ]
        for layer in profiles[0].shape.layers:
            for statistic in settings:
                whole = profiles[0].of(layer, statistic)
                for other in profiles[1:]:
                    for key, tensor in other.of(layer, statistic).items():
                        if key in ("counts", "tokens"):
                            assert torch.equal(tensor, whole[key])
                        else:
                            assert_close(tensor, whole[key], 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_from_disk_equals_in_memory(name, tmp_path):
    """Bit for bit: the same layers on the same inputs. Through a store in files, read back."""
    folder = tmp_path / "model"
    model_of(name).save_pretrained(folder)
    loaded = hf.model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    expected = measure(MoEModel.wrap(loaded), batches_of(name), ALL)
    disk = MoEModel.open(folder)
    found = measure(disk, batches_of(name), ALL, DiskStatistics(tmp_path / "statistics"))
    assert disk.moe_layers == list(reference(name))
    assert found.shape.layers == expected.shape.layers
    for layer in disk.moe_layers:
        for statistic in ALL:
            wanted, got = expected.of(layer, statistic), found.of(layer, statistic)
            assert set(got) == set(wanted)
            for key, tensor in got.items():
                assert tensor.dtype == wanted[key].dtype
                assert torch.equal(tensor, wanted[key]), (layer, statistic.key, key)


def test_demo_from_disk(demo_model):
    found = measure(MoEModel.open(demo_model), batches_of("demo"), ALL[:2])
    for layer in reference("demo"):
        for statistic in ALL[:2]:
            for key, tensor in found.of(layer, statistic).items():
                assert_close(tensor, measured("demo").of(layer, statistic)[key], 1e-6)


# Collecting


class Counting(Statistic):
    """Counts how often it is started and how many tokens each start sees."""

    name = "counting"
    started: list[int] = []  # noqa: RUF012

    def start(self, block, tokens):
        self.started.append(block.layer)
        assert tokens == 46

        class Tokens(Accumulator):
            seen = 0

            def update(self, tap):
                self.seen += len(tap.hidden_TH)

            def result(self):
                return {"seen": torch.tensor(self.seen)}

        return Tokens()


def test_collect_measures_what_the_store_lacks_and_nothing_twice():
    view = MoEModel.wrap(model_of("deepseek_v3"))
    batches = batches_of("deepseek_v3")
    store, statistic = MemoryStore(), Counting()
    Counting.started.clear()
    assert missing(view, [statistic, Routing()], store) == [statistic, Routing()]
    store.put(view.moe_layers[1], statistic.key, {"seen": torch.tensor(-1)})
    measure(view, batches, [statistic, Counting(), Routing()], store)  # equal keys are one statistic
    assert Counting.started == view.moe_layers[:1] + view.moe_layers[2:]
    assert [int(store.get(i, statistic.key)["seen"]) for i in view.moe_layers] == [46, -1][: len(view.moe_layers)]
    before = dict(store.results)
    measure(view, batches, [statistic, Routing()], store)
    assert Counting.started == view.moe_layers[:1] + view.moe_layers[2:]
    assert all(store.results[key] is value for key, value in before.items())
    assert set(store.results) == set(before)
    assert missing(view, [statistic, Routing()], store) == []
    assert missing(view, [OutputNorms()], store) == [OutputNorms()]


def test_keys_tell_settings_apart():
    settings = [Routing(), OutputNorms(), OutputSimilarity(), OutputSimilarity(sample=5), OutputSimilarity(chunk=5)]
    assert len({s.key for s in settings}) == len(settings)
    assert OutputSimilarity(sample=5).key == OutputSimilarity(sample=5).key
    assert Routing().key == "routing"


def test_what_was_not_collected_is_an_error():
    with pytest.raises(KeyError, match="not collected for layer 0"):
        measured("deepseek_v3").of(0, Routing())  # a dense layer
