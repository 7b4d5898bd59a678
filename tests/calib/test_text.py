"""Packing, chat and windows: against a plain reference, and every refusal."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moe_compress.calib import reading, sequences
from moe_compress.calib.text import Calibration, TextSource, TokenBatches, load_batches, load_windows
from moe_compress.errors import DataError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
TEXTS = ["One.", "The second document is longer.", "Three " * 40, "Cuatro: año, niño, ¿qué?", "five\n\nfive", "6 6 6"]


@pytest.fixture(scope="session")
def with_bos() -> Any:
    """The demo's tokenizer, putting BOS (id 0) before a text as Llama's does, with EOS 1 and a chat template."""
    inner = Tokenizer.from_file(str(DEMO / "moe-demo" / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    bos = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>", eos_token=inner.id_to_token(1))
    bos.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    return bos


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(where: Path | list[Any], tokenizer: Any, base: Path | str = "/", **settings: Any) -> TokenBatches:
    sources = str(where) if isinstance(where, Path) else where
    return load_batches(Calibration.model_validate({"sources": sources, **settings}), tokenizer, base)


def reference(texts: list[str], tokenizer: Any, length: int, eos: int, prefix: list[int]) -> list[list[int]]:
    """Packing, as plainly as it can be said."""
    stream = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], eos]
    body = length - len(prefix)
    return [prefix + stream[i * body : (i + 1) * body] for i in range(len(stream) // body)]


# Packing


@pytest.mark.parametrize("length", [3, 7, 16, 33])
def test_packing_equals_the_reference(tokenizer: Any, with_bos: Any, tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    for tok, eos, prefix in ((tokenizer, 0, []), (with_bos, 1, [0])):
        expected = reference(TEXTS, tok, length, eos, prefix)
        got = load(path, tok, sequences=len(expected), length=length, shuffle=False)
        assert got.ids.tolist() == expected
        assert got.ids.dtype == torch.int64
        assert (got.ids == 0).sum() >= len(expected) if prefix else True
        assert got.report["prefix"] == prefix
        with pytest.raises(DataError, match=rf"the sources have {len(expected)} sequences of {length} tokens, not 500"):
            load(path, tok, sequences=500, length=length, shuffle=False)
        fewer = load(path, tok, sequences=500, length=length, shuffle=False, allow_fewer=True)
        assert fewer.ids.tolist() == expected
        assert fewer.report["everything_read"]
        total = sum(len(tok(text, add_special_tokens=False)["input_ids"]) + 1 for text in TEXTS)
        assert fewer.report["tokens_available"] == total
        assert fewer.report["tokens_used"] == len(expected) * length
        assert "gave" in fewer.report["warnings"][0]


def test_documents_used_counts_those_with_a_token_in_a_sequence(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in TEXTS]
    for length in (3, 10, 40):
        for count in (1, 2):
            begins = [sum(sizes[:i]) for i in range(len(sizes))]
            got = load(path, tokenizer, sequences=count, length=length, shuffle=False)
            assert got.report["documents_used"] == sum(begin < count * length for begin in begins)


def test_demo_is_deterministic_and_shuffled_by_seed(tokenizer: Any) -> None:
    settings: dict[str, Any] = {"sequences": 800, "length": 128}
    source = [{"path": "demo/calibration.jsonl", "domain_field": "domain"}]
    first, again = (load(source, tokenizer, ROOT, **settings) for _ in range(2))
    other = load(source, tokenizer, ROOT, **settings, seed=1)
    plain = load(source, tokenizer, ROOT, **settings, shuffle=False)
    assert torch.equal(first.ids, again.ids)
    assert first.digest == again.digest
    assert first.report == again.report
    assert len({first.digest, other.digest, plain.digest}) == 3
    assert sum(first.report["sequences_per_domain"].values()) == 800
    assert set(first.domain) == set(first.report["sequences_per_domain"])
    assert len(set(first.domain)) == 6
    assert json.loads(json.dumps(first.report)) == first.report


def test_digest_covers_tags(tokenizer: Any) -> None:
    path = str(DEMO / "calibration.jsonl")
    one = load([{"path": path, "domain": "a"}], tokenizer, sequences=2, length=32)
    two = load([{"path": path, "domain": "b"}], tokenizer, sequences=2, length=32)
    assert torch.equal(one.ids, two.ids)
    assert one.digest != two.digest


def test_domains_never_share_a_sequence(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": f"{'x' if i % 2 else 'y'} " * (i + 1), "kind": "odd" if i % 2 else None} for i in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    got = load([{"path": str(path), "domain_field": "kind"}], tokenizer, sequences=6, length=20)
    for ids, tag in zip(got.ids, got.domain, strict=True):
        assert ("y" if tag == "odd" else "x") not in tokenizer.decode(ids, skip_special_tokens=True)
    assert got.report["sequences_per_domain"] == {"odd": got.domain.count("odd"), "(untagged)": got.domain.count(None)}
    only = load([{"path": str(path), "domain_field": "kind"}], tokenizer, sequences=3, length=20, domains=["odd"])
    assert set(only.domain) == {"odd"}
    assert only.report["skipped"] == {"another domain": 15}


def test_reading_stops_when_there_is_enough(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"document {i} has some words"} for i in range(3000)])
    got = load(path, tokenizer, sequences=2, length=16, shuffle=False)
    assert got.report["documents_read"] == sequences.CHUNK
    assert not got.report["everything_read"]
    monkeypatch.setattr(reading, "BUFFER_DOCUMENTS", 100)
    got = load(path, tokenizer, sequences=2, length=16)
    assert 100 <= got.report["documents_read"] <= 100 + sequences.CHUNK
    monkeypatch.setattr(reading, "BUFFER_CHARACTERS", 500)
    assert load(path, tokenizer, sequences=2, length=16).report["documents_read"] <= 40


def test_shuffle_buffer_yields_every_document_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    documents = [reading.Document(str(i), None, "") for i in range(1000)]
    for size in (1, 7, 999, 5000):
        monkeypatch.setattr(reading, "BUFFER_DOCUMENTS", size)
        order = [int(str(d.value)) for d in reading.shuffled(documents, random.Random("0"))]
        assert sorted(order) == list(range(1000))
        assert (order == sorted(order)) == (size == 1)


def test_no_packing_cuts_and_drops(tokenizer: Any, with_bos: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    for tok, prefix in ((tokenizer, []), (with_bos, [0])):
        encoded = [prefix + tok(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        kept = [ids[:7] for ids in encoded if len(ids) >= 7]
        got = load(path, tok, sequences=len(kept), length=7, shuffle=False, packing=False, allow_fewer=True)
        assert got.ids.tolist() == kept
        assert got.report["skipped"].get("shorter than a sequence", 0) <= len(TEXTS) - len(kept)
        longest = max(map(len, encoded))
        with pytest.raises(DataError, match=f"at most {longest} in one; `packing: true` joins documents"):
            load(path, tok, sequences=1, length=longest + 1, packing=False)


def test_batches(tokenizer: Any) -> None:
    got = load(DEMO / "calibration.jsonl", tokenizer, sequences=7, length=16)
    parts = list(got.batches(3))
    assert [indices for _, indices in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(torch.cat([ids for ids, _ in parts]), got.ids)


# Chat


def test_messages_go_through_the_chat_template(with_bos: Any, tokenizer: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}] * 8)
    source = {"path": str(path), "field": "messages"}
    rendered = "user: Hi there\nassistant: Hello\n"
    expected = reference([rendered] * 8, with_bos, 12, 1, [0])
    for chat in (None, True):
        got = load([source | {"chat": chat}], with_bos, sequences=3, length=12, shuffle=False)
        assert got.ids.tolist() == expected[:3]  # the template's own BOS is not repeated inside
        assert (got.ids[:, 1:] != 0).all()
    with pytest.raises(DataError, match=r"a\.jsonl:1: messages, but the tokenizer has no chat template"):
        load([source], tokenizer, sequences=1, length=8)
    with pytest.raises(DataError, match=r"field 'messages' is a list, but `chat: false` wants text"):
        load([source | {"chat": False}], with_bos, sequences=1, length=8)
    with pytest.raises(DataError, match=r"field 'text' is text, but `chat: true` wants a list of messages"):
        load([{"path": str(DEMO / "calibration.jsonl"), "chat": True}], with_bos, sequences=1, length=8)
    for bad, complaint in (
        ({"from": "human", "value": "Hi"}, "message 1 must have role and content, not from, value"),
        ("Hi", "message 1 must have role and content, not str"),
        ({"role": "alien", "content": "Hi"}, "the chat template refuses these messages: no aliens"),
    ):
        write(path, [{"messages": [messages[0], bad]}])
        with pytest.raises(DataError, match=complaint):
            load([source], with_bos, sequences=1, length=8)


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": "b"\n', r":3: broken JSON: Expecting ',' delimiter \(column 13\)"),
        ("a.jsonl", b'{"text": "fine"}\n["a", "list"]\n', r":2: must be a JSON object, not list"),
        ("a.json", b'[{"text": "a"},\n\n {"text": }]', r":3: broken JSON: Expecting value \(column 11\)"),
        ("a.json", b'[{"text": "a"}, 5]', r" element 1: must be a JSON object, not int"),
        ("a.jsonl", b"[" * 200_000, r":1: broken JSON: "),
        ("a.jsonl", b'{"txt": "a", "id": 1}\n', r":1: no field 'text'; did you mean 'txt'"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', r":1: no field 'text'; known: body, id"),
        ("a.jsonl", b'{"text": 5}\n', r":1: field 'text' is int, neither text nor a list of messages"),
        ("a.jsonl", b'{"text": {"a": 1}}\n', r":1: field 'text' is dict, neither"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r":2: not UTF-8: 0xff at byte 25"),
        ("a.txt", b"\xef\xbb\xbfok\nna\xc3", r":2: not UTF-8: 0xc3 at byte 8"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n{"text": " "}', r"0 usable documents .*\(3 read; skipped: 3 empty"),
        ("a.jsonl", b"", r"calibration is empty: 0 usable documents in .*a\.jsonl \(0 read; skipped: none\)"),
        ("a.jsonl.gz", b"this is not gzip", r"a\.jsonl\.gz: can't be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12], r"can't be read: "),
        ("a.parquet", b"PAR1 no", r"can't be read as parquet after row 0: "),
        ("a.csv", b"text\nhello\n", r": must be \.jsonl, \.json, \.txt, \.md \(or these with \.gz\), or \.parquet"),
        ("a.parquet.gz", b"", r"must be \.jsonl"),
    ],
)  # fmt: skip
def test_unusable_files(tokenizer: Any, tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        load([name], tokenizer, tmp_path, sequences=2, length=4)
    assert str(tmp_path / name) in str(caught.value) or "calibration is empty" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_files(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [])
    for path, complaint in (
        ("trian.jsonl", r"trian\.jsonl: no such file or folder; did you mean 'train\.jsonl'"),
        ("nowhere/a.jsonl", r"nowhere/a\.jsonl: no such file or folder$"),
        ("*.txt", r"\*\.txt: no file matches"),
    ):
        with pytest.raises(DataError, match=complaint):
            load([path], tokenizer, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder has no \.jsonl, .* file"):
        load(["empty"], tokenizer, tmp_path)


def test_unusable_parquet_columns(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "meta": [{"kind": "k"}]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: no field 'contents'; did you mean 'content'"):
        load([{"path": str(path), "field": "contents"}], tokenizer)
    with pytest.raises(DataError, match=r"a\.parquet row 1: no field 'meta\.kid'; did you mean 'kind'"):
        load([{"path": str(path), "field": "content", "domain_field": "meta.kid"}], tokenizer)
    binary = pyarrow.table({"text": pyarrow.array([b"ok", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())})
    pyarrow.parquet.write_table(binary, path)
    with pytest.raises(DataError, match=r"can't be read as parquet after row 0: .*utf-8"):
        load(path, tokenizer)


def test_too_little_text(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a few words"}])
    tokens = len(tokenizer("a few words")["input_ids"]) + 1
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, sequences=4, length=64, allow_fewer=True)
    assert str(caught.value) == (
        "the sources have 0 sequences of 64 tokens, not 4 "
        f"(documents: 1, tokens: {tokens}): lower `length`, or add text"
    )
    with pytest.raises(DataError, match=r"set `sequences` to 1 or `allow_fewer: true`, lower `length`, or add text"):
        load(path, tokenizer, sequences=4, length=tokens)


def test_domains_that_are_not_there(tokenizer: Any) -> None:
    source = {"path": str(DEMO / "calibration.jsonl")}
    with pytest.raises(DataError, match=r"no document of domain 'pyhton' among the 429 .*; did you mean 'python'"):
        load([source | {"domain_field": "domain"}], tokenizer, length=64, domains=["novels", "pyhton"])
    with pytest.raises(DataError, match=r"no source has a `domain` or `domain_field`"):
        load([source], tokenizer, length=64, domains=["novels"])


def test_tokenizers_that_do_not_fit(with_bos: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    no_eos = PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "moe-demo" / "tokenizer.json"))
    with pytest.raises(DataError, match="has no EOS token to separate documents with: set `packing: false`"):
        load(path, no_eos, sequences=1, length=4)
    assert load(path, no_eos, sequences=1, length=4, packing=False).ids.shape == (1, 4)
    with pytest.raises(DataError, match="no EOS token"):
        load_windows(path, no_eos, 8)
    with pytest.raises(DataError, match=r"length 2 is too short: 1 tokens are the tokenizer's own beginning"):
        load(path, with_bos, sequences=1, length=2)
    calibration = Calibration(sources=[TextSource(path=str(path))], sequences=2, length=16)
    largest = int(load_batches(calibration, tokenizer, "/").ids.max())
    assert load_batches(calibration, tokenizer, "/", vocab_size=largest + 1)
    for call in (
        lambda: load_batches(calibration, tokenizer, "/", vocab_size=largest),
        lambda: load_windows(path, tokenizer, 16, vocab_size=10),
    ):
        with pytest.raises(DataError, match=r"token \d+ \('.+'\) is beyond the model's \d+: another model's tokenizer"):
            call()
    long = load(DEMO / "calibration.jsonl", tokenizer, sequences=1, length=600)
    assert long.report["warnings"] == ["length 600 is more than the tokenizer's model_max_length 512"]
    path = write(tmp_path / "one.jsonl", [{"text": "word " * 500}])
    one = load(path, tokenizer, sequences=20, length=16)
    assert one.report["warnings"] == ["little variety: 20 sequences are of only 1 documents"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sources": []}, "at least 1"),
        ({"sources": "a", "sequnces": 4}, "Extra inputs"),
        ({"sources": [{}]}, "either a `path` or a `dataset`"),
        ({"sources": [{"path": "a", "dataset": "b"}]}, "either a `path` or a `dataset`"),
        ({"sources": [{"path": "a", "split": "test"}]}, "`split` belongs to a `dataset`"),
        ({"sources": [{"path": "a", "domain": "a", "domain_field": "b"}]}, "not both"),
        ({"sources": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"sources": "a", "length": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Calibration.model_validate(settings)


def test_settings_are_documented_and_short_forms_accepted() -> None:
    for model in (TextSource, Calibration):
        assert all(field.description for field in model.model_fields.values())
    for sources in ("a.txt", ["a.txt"], {"path": "a.txt"}, [{"path": "a.txt"}]):
        assert Calibration.model_validate({"sources": sources}).sources == [TextSource(path="a.txt")]


# Windows


@pytest.mark.parametrize("length", [5, 64, 256])
def test_windows_cover_the_text_once(tokenizer: Any, with_bos: Any, tmp_path: Path, length: int) -> None:
    texts = [json.loads(line)["text"] for line in (DEMO / "text" / "text_arithmetic.jsonl").open()][:12]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    for tok, eos, prefix in ((tokenizer, 0, []), (with_bos, 1, [0])):
        stream: list[int] = []
        for text in texts:
            stream += ([eos] if stream else []) + tok(text, add_special_tokens=False)["input_ids"]
        got = load_windows(path, tok, length)
        joined = [token for window in got.windows for token in window.tolist()[len(prefix) :]]
        assert joined == stream[: len(joined)]
        assert len(stream) - len(joined) <= (0 if prefix else 1)
        assert all(len(window) == length for window in got.windows[:-1])
        assert 2 <= len(got.windows[-1]) <= length
        assert got.predicted == sum(len(window) - 1 for window in got.windows)
        parts = list(got.batches(4))
        assert [i for _, indices in parts for i in indices] == list(range(len(got.windows)))
        assert all(torch.equal(ids[k], got.windows[i]) for ids, indices in parts for k, i in enumerate(indices))
        assert load_windows(path, tok, length).digest == got.digest


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_overlapping_windows_count_every_token_once(tokenizer: Any, with_bos: Any, tmp_path: Path, stride: int) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:4]])
    for tok, prefix in ((tokenizer, []), (with_bos, [0])):
        length = 8 + len(prefix)
        whole = load_windows(path, tok, 1000).windows[0].tolist()[len(prefix) :]
        got = load_windows(path, tok, length, stride=stride)
        scored = []
        for k, (window, first) in enumerate(zip(got.windows, got.first, strict=True)):
            body = window.tolist()[len(prefix) :]
            assert body == whole[k * stride : k * stride + 8]
            scored += [k * stride + i - len(prefix) for i in range(first, len(window))]
        assert len(scored) == len(set(scored)) == got.predicted
        unscored = set(range(len(whole))) - set(scored)
        if prefix:
            assert not unscored
        else:  # without overlap each window's first token has no context
            assert unscored == (set(range(0, len(whole), 8)) if stride == 8 else {0})


def test_windows_of_plain_text_and_of_its_beginning(tokenizer: Any, tmp_path: Path) -> None:
    text = ("A line of text.\n" * 5 + "\n") * 300
    (tmp_path / "a.txt").write_text(text)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    got = load_windows(tmp_path / "a.txt", tokenizer, 100)
    assert torch.cat(got.windows).tolist() == whole  # one document: no EOS inside
    short = load_windows(tmp_path / "a.txt", tokenizer, 100, max_tokens=250)
    assert torch.cat(short.windows).tolist() == whole[:250]
    assert [len(window) for window in short.windows] == [100, 100, 50]
    lone = load_windows(tmp_path / "a.txt", tokenizer, 100, max_tokens=201)
    assert [len(window) for window in lone.windows] == [100, 100]  # one token by itself predicts nothing


def test_windows_that_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="has nothing to predict: 1 tokens in 1 usable documents"):
        load_windows(path, tokenizer, 16)
    with pytest.raises(DataError, match="nothing to predict: 0 tokens in 0 usable documents"):
        load_windows(write(tmp_path / "b.jsonl", [{"text": ""}]), tokenizer, 16)
    with pytest.raises(DataError, match="is a folder, give one file"):
        load_windows(tmp_path, tokenizer, 16)
    with pytest.raises(DataError, match=r"\*\.jsonl: no such file"):
        load_windows(tmp_path / "*.jsonl", tokenizer, 16)
    with pytest.raises(DataError, match="no field 'body'; known: text"):
        load_windows(path, tokenizer, 16, field="body")
    for stride, most in ((0, None), (17, None), (None, 0)):
        with pytest.raises(ValueError, match="stride must be 1 to 16"):
            load_windows(path, tokenizer, 16, stride=stride, max_tokens=most)
