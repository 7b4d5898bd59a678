"""From what was read to what the model is calibrated on: the part that the model itself has a say in.

Everything measured goes through a `StatisticStore`, so a run that is killed goes on where it was, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Monitor

from .balance import SequenceRouting, balance
from .batches import TokenBatches
from .collect import StatisticStore, collect
from .self_sampling import self_sample
from .text import Draft, per_domain, weighed


def finish(
    draft: Draft,
    model: MoEModel,
    stores: Callable[[str], StatisticStore],
    hold: Callable[[int], Path | None],
    monitor: Monitor,
    whole: Callable[[], MoEModel | None] = lambda: None,
) -> TokenBatches:
    """The sequences of a calibration.

    Args:
        draft: what was read.
        model: before any change.
        stores: digest of data → store for what the model says to it.
        hold: tokens of a sweep → folder for its hidden states, or None for memory.
        monitor: stages.
        whole: the same model in memory, if it fits there: asked for where the model writes text.

    Raises UnsupportedModelError where the model's experts can't be told which sequence a token is of.
    """
    text = draft.text
    if draft.sampled:
        text = _written(draft, text, whole() or model, stores("self-sampling"), hold, monitor)
    if draft.pool is not None:
        text = _balanced(draft, text, model, stores, hold, monitor)
    return weighed(draft.settings, text)


def _written(
    draft: Draft,
    text: TokenBatches,
    model: MoEModel,
    store: StatisticStore,
    hold: Callable[[int], Path | None],
    monitor: Monitor,
) -> TokenBatches:
    """With the sequences that the model writes, each source's behind the others."""
    settings, encoder = draft.settings, draft.encoder
    for number, count in draft.sampled.items():
        source = settings.sources[number]
        assert source.self_sampling is not None
        account: dict[str, Any] = {"source": source.name, "sequences": count}
        if count:
            ids, said = self_sample(
                model,
                source.self_sampling,
                count,
                settings.length,
                f"{settings.seed}/{number}",
                encoder.tokenizer,
                encoder.prefix,
                store,
                hold,
                monitor,
            )
            text = text.joined(TokenBatches(ids, [source.domain] * count, "", {}))
            account |= said
        report = {
            **text.report,
            "sequences": len(text),
            "tokens_used": text.tokens,
            "sequences_per_domain": per_domain(text.domain, settings.domains or ()),
            "sources": [*text.report["sources"], account],
        }
        text = replace(text, report=report)
    return text


def _balanced(
    draft: Draft,
    text: TokenBatches,
    model: MoEModel,
    stores: Callable[[str], StatisticStore],
    hold: Callable[[int], Path | None],
    monitor: Monitor,
) -> TokenBatches:
    wanted, pool, size = draft.settings.expert_balance, draft.pool, draft.settings.batch_size
    assert wanted is not None
    assert pool is not None
    store = stores(f"{text.digest}+{pool.digest}")
    statistic = SequenceRouting(len(text) + len(pool))
    if any(store.get(i, statistic.key) is None for i in model.moe_layers):
        with (
            monitor.stage("calibration: expert balance", len(model.layers)) as progress,
            Sweep(model, text.forwards(size) + pool.forwards(size), hold(text.tokens + pool.tokens)) as sweep,
        ):
            collect(sweep, [statistic], store, progress)
    counts = {}
    for index in model.moe_layers:
        measured = store.get(index, statistic.key)
        assert measured is not None
        counts[index] = measured["counts"]
    chosen = balance(counts, len(text), wanted.ratio, wanted.most or 2 * draft.settings.sequences)
    result = text.joined(pool.chosen(chosen.added))
    warnings = list(text.report["warnings"])
    if chosen.report["starved"]:
        starved = sum(map(len, chosen.report["starved"].values()))
        warnings.append(f"{starved} experts see less than {wanted.ratio:g} of their fair share of calibration tokens")
    report = {
        **text.report,
        "sequences": len(result),
        "tokens_used": result.tokens,
        "sequences_per_domain": per_domain(result.domain, draft.settings.domains or ()),
        "expert_balance": chosen.report,
        "warnings": warnings,
    }
    return replace(result, report=report)
