"""What may follow what: the contract of all registered passes as a table, and as the hint of an error.

A pass says which kinds of experts it can change (`accepts`) and which kind it leaves (`leaves`). Experts start out as
"fused", the family's own dense weights. `python -m moe_compress.contract` prints docs/passes.md.
"""

from __future__ import annotations

from moe_compress.passes import Pass, all_passes

# Kind → what it is, in the order in which they come up.
KINDS = {
    "fused": "dense weights, as the family stores them",
    "packed": "quantized codes and scales, per matrix",
    "factored": "dense or packed factors: shared bases, low-rank products, sparse rows",
    "ragged": "dense weights, experts of a layer with different numbers of neurons",
    "scaled": "8-bit weights with scales, as servers compute with them",
}

_HEAD = """# What may follow what

Made by `python -m moe_compress.contract` from what the passes say of themselves; a test compares. Recipes are checked
against it before any work. Three rules are not about kinds of experts: `quantize.gguf` is the last pass of a recipe for
llama.cpp, no pass that changes the number of experts follows one that skips experts, and passes that heal need the
original.
"""


def followers(kind: str) -> list[str]:
    """Names of the passes that can change experts of a kind."""
    return [name for name, cls in all_passes().items() if kind in cls.accepts]


def left_by(cls: type[Pass], kind: str) -> list[str]:
    """Kinds that the experts may be of behind a pass that was given `kind`."""
    return sorted(cls.leaves) or [kind]


def table() -> str:
    """docs/passes.md."""
    passes = all_passes()
    said_of = (kind for cls in passes.values() for kind in sorted(cls.accepts | cls.leaves))
    known = dict.fromkeys([*KINDS, *said_of])
    lines = [_HEAD, "| experts | what they are | passes that can change them |", "|---|---|---|"]
    for kind in known:
        names = ", ".join(f"`{name}`" for name in followers(kind)) or "none"
        lines.append(f"| {kind} | {KINDS.get(kind, '')} | {names} |")
    lines += ["", "| pass | what it does | takes | leaves | may be followed by |", "|---|---|---|---|---|"]
    for name, cls in passes.items():
        takes = sorted(cls.accepts, key=list(known).index)
        after = list(dict.fromkeys(k for kind in takes for k in left_by(cls, kind)))
        then = [", ".join(f"`{n}`" for n in followers(kind)) or "nothing" for kind in after]
        then = ["every pass" if len(followers(k)) == len(passes) else t for k, t in zip(after, then, strict=True)]
        said = then[0] if len(then) == 1 else "; ".join(f"{k}: {t}" for k, t in zip(after, then, strict=True))
        leaves = ", ".join(sorted(cls.leaves)) or "as it was"
        lines.append(f"| `{name}` | {cls.summary} | {', '.join(takes)} | {leaves} | {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
