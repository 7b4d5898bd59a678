"""The same as a run, on a model that is loaded already: changed in place, then saved, scored, printed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress import feasibility, probe
from moe_compress.calib.draft import finish
from moe_compress.calib.routing import RoutingLog, routing_drift
from moe_compress.calib.text import Calibration, TokenBatches, read_draft
from moe_compress.checkpoint.writer import check_output
from moe_compress.engine import Calibrated, Outcome, Work, run_passes, slots_after
from moe_compress.errors import DataError, InputError, MoeCompressError, RunError
from moe_compress.evaluate.generation import choose_prompts, continued
from moe_compress.evaluate.text import (
    TextScores,
    WindowBatch,
    experts_used,
    has_rules,
    load_text,
    score_batches,
)
from moe_compress.export.registration import attach
from moe_compress.export.targets import find_target
from moe_compress.export.write import result_config, write_memory
from moe_compress.model import MoEModel, beside
from moe_compress.model.shape import ModelShape, model_shape
from moe_compress.model.sweep import Sweep
from moe_compress.passes import Pass
from moe_compress.progress import Monitor
from moe_compress.recipe import Evaluation, make_part, make_passes
from moe_compress.report.build import build, versions
from moe_compress.report.text import headline, write_reports
from moe_compress.resources import holding_all
from moe_compress.storage import MemoryStorage

# What statistics in memory are kept under: of the model as it came.
_STATE = "in memory"
# Model → what stands for the last change of it: a result tells of one state alone.
_CHANGED: WeakKeyDictionary[PreTrainedModel, object] = WeakKeyDictionary()


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
        self._state = _CHANGED[view.module]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a checkpoint folder with tokenizer, generation config, report.json and report.md.

        The reports hold `report`, and in its recipe `output`. Raises RunError, and InputError, also when the model was
        compressed again since: what it is now isn't what `report` is of.
        """
        if _CHANGED[self.model] is not self._state:
            raise InputError("the model was changed again since: save what the last call of compress() gave")
        folder = Path(folder)
        check_output(folder, overwrite)
        text = self._calibrated.text
        expected = probe.streamed(self._view, probe.probe_tokens(text.ids if text else None, _words(self._tokenizer)))
        monitor = Monitor()
        recipe = {**self.report["recipe"], "output": str(folder)}
        manifest = {"run": None, "versions": versions(), "recipe": recipe, "probe": expected}
        with monitor.stage("save", len(self._view.layers)) as progress:
            goal = find_target(recipe["target"])
            quantized = goal.quantized_format or "native"
            write_memory(self._view, folder, manifest, progress, overwrite=overwrite, quantized=quantized, target=goal)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        write_reports(folder, {**self.report, "recipe": recipe})

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
    calibration: Calibration | TokenBatches | Mapping[str, Any] | str | Path | Sequence[Any] | None = None,
    evaluate: Evaluation | Mapping[str, Any] | None = None,
    target: str = "native",
    original: PreTrainedModel | str | Path | None = None,
    monitor: Monitor | None = None,
) -> CompressedModel:
    """Compress a loaded model in place.

    Args:
        model: any supported family, also dispatched over devices or offloaded by accelerate (`device_map`); or a
            native result that was loaded, for passes that its experts take (docs/passes.md).
        passes: as in a recipe: "prune.experts", {"prune.experts": {"keep": 0.75}}, or Pass objects.
        tokenizer: needed where text is read, and saved with the model; where images are read, the model's processor.
        calibration: as in a recipe (a mapping, a path or several), or token ids: int64 tensors [sequences, length].
        evaluate: text to score before and after (tasks: save the model and use `moe-compress evaluate`).
        target: runtime that the result is for.
        original: for passes that learn from the original: a copy of the model, or the folder that it was loaded from
            (then one layer of it is in memory at a time).
        monitor: shows and remembers stages.

    Afterwards the model is what loading the saved result would give, so its own `save_pretrained` works too.

    Raises:
        InputError and its kinds: something is wrong with the arguments; the model is unchanged.
        RunError and its kinds: something failed on the way. If layers were being changed by then, the message (or a
            note on an error that isn't this package's) says that the model has to be loaded again.
    """
    monitor = monitor or Monitor()
    goal = find_target(target)
    steps = make_passes([passes] if isinstance(passes, str | Mapping | Pass) else passes, goal)
    if not steps:
        raise InputError("there is nothing to do: `passes` is empty")
    with monitor.stage("check"):
        view = MoEModel.wrap(model)
        before = model_shape(view)
        feasibility.check_runtime(view, feasibility.forecast(before, steps, goal)[-1], goal)
        storage = MemoryStorage()
        calibrated = _calibrated(view, tokenizer, calibration, steps, storage, monitor)
        if any(step.goes_back() for step in steps):
            holding_all(view, calibrated.tokens, None)
        source = _source(original, view, steps)
        wanted = make_part(Evaluation, evaluate if evaluate is not None else {}, "evaluate")
        if wanted.tasks:
            raise InputError("tasks need a saved model: save it, then `moe-compress evaluate FOLDER --tasks …`")
        windows = _windows(view, tokenizer, wanted) if wanted.text else []
        prompts = choose_prompts(windows, wanted.generation) if wanted.generation else None
    with ExitStack() as stack:
        scored = None
        logs = [RoutingLog(sum(w.ids.numel() for w in windows)) for _ in range(2)]
        if windows:
            # The original's calls wait behind its last layer while the layers change, and end with the original's head.
            head = view.module.get_output_embeddings()
            scored = stack.enter_context(Sweep(view, [{"input_ids": w.ids} for w in windows]))
            with monitor.stage("score: original", len(view.layers)) as progress:
                _to_the_end(scored, progress, logs[0])
        if prompts is not None and wanted.generation is not None:
            with monitor.stage("score: generation, original"):
                written = continued(model, prompts, wanted.generation)
        with _changing(model, storage):
            outcomes = run_passes(Work(view, calibrated, storage, monitor, source), steps, before, _STATE)
        _settle(view)
        scores = TextScores()
        if scored is not None:
            with monitor.stage("score: result", len(view.layers)) as progress:
                result = stack.enter_context(Sweep(view, [{"input_ids": w.ids} for w in windows]))
                _to_the_end(result, progress, logs[1])
                scores = score_batches(windows, result.outputs(), _through(view, head, scored.outputs()))
            scores.routing = routing_drift(logs[0], logs[1], slots_after(outcomes, before))
            scores.used = experts_used(logs[1], logs[0], has_rules(view))
        if prompts is not None and wanted.generation is not None:
            with monitor.stage("score: generation, result"):
                now, ngram = continued(model, prompts, wanted.generation), wanted.generation.ngram
                scores.written = (written.summary(ngram), now.summary(ngram, written))
    report = _report(view, steps, target, before, outcomes, calibrated, scores, monitor)
    return CompressedModel(view, tokenizer, report, calibrated)


