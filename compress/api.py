"""The same as a run, on a model that is loaded already: changed in place, then saved, scored, printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moe_compress import feasibility, probe
from moe_compress.calib.text import Calibration, TokenBatches, load_batches
from moe_compress.checkpoint.writer import check_output
from moe_compress.engine import Calibrated, MemoryStorage, Outcome, run_passes
from moe_compress.errors import InputError
from moe_compress.evaluate.text import TextScores, WindowBatch, load_text, score_batches
from moe_compress.export.targets import find_target
from moe_compress.export.write import write_memory
from moe_compress.model import MoEModel
from moe_compress.model.shape import ModelShape, model_shape
from moe_compress.model.sweep import Sweep
from moe_compress.passes import Pass
from moe_compress.progress import Monitor
from moe_compress.recipe import Evaluation, build_pass
from moe_compress.report.build import build, versions
from moe_compress.report.text import headline


class CompressedModel:
    """What `compress` gives back.

    Attributes:
        model: the very model that went in, changed.
        report: what report.json of a run holds (docs/report.md).
    """

    def __init__(self, view: MoEModel, tokenizer: Any, report: dict[str, Any], calibrated: Calibrated):
        self.model = view.module
        self.report = report
        self._view = view
        self._tokenizer = tokenizer
        self._calibrated = calibrated

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a checkpoint folder, tokenizer and generation config included. Raises InputError, RunError."""
        folder = Path(folder)
        check_output(folder, overwrite)
        text = self._calibrated.text
        expected = probe.streamed(self._view, probe.probe_tokens(text.ids if text else None, self._tokenizer))
        monitor = Monitor()
        manifest = {"run": None, "versions": versions(), "recipe": self.report["recipe"], "probe": expected}
        with monitor.stage("save", len(self._view.layers)) as progress:
            quantized = find_target(self.report["recipe"]["target"]).quantized_format or "native"
            write_memory(self._view, folder, manifest, progress, overwrite=overwrite, quantized=quantized)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)

    def score(self, text: Sequence[str] | str, *, length: int = 2048, batch_size: int = 8) -> dict[str, float]:
        """Perplexity per file stem, of text files or globs."""
        wanted = Evaluation(text=[text] if isinstance(text, str) else list(text), length=length, batch_size=batch_size)
        batches = _windows(self._view, self._tokenizer, wanted)
        with Sweep(self._view, [{"input_ids": b.ids} for b in batches]) as sweep:
            _to_the_end(sweep)
            return score_batches(batches, sweep.outputs()).summary("after")["perplexity"]  # type: ignore[no-any-return]

    def __str__(self) -> str:
        """Sizes and scores, before and after."""
        rows = headline(self.report)
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}}  {before:>12}  {after:>12}" for name, before, after in rows)


