"""Where text comes from: several sources and their shares, every format read alike."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_text import DEMO, TEXTS, load, reference, write

from moe_compress.calib import reading
from moe_compress.errors import DataError

# Several sources


def test_weights_are_shares(tokenizer: Any, tmp_path: Path) -> None:
    sources = [
        {"path": str(DEMO / "text" / "text_novels.jsonl"), "domain": "novels", "weight": 3},
        {"path": str(DEMO / "text" / "text_python.jsonl"), "domain": "python"},
    ]
    got = load(sources, tokenizer, sequences=10, length=32)
    assert got.report["sequences_per_domain"] == {"novels": 8, "python": 2}
    assert [source["sequences"] for source in got.report["sources"]] == [8, 2]
    assert got.domain != sorted(map(str, got.domain))  # mixed, so that no batch is of one kind by order
    small = write(tmp_path / "small.jsonl", [{"text": "word " * 100}])
    sources.append({"path": str(small), "weight": 4, "domain": "small"})
    with pytest.raises(DataError, match=r"small\.jsonl has 3 of its 20: by weight there are (\d+) sequences") as caught:
        load(sources, tokenizer, sequences=40, length=32)
    most = int(str(caught.value).split("there are ")[1].split()[0])
    assert load(sources, tokenizer, sequences=most, length=32).report["sequences"] == most
    with pytest.raises(DataError):
        load(sources, tokenizer, sequences=most + 2, length=32)


def test_without_weights_others_make_up(tokenizer: Any, tmp_path: Path) -> None:
    small = write(tmp_path / "small.jsonl", [{"text": "word " * 100}])
    sources = [str(small), str(DEMO / "text" / "text_novels.jsonl"), str(DEMO / "text" / "text_python.jsonl")]
    got = load(sources, tokenizer, sequences=30, length=32)
    assert [source["sequences"] for source in got.report["sources"]] == [3, 14, 13]
    assert got.report["warnings"][:1] == [f"{small} gave 3 sequences, its share is 10"]


def test_source_of_another_domain_is_not_read(tokenizer: Any) -> None:
    sources = [{"path": "text_novels.jsonl", "domain": "novels"}, {"path": "missing.jsonl", "domain": "code"}]
    got = load(sources, tokenizer, DEMO / "text", sequences=4, length=32, domains=["novels"])
    assert got.report["sequences_per_domain"] == {"novels": 4}
    assert got.report["sources"][1]["skipped"] == {"source of another domain": 1}


def test_limit_takes_the_first_documents(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": ""}, *({"text": f"w{i} " * 20} for i in range(9))])
    got = load([{"path": str(path), "limit": 3}], tokenizer, sequences=99, length=4, allow_fewer=True)
    assert got.report["documents_read"] == 4
    words = tokenizer.decode(got.ids.flatten())
    assert "w2" in words
    assert "w3" not in words
    assert got.report["skipped"] == {"empty": 1}


# Formats


def test_formats_read_alike(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": text, "meta": {"kind": "k"}} for text in TEXTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "b.json").write_text(lines.replace("\n", "\n\n").rstrip("\n"))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    expected = reference(TEXTS, tokenizer, 16, 0, [])
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz", "e.parquet"):
        source = {"path": name, "domain_field": "meta.kind"}
        got = load([source], tokenizer, tmp_path, sequences=len(expected), length=16, shuffle=False)
        assert got.ids.tolist() == expected, name
        assert set(got.domain) == {"k"}


def test_plain_text_is_cut_at_blank_lines(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 30)
    paragraphs = [f"Paragraph {i} begins.\nIt ends.\n" for i in range(6)]
    (tmp_path / "a.txt").write_text("\n".join(paragraphs) + "x" * 200 + "\ny\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    for name in ("a.txt", "b.md.gz"):
        rows = list(reading._plain_rows(tmp_path / name, whole=False))
        assert "".join(text for _, text in rows) == (tmp_path / "a.txt").read_text()
        assert [text for _, text in rows[:5]] == [p + "\n" for p in paragraphs[:5]]
        assert rows[1][0].endswith(f"{name}:4")
        assert rows[-1][1] == "y\n"  # the line before it was long enough to end a document by itself
    got = load(tmp_path / "a.txt", tokenizer, sequences=2, length=16, shuffle=False)
    assert got.ids.tolist() == reference([p + "\n" for p in paragraphs[:5]], tokenizer, 16, 0, [])[:2]


def test_folder_and_glob(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".cache").mkdir()
    write(tmp_path / "in" / "b.jsonl", [{"text": TEXTS[1]}])
    write(tmp_path / "in" / "deep" / "a.jsonl", [{"text": TEXTS[2]}])
    write(tmp_path / "in" / ".cache" / "hidden.jsonl", [{"text": "hidden"}])
    (tmp_path / "in" / "notes.pdf").write_bytes(b"%PDF")
    expected = reference([TEXTS[1], TEXTS[2]], tokenizer, 8, 0, [])
    for path in ("in", "in/**/*.jsonl"):
        got = load([path], tokenizer, tmp_path, sequences=len(expected), length=8, shuffle=False)
        assert got.ids.tolist() == expected
        assert got.report["skipped"] == ({"file hidden or of another kind": 2} if path == "in" else {})
    odd = write(tmp_path / "odd[1].jsonl", [{"text": TEXTS[2]}])
    assert load(odd, tokenizer, sequences=1, length=8).report["documents_read"] == 1


def test_local_data_set(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": text} for text in TEXTS])
    expected = reference(TEXTS, tokenizer, 16, 0, [])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source = {"dataset": "set", "split": "train"}
    got = load([source], tokenizer, tmp_path, sequences=len(expected), length=16, shuffle=False)
    assert got.ids.tolist() == expected
    assert got.report["sources"][0]["source"] == "dataset set"
    with pytest.raises(DataError, match=r"^dataset set: can't be read after row 0: .*validation"):
        load([{"dataset": "set", "split": "validation"}], tokenizer, tmp_path, length=16)


def test_named_data_set(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the library, and its failures, without the network."""
    import datasets

    calls = []

    def fake(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    source = {"dataset": "allenai/c4", "subset": "en", "split": "validation"}
    for offline in (False, True):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
        load([source], tokenizer, sequences=1, length=16)
        assert calls[-1] == (("allenai/c4", "en"), {"split": "validation", "streaming": not offline})

    def broken(*args: Any, **kwargs: Any) -> Any:
        yield {"text": "one"}
        raise ConnectionError("the network\nis gone")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(DataError, match=r"^dataset allenai/c4: can't be read after row 1: the network is gone$"):
        load([source], tokenizer, sequences=1, length=16)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(DataError, match=r"^dataset allenai/c4 row 1: no field 'txt'; did you mean 'text'"):
        load([{**source, "field": "txt"}], tokenizer, sequences=1, length=16)
