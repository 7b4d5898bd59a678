"""Everything that is scored of a result, beside the original: text, tasks, and what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_compress.calib.tokenizer import find_tokenizer
from moe_compress.errors import InputError
from moe_compress.export.loader import load
from moe_compress.export.verify import loaded_bytes
from moe_compress.feasibility import check_length
from moe_compress.model import MoEModel, hf
from moe_compress.progress import Monitor
from moe_compress.recipe import Evaluation
from moe_compress.resources import holding, memory_limit
from moe_compress.units import show_bytes

from .generation import choose_prompts, continued
from .text import find_files, load_text, score_text


def check_scoring(model: MoEModel, wanted: Evaluation, memory: str = "auto") -> None:
    """Raise InputError or DataError for text that can't be read, tasks that don't exist, and a model that has no room
    where it would have to be loaded, before any work."""
    if wanted.text:
        find_files(wanted.text)
        check_length(model, wanted.length, "evaluate.length")
        batches = load_text(_tokenizer(model.source.folder), wanted, model.module.config.get_text_config().vocab_size)
        if wanted.generation is not None:
            choose_prompts(batches, wanted.generation)
            check_length(model, wanted.generation.prompt + wanted.generation.tokens, "evaluate.generation")
            size, limit = loaded_bytes(model.source.folder, model.dtype), memory_limit(memory)
            if size > limit:
                raise InputError(
                    f"evaluate.generation loads the model, which takes {show_bytes(size)}, and it may take "
                    f"{show_bytes(limit)} (compute.memory): leave it out"
                )
    elif wanted.tasks:
        _tokenizer(model.source.folder)
    if wanted.tasks:
        from .tasks import check_tasks  # lm-eval takes seconds to import

        check_tasks(wanted.tasks, Path(wanted.task_path) if wanted.task_path else None)


def score_folders(
    folder: Path,
    original: Path | None,
    wanted: Evaluation,
    like: MoEModel,
    hold: Path | None,
    monitor: Monitor,
    memory: str = "auto",
    slots: Mapping[int, Sequence[int]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of a checkpoint, and of the original on the same text and tasks.

    Args:
        folder: the checkpoint to score.
        original: what it is compared with, or None.
        wanted: text and tasks.
        like: gives device and dtype.
        hold: folder for hidden states that memory has no room for, or None to keep them in memory anyhow.
        monitor: stages.
        slots: layer → where each expert of the original is now, −1 if it is gone; None if nobody knows.
        memory: most that a whole model may take; tasks of a larger one are streamed.

    Returns:
        (of the original, of the checkpoint): `perplexity`, `tasks`, `generation`; of the latter also `kl`, `agreement`,
        `routing`.
    """
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    if not wanted.text and not wanted.tasks:
        return before, after
    tokenizer = _tokenizer(folder)
    dtype, device = like.dtype, like.device
    if wanted.text:
        batches = load_text(tokenizer, wanted, like.module.config.get_text_config().vocab_size)
        model = MoEModel.open(folder, dtype=dtype, device=device)
        reference = None
        if original is not None:
            reference = MoEModel.open(original, dtype=dtype, device=device, dequantize=True)
        if reference is not None:
            _check_alike(model, reference)
        total = len(model.layers) * (1 if reference is None else 2)
        with monitor.stage("score: text", total) as progress:
            tokens = sum(batch.ids.numel() for batch in batches) * (1 if reference is None else 2)
            own = holding(model, tokens, hold) if hold else None
            scores = score_text(model, batches, reference, own, progress, slots)
        before |= scores.summary("before") if reference is not None else {}
        after |= scores.summary("after") | scores.drift()
        if wanted.generation is not None:
            prompts = choose_prompts(batches, wanted.generation)
            written = None
            for which, at in (("original", original), ("result", folder)):
                if at is not None:
                    with monitor.stage(f"score: generation, {which}") as progress, hf.quiet():
                        whole: Any = load(at, dtype=dtype).to(device)
                        own_text = continued(whole, prompts, wanted.generation, progress)
                        del whole
                    found = own_text.summary(wanted.generation.ngram, written)
                    (after if at is folder else before)["generation"] = found
                    written = own_text
    if wanted.tasks:
        for which, at in (("original", original), ("result", folder)):
            if at is not None:
                with monitor.stage(f"score: tasks, {which}") as progress:
                    scored = _tasks(at, tokenizer, wanted, dtype, device, memory_limit(memory), progress)
                (after if at is folder else before)["tasks"] = scored
    return before, after


def _tokenizer(folder: Path) -> Any:
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise InputError(
            f"{folder} has no tokenizer that transformers can load, and scoring needs one: put tokenizer.json and "
            "tokenizer_config.json there"
        )
    return tokenizer


def _check_alike(model: MoEModel, original: MoEModel) -> None:
    """Raise InputError when logits of two models can't be compared."""
    sizes = [m.module.config.get_text_config().vocab_size for m in (model, original)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{original.source.folder} can't be the original of {model.source.folder}: its vocabulary has {sizes[1]} "
            f"tokens, not {sizes[0]}"
        )


def _tasks(
    folder: Path,
    tokenizer: Any,
    wanted: Evaluation,
    dtype: torch.dtype,
    device: torch.device,
    limit: int,
    progress: Any,
) -> dict[str, dict[str, float]]:
    """Through the loaded model where it fits in memory, streamed otherwise."""
    from .tasks import score_tasks

    if loaded_bytes(folder, dtype) <= limit:
        with hf.quiet():
            model: Any = load(folder, dtype=dtype).to(device)
    else:
        model = MoEModel.open(folder, dtype=dtype, device=device)
    return score_tasks(
        model,
        tokenizer,
        wanted.tasks,
        task_path=Path(wanted.task_path) if wanted.task_path else None,
        batch_size=wanted.batch_size,
        limit=wanted.limit,
        max_length=None,
        progress=progress,
    )


__all__ = ["check_scoring", "score_folders"]