def _to_the_end(sweep: Sweep, progress: Any = None, log: RoutingLog | None = None) -> None:
    for step in sweep:
        step.advance(None if log is None else log.observe)
        if progress is not None:
            progress.layer(step.index)


def _through(view: MoEModel, head: Any, outputs: Iterator[Any]) -> Iterator[Any]:
    """Outputs of calls that wait behind the last layer, each finished with `head` in its place."""
    now = view.module.get_output_embeddings()
    path = next((p for p, m in view.module.named_modules() if m is now), "")
    while True:
        if head is not now:
            beside.replace(view.module, path, head)
        try:
            output = next(outputs, None)
        finally:
            if head is not now:
                beside.replace(view.module, path, now)
        if output is None:
            return
        yield output


@contextmanager
def _changing(model: PreTrainedModel, storage: MemoryStorage) -> Iterator[None]:
    """Errors say so when layers were changed, or being changed, before them; so do earlier results when saved."""
    try:
        yield
    except BaseException as error:
        if _planned(storage):
            done = sum(len(store.reports) for store in storage.passes.values())
            what = f"the model is changed in part ({done} layers done): load it again"
            if isinstance(error, MoeCompressError):
                raise RunError(f"{error}; {what}") from error
            error.add_note(f"moe-compress: {what}")
        raise
    finally:
        if _planned(storage):
            _CHANGED[model] = object()


def _planned(storage: MemoryStorage) -> bool:
    return any(store.planned for store in storage.passes.values())


def _settle(view: MoEModel) -> None:
    """Make the model's own config say what it is now."""
    values, form = result_config(view, view.descriptions())
    said = view.narrowed({i: view.block(i).experts.intermediate_size for i in view.moe_layers})
    for path in [*view.count_paths, *(said if isinstance(said, list) else ())]:
        config: Any = view.module.config
        for key in path[:-1]:
            config = getattr(config, key)
        setattr(config, path[-1], functools.reduce(lambda part, key: part[key], path, values))
    attach(view.module, values["quantization_config"] if form == "native" else None)