def compress(
    model: PreTrainedModel,
    *,
    passes: Sequence[str | Mapping[str, Any] | Pass],
    tokenizer: Any = None,
    calibration: Calibration | TokenBatches | Mapping[str, Any] | str | None = None,
    evaluate: Evaluation | Mapping[str, Any] | None = None,
    target: str = "native",
    monitor: Monitor | None = None,
) -> CompressedModel:
    """Compress a loaded model in place.

    Args:
        model: any supported family, also dispatched over devices or offloaded by accelerate (`device_map`).
        passes: as in a recipe: "prune.experts", {"prune.experts": {"keep": 0.75}}, or Pass objects.
        tokenizer: needed where text is read, and saved with the model.
        calibration: as in a recipe (a mapping, a path), or token batches.
        evaluate: text to score before and after (tasks: save the model and use `moe-compress evaluate`).
        target: runtime that the result is for.
        monitor: shows and remembers stages.

    Raises:
        InputError and its kinds: something is wrong with the arguments; the model is unchanged.
        RunError and its kinds: something failed on the way; the model may be half changed.
    """
    monitor = monitor or Monitor()
    goal = find_target(target)
    steps = [build_pass(dict(p) if isinstance(p, Mapping) else p, goal, ("passes", n)) for n, p in enumerate(passes)]
    if not steps:
        raise InputError("there is nothing to do: `passes` is empty")
    with monitor.stage("check"):
        view = MoEModel.wrap(model)
        before = model_shape(view)
        feasibility.check_runtime(view, feasibility.forecast(before, steps, goal)[-1], goal)
        calibrated = _calibrated(view, tokenizer, calibration, steps)
        wanted = evaluate if isinstance(evaluate, Evaluation) else Evaluation(**(evaluate or {}))
        if wanted.tasks:
            raise InputError("tasks need a saved model: save it, then `moe-compress evaluate FOLDER --tasks …`")
        windows = _windows(view, tokenizer, wanted) if wanted.text else []
    with ExitStack() as stack:
        original = None
        if windows:
            # The original's calls wait behind its last layer while the layers change: norm and head stay as they are.
            original = stack.enter_context(Sweep(view, [{"input_ids": w.ids} for w in windows]))
            with monitor.stage("score: original", len(view.layers)) as progress:
                _to_the_end(original, progress)
        outcomes = run_passes(view, steps, before, calibrated, MemoryStorage(), "in memory", monitor)
        scores = TextScores()
        if original is not None:
            with monitor.stage("score: result", len(view.layers)) as progress:
                result = stack.enter_context(Sweep(view, [{"input_ids": w.ids} for w in windows]))
                _to_the_end(result, progress)
                scores = score_batches(windows, result.outputs(), original.outputs())
    report = _report(view, steps, target, before, outcomes, calibrated, scores, monitor)
    return CompressedModel(view, tokenizer, report, calibrated)


def _to_the_end(sweep: Sweep, progress: Any = None) -> None:
    for step in sweep:
        step.advance()
        if progress is not None:
            progress.layer(step.index)


def _calibrated(view: MoEModel, tokenizer: Any, calibration: Any, steps: Sequence[Pass]) -> Calibrated:
    if isinstance(calibration, TokenBatches):
        text, batch_size = calibration, 8
        feasibility.check_calibration(view, steps, True, int(text.ids.shape[1]))
        return Calibrated(text, batch_size)
    settings = calibration if isinstance(calibration, Calibration) or calibration is None else _settings(calibration)
    feasibility.check_calibration(view, steps, settings is not None, settings.length if settings else 0)
    if settings is None or not any(s.statistics() or s.needs_inputs() for s in steps):
        return Calibrated(None)
    if tokenizer is None:
        raise InputError("calibration text needs the model's tokenizer: pass `tokenizer=`")
    vocabulary = view.module.config.get_text_config().vocab_size
    return Calibrated(load_batches(settings, tokenizer, Path.cwd(), vocab_size=vocabulary), settings.batch_size)


def _settings(calibration: Any) -> Calibration:
    if isinstance(calibration, str):
        return Calibration(sources=[calibration])  # type: ignore[list-item]
    return Calibration(**calibration)


def _windows(view: MoEModel, tokenizer: Any, wanted: Evaluation) -> list[WindowBatch]:
    if tokenizer is None:
        raise InputError("scoring text needs the model's tokenizer: pass `tokenizer=`")
    feasibility.check_length(view, wanted.length, "length")
    return load_text(tokenizer, wanted, view.module.config.get_text_config().vocab_size)


def _report(
    view: MoEModel,
    steps: Sequence[Pass],
    target: str,
    before: ModelShape,
    outcomes: Sequence[Outcome],
    calibrated: Calibrated,
    scores: TextScores,
    monitor: Monitor,
) -> dict[str, Any]:
    recipe = {
        "model": view.module.config.name_or_path or type(view.module).__name__,
        "target": target,
        "passes": [{s.name: s.options.model_dump(mode="json")} for s in steps],
    }
    return build(
        recipe=recipe,
        before=before,
        outcomes=outcomes,
        calibration=calibrated.text.report if calibrated.text is not None else None,
        scores_before=scores.summary("before") if scores.before else {},
        scores_after=(scores.summary("after") | scores.drift()) if scores.after else {},
        stages=monitor.records(),
        facts={"tokens_seen": calibrated.tokens},
    )


__all__ = ["CompressedModel", "compress"]
