"""Equal shares of domains."""

from collections import Counter

from places import DEMO
from transformers import AutoTokenizer

from moe_compress.calib import sequences
from moe_compress.calib.sequences import Made, balanced
from moe_compress.calib.text import Calibration, load_batches


def stream(*domains):
    """Sequences of these domains, numbered; the list says how many were asked for."""
    asked = []

    def made():
        for number, domain in enumerate(domains):
            asked.append(domain)
            yield Made([number], domain, (f"document {number}",))

    return made(), asked


def test_equal_shares_of_what_there_is():
    text = "aaaabaaaabaaacaaaabaaacc"
    got = list(balanced(stream(*text)[0], 6))
    assert Counter(s.domain for s in got[:9]) == {"a": 3, "b": 3, "c": 3}  # c is first seen while b is waited for
    assert sorted(s.ids[0] for s in got) == list(range(len(text)))  # nothing is lost
    for domain in "abc":  # and each domain's own order stays
        own = [s.ids[0] for s in got if s.domain == domain]
        assert own == sorted(own)


def test_no_more_is_read_than_needed():
    made, asked = stream(*"abcabcabcabc" * 10)
    source = balanced(made, 6)
    got = [next(source) for _ in range(6)]
    assert Counter(s.domain for s in got) == {"a": 2, "b": 2, "c": 2}
    assert len(asked) == 6


def test_a_rare_domain_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(sequences, "WAITING", 3)
    made, asked = stream("b", *"a" * 1000, "b")
    source = balanced(made, 4)
    got = [next(source).domain for _ in range(4)]
    assert Counter(got) == {"a": 3, "b": 1}
    assert len(asked) <= 3 * 4 + 4


def test_demo_has_six_kinds_in_equal_parts():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "moe-demo")
    source = {"path": str(DEMO / "calibration.jsonl"), "domain_field": "domain"}
    settings = Calibration(sources=[source], sequences=60, length=128, balance=True)
    got = load_batches(settings, tokenizer, DEMO)
    assert set(Counter(got.domain).values()) == {10}
    assert got.report["sequences_per_domain"] == Counter(got.domain)
    again = load_batches(settings, tokenizer, DEMO)
    assert again.digest == got.digest
    assert load_batches(settings.model_copy(update={"seed": 1}), tokenizer, DEMO).digest != got.digest
