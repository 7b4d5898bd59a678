"""Pruned for one domain: what it costs on that domain and on the others, against pruning for all at the same size.

    python benchmarks/domains.py [--tokens 2000] [--sequences 126] [--criteria easy_ep tcess reap]

On the demo checkpoint, whose six texts are its domains; `general` scores experts on all six. Numbers are nats per token
above the original's on held-out text: on the domain that the experts were kept for (mean over the six, each pruned for
by itself), and on the other five. Then, which domain's experts prompts of the held-out texts would load.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from demo_model import MODEL, ROOT, calibration_text, compressed, load_demo, lost, six_texts

from moe_compress.domains import find_patterns, pattern_of
from moe_compress.model import MoEModel
from moe_compress.progress import Monitor

PROMPTS, PROMPT = 20, 200  # prompts of each text, characters of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each held-out text")
    parser.add_argument("--sequences", type=int, default=126, help="calibration sequences of 256 tokens, all domains")
    parser.add_argument("--criteria", nargs="+", default=["easy_ep", "tcess", "reap"])
    arguments = parser.parse_args()
    tokenizer, original = load_demo()
    text = calibration_text(tokenizer, arguments.sequences)
    domains = sorted({tag for tag in text.domain if tag is not None})
    evaluate = six_texts(arguments.tokens)

    def losses(options: dict[str, Any]) -> dict[str, float]:
        step = {"prune.experts": {"refit": False, **options}}
        found = lost(compressed(original, tokenizer, [step], text, evaluate).report)
        return {name.removeprefix("text_"): nats for name, nats in found.items()}

    print(f"{'experts removed, criterion':32}{'own domain':>12}{'other five':>12}   own domain, one by one")
    for keep in (0.75, 0.5):
        for criterion in arguments.criteria:
            options = {"keep": keep, "criterion": criterion}
            general = losses(options)
            _row(f"{1 - keep:.0%} {criterion}, general", domains, dict.fromkeys(domains, general))
            own = {d: losses({**options, "domains": [d]}) for d in domains}
            _row(f"{1 - keep:.0%} {criterion}, for a domain", domains, own)

    print("\nprompts whose nearest domain is their own:", end=" ")
    view = MoEModel.open(MODEL)
    patterns = find_patterns(view, text, monitor=Monitor(show=False))
    hits = []
    for domain in domains:
        rows = (ROOT / f"demo/text/text_{domain}.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
        prompts = [json.loads(row)["text"][:PROMPT] for row in rows]
        nearest = [next(iter(patterns.distances(pattern_of(view, p)))) for p in prompts]
        hits.append((nearest.count(domain), len(prompts)))
    each = ", ".join(f"{d} {hit}/{of}" for d, (hit, of) in zip(domains, hits, strict=True))
    print(f"{sum(h for h, _ in hits) / sum(n for _, n in hits):.1%}   {each}")


def _row(name: str, domains: list[str], by_domain: dict[str, dict[str, float]]) -> None:
    own = {d: by_domain[d][d] for d in domains}
    others = [loss for d in domains for other, loss in by_domain[d].items() if other != d]
    each = ", ".join(f"{d} {loss:.3f}" for d, loss in own.items())
    print(f"{name:32}{statistics.mean(own.values()):12.4f}{statistics.mean(others):12.4f}   {each}", flush=True)


if __name__ == "__main__":
    main()