def _calibrated(
    view: MoEModel, tokenizer: Any, calibration: Any, steps: Sequence[Pass], storage: MemoryStorage, monitor: Monitor
) -> Calibrated:
    vocabulary = view.module.config.get_text_config().vocab_size
    batch_size = 8
    if isinstance(calibration, Tensor) or (isinstance(calibration, Sequence) and _are_tokens(calibration)):
        parts = [calibration] if isinstance(calibration, Tensor) else list(calibration)
        calibration, batch_size = _token_batches(parts, vocabulary), max(len(part) for part in parts)
    if isinstance(calibration, TokenBatches):
        feasibility.check_calibration(view, steps, True, int(calibration.ids.shape[1]))
        feasibility.check_tags(steps, calibration.domain)
        return Calibrated(calibration, batch_size)
    settings = None if calibration is None else _settings(calibration)
    feasibility.check_calibration(view, steps, settings is not None, settings.length if settings else 0)
    feasibility.check_domains(steps, settings)
    if settings is None or not any(s.needs_text() for s in steps):
        return Calibrated(None)
    if tokenizer is None:
        raise InputError("calibration text needs the model's tokenizer: pass `tokenizer=`")
    processor = tokenizer if hasattr(tokenizer, "image_processor") else None
    draft = read_draft(settings, _words(tokenizer), Path.cwd(), vocab_size=vocabulary, processor=processor)
    feasibility.check_draft(steps, draft)
    text = finish(draft, view, lambda data: storage.statistics(_STATE, data), lambda tokens: None, monitor)
    return Calibrated(text, settings.batch_size)


def _words(tokenizer: Any) -> Any:
    """The tokenizer itself, where a processor was given in its place."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _source(
    original: PreTrainedModel | str | Path | None, view: MoEModel, steps: Sequence[Pass]
) -> Callable[[], MoEModel] | None:
    """What opens the original. Raises InputError when a pass needs it and it isn't there, or is the model itself."""
    learning = [step.name for step in steps if step.needs_original()]
    if not learning:
        return None
    if original is None or original is view.module:
        raise InputError(
            f"{learning[0]} learns from the original, and compress() changes the model in place: pass `original=`, the "
            "folder that the model was loaded from, or a copy of it"
        )
    if isinstance(original, str | Path):
        source = MoEModel.open(original, dtype=view.dtype, device=view.device)
    else:
        source = MoEModel.wrap(original)
    shapes = [model_shape(model).layers for model in (view, source)]
    if {i: s.num_experts for i, s in shapes[0].items()} != {i: s.num_experts for i, s in shapes[1].items()}:
        raise InputError("`original` is another model: its layers don't have the same numbers of experts")
    return lambda: source


def _are_tokens(values: Sequence[Any]) -> bool:
    return bool(values) and not isinstance(values, str) and all(isinstance(value, Tensor) for value in values)


def _token_batches(parts: list[Tensor], vocabulary: int) -> TokenBatches:
    """Token ids that the caller made. Raises DataError when the model can't read them."""
    shapes = [tuple(part.shape) for part in parts]
    if any(len(shape) != 2 or not all(shape) for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise DataError(f"calibration: token ids are tensors [sequences, length] of one length, not {shapes}")
    if any(part.is_floating_point() or part.dtype == torch.bool for part in parts):
        raise DataError(f"calibration: token ids are integers, not {parts[0].dtype}")
    ids = torch.cat([part.detach().to("cpu", torch.int64) for part in parts])
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise DataError(
            f"calibration: token ids go from {int(ids.min())} to {int(ids.max())}, the model knows {vocabulary}"
        )
    report = {"sequences": len(ids), "tokens": ids.numel(), "source": "token ids"}
    return TokenBatches(ids, [None] * len(ids), hashlib.sha256(ids.numpy().tobytes()).hexdigest(), report)


def _settings(calibration: Any) -> Calibration:
    sources = isinstance(calibration, str | Path | list | tuple)
    return make_part(Calibration, {"sources": calibration} if sources else calibration, "calibration")


def _windows(view: MoEModel, tokenizer: Any, wanted: Evaluation) -> list[WindowBatch]:
    if tokenizer is None:
        raise InputError("scoring text needs the model's tokenizer: pass `tokenizer=`")
    feasibility.check_length(view, wanted.length, "length")
    return load_text(_words(tokenizer), wanted, view.module.config.get_text_config().vocab_size)


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
        "passes": [{s.name: s.options.model_dump(mode="json")} for s in steps if s.round == 0],
    }
    return build(
        recipe=recipe,
        before=before,
        outcomes=outcomes,
        calibration=calibrated.text.report if calibrated.text is not None else None,
        scores_before=(scores.summary("before") | scores.generation(0)) if scores.before else {},
        scores_after=(scores.summary("after") | scores.drift() | scores.generation(1)) if scores.after else {},
        stages=monitor.records(),
        facts={"tokens_seen": calibrated.tokens},
    )


__all__ = ["CompressedModel", "compress"]
