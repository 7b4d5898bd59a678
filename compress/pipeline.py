"""A whole run: recipe in, verified and scored checkpoint out.

validate → feasibility → (measure → plan → apply) per pass → export → verify → score → report. Every stage that
finishes is kept in the workspace beside the output; the same command continues where a killed run was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress import feasibility, probe
from moe_compress.calib.draft import finish
from moe_compress.calib.images import find_processor
from moe_compress.calib.text import Draft, read_draft
from moe_compress.calib.tokenizer import find_tokenizer
from moe_compress.checkpoint.decoded import DecodedCheckpoint
from moe_compress.checkpoint.reader import read_json
from moe_compress.checkpoint.workspace import Workspace, clear, short_digest
from moe_compress.checkpoint.writer import MANIFEST, check_output, file_digest, settled
from moe_compress.engine import Calibrated, Outcome, Work, run_passes, slots_after
from moe_compress.errors import CheckpointError, InputError
from moe_compress.evaluate.score import check_scoring, score_folders
from moe_compress.export.gguf_tokenizer import FileTokenizer, read_tokenizer
from moe_compress.export.gguf_write import RoundedSource, write_gguf
from moe_compress.export.loader import load
from moe_compress.export.verify import Verified, loaded_bytes, verify
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel, hf
from moe_compress.model.shape import ModelShape, model_shape
from moe_compress.passes import Pass
from moe_compress.progress import Monitor
from moe_compress.quant.gguf import QuantizeGGUF
from moe_compress.recipe import Recipe, make_recipe, read_recipe
from moe_compress.recipes import find_recipe
from moe_compress.report.build import build, versions
from moe_compress.report.text import write_reports
from moe_compress.resources import device_and_dtype, holding, holding_all, memory_limit
from moe_compress.storage import CommittedBlocks

# Written to the workspace when the output holds this run's checkpoint, read back and equal.
_PUBLISHED = "published"


@dataclass(frozen=True)
class Forecast:
    """What a run would give (`--dry-run`): sizes before, after each pass, and what is needed."""

    passes: list[Pass]
    before: ModelShape
    shapes: list[ModelShape]

    @property
    def after(self) -> ModelShape:
        """Sizes of the result."""
        return self.shapes[-1]


@dataclass(frozen=True)
class Finished:
    """What a run gave.

    Attributes:
        output: the checkpoint's folder; report.json and report.md are in it.
        report: what report.json holds.
    """

    output: Path
    report: dict[str, Any]


def plan_run(recipe: Recipe) -> tuple[MoEModel, Forecast]:
    """Open the model and check everything that needs no data. Raises InputError and its kinds."""
    passes = recipe.steps()
    feasibility.check_place(Path(recipe.output), _workspace_of(recipe), Path(recipe.model))
    device, dtype = device_and_dtype(recipe.compute.device, recipe.compute.dtype)
    model = MoEModel.open(recipe.model, dtype=dtype, device=device, dequantize=True)
    before = model_shape(model)
    shapes = feasibility.forecast(before, passes, recipe.goal)
    feasibility.check_runtime(model, shapes[-1], recipe.goal, recipe.format)
    if isinstance(passes[-1], QuantizeGGUF):
        _tokenizer_of(recipe, passes[-1], model)
    calibration = recipe.calibration
    feasibility.check_calibration(model, passes, calibration is not None, calibration.length if calibration else 0)
    feasibility.check_domains(passes, calibration)
    check_scoring(model, recipe.evaluate, recipe.compute.memory)
    feasibility.check_disk(Path(recipe.output), _workspace_of(recipe), before, shapes)
    return model, Forecast(passes, before, shapes)


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    overrides: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    monitor: Monitor | None = None,
) -> Finished:
    """Carry out a recipe.

    Args:
        recipe: a recipe, a dict of its keys, the path of its file, or the name of a ready one.
        overrides: dotted keys → YAML values, for a file.
        overwrite: whether the output folder may hold something (it is replaced when the new result is complete).
        fresh: forget the finished layers of an earlier run with this output. What was measured on the same model and
            data, in the same way, is kept.
        monitor: shows and remembers stages.

    Raises:
        InputError and its kinds: recipe, model or data are wrong; nothing was changed.
        RunError and its kinds: something failed on the way; the same call continues.
    """
    if overrides and isinstance(recipe, Mapping | Recipe):
        raise InputError("`overrides` are for a recipe's file: change the values of this one instead")
    if isinstance(recipe, Mapping):
        recipe = make_recipe(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = read_recipe(find_recipe(str(recipe)), overrides)
    output, place = Path(recipe.output), _workspace_of(recipe)
    monitor = monitor or Monitor()
    with monitor.stage("check"):
        job = _opened(recipe, monitor)
        own = _run_of(output) == job.run_id and not fresh
        if own and place.is_dir() and not Workspace.holds_work(place) and (output / "report.json").is_file():
            clear(place)  # all that was left to do
            return Finished(output, read_json(output / "report.json"))
        own = own and Workspace.holds_work(place)
        if not own:
            check_output(output, overwrite)
        workspace = Workspace(place, job.identity, fresh=fresh)
    with workspace:
        if workspace.resumed:
            what = "starting over with what was measured before" if fresh else "continuing the run"
            monitor.note(f"{what} in {workspace.folder}")
        # What is there may be what `overwrite` was said of, unless this run has put it there.
        published = own and (not overwrite or workspace.read(_PUBLISHED) is not None)
        work = _work(job, workspace)
        outcomes = run_passes(work, job.forecast.passes, job.forecast.before, job.state)
        if not published:
            _export(job, work.calibrated, outcomes, overwrite)
        verified = _verify(job, workspace)
        scores = _score(job, workspace, outcomes)
        report = _report(job, work.calibrated, outcomes, verified, scores)
        write_reports(output, report)
        if not recipe.keep_workspace:
            workspace.remove()
    return Finished(output, report)


@dataclass(frozen=True)
class _Job:
    """A recipe that passed all checks, and what was opened for it.

    Attributes:
        draft: calibration text as read; None where no pass needs any.
        tokenizer: None if the model has none.
        identity: what decides about the bytes of the result.
    """

    recipe: Recipe
    model: MoEModel
    forecast: Forecast
    draft: Draft | None
    tokenizer: Any
    identity: dict[str, Any]
    monitor: Monitor

    @property
    def run_id(self) -> str:
        """Says in a result which run wrote it."""
        return short_digest(self.identity)

    @property
    def state(self) -> str:
        """What statistics are of, and what measures them: plugins may bring their own. All else may differ."""
        return short_digest([self.identity[key] for key in ("model", "plugins", "compute", "versions")])


def _opened(recipe: Recipe, monitor: Monitor) -> _Job:
    model, forecast = plan_run(recipe)
    fingerprint = model.source.fingerprint()
    draft, tokenizer = read_calibration(recipe, model, forecast.passes)
    return _Job(recipe, model, forecast, draft, tokenizer, _identity(recipe, fingerprint, draft), monitor)


def _work(job: _Job, workspace: Workspace) -> Work:
    """The model as finished layers left it, its calibration text, and where what passes do is kept."""
    recipe, model, passes = job.recipe, job.model, job.forecast.passes

    def room(tokens: int) -> Path | None:
        return holding(model, tokens, workspace.scratch("hidden"), recipe.compute.hidden_states)

    def original() -> MoEModel:
        return MoEModel.open(recipe.model, dtype=model.dtype, device=model.device, dequantize=True)

    calibrated = Calibrated(None)
    if job.draft is not None:
        text = finish(
            job.draft,
            model,
            lambda data: workspace.statistics(job.state, data),
            room,
            job.monitor,
            lambda: _whole(model, recipe),
        )
        calibrated = Calibrated(text, job.draft.settings.batch_size, room(text.tokens))
    if any(step.goes_back() for step in passes):
        whole = workspace.scratch("all-hidden")
        calibrated.hold_all = holding_all(model, calibrated.tokens, whole, recipe.compute.hidden_states)
    model.overlay = CommittedBlocks([workspace.pass_store(number, step.name) for number, step in enumerate(passes)])
    return Work(model, calibrated, workspace, job.monitor, original)


def _export(job: _Job, calibrated: Calibrated, outcomes: list[Outcome], overwrite: bool) -> None:
    recipe, model, last = job.recipe, job.model, job.forecast.passes[-1]
    output, goal = Path(recipe.output), recipe.goal
    probed, laid_out = model, None
    if isinstance(last, QuantizeGGUF):
        # What lies outside the experts is rounded only now, so the probe is asked of a model that reads it rounded.
        laid_out = last.layout(outcomes[-1].shape)
        source = RoundedSource(model.source, laid_out)
        probed = MoEModel.open(
            recipe.model, dtype=model.dtype, device=model.device, overlay=model.overlay, source=source
        )
    with job.monitor.stage("probe"):
        ids = calibrated.text.ids if calibrated.text is not None else None
        expected = probe.streamed(probed, probe.probe_tokens(ids, job.tokenizer))
    manifest = {
        "run": job.run_id,
        "versions": versions(),
        "recipe": recipe.plain(),
        "passes": [{"name": o.name, "plan": o.plan.summary} for o in outcomes],
        "probe": expected,
    }
    with job.monitor.stage("export", len(model.layers)) as progress:
        if isinstance(last, QuantizeGGUF) and laid_out is not None:
            words = _tokenizer_of(recipe, last, model)
            write_gguf(model, output, manifest, progress, laid_out, words, overwrite=overwrite, target=goal)
        else:
            quantized = goal.quantized_format or "native"
            write_folder(model, output, manifest, progress, overwrite=overwrite, quantized=quantized, target=goal)


def _verify(job: _Job, workspace: Workspace) -> Verified:
    """Read the result back; what isn't equal isn't remembered as published."""
    output = Path(job.recipe.output)
    with job.monitor.stage("verify", len(read_json(output / MANIFEST)["tensors"])) as progress:
        workspace.discard(_PUBLISHED)
        verified = verify(output, progress, str(job.model.device), job.recipe.compute.memory)
    workspace.write(_PUBLISHED, {"run": job.run_id})
    return verified


def _score(job: _Job, workspace: Workspace, outcomes: list[Outcome]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of the original and of the result."""
    recipe = job.recipe
    return score_folders(
        Path(recipe.output),
        Path(recipe.model),
        recipe.evaluate,
        job.model,
        workspace.scratch("score"),
        job.monitor,
        recipe.compute.memory,
        slots_after(outcomes, job.forecast.before),
    )


def _tokenizer_of(recipe: Recipe, step: QuantizeGGUF, model: MoEModel) -> FileTokenizer:
    """The tokenizer that goes into a GGUF file. Raises InputError and its kinds."""
    vocabulary = model.module.config.get_text_config().vocab_size
    return read_tokenizer(Path(recipe.model), vocabulary, step.options.tokenizer_pre)


def read_calibration(recipe: Recipe, model: MoEModel, passes: list[Pass]) -> tuple[Draft | None, Any]:
    """Calibration text as far as it can be read without running the model, if a pass needs any; and the tokenizer.

    Raises InputError and its kinds: no text, too little, or not what the passes need.
    """
    tokenizer = find_tokenizer(recipe.model)
    needed = any(step.needs_text() for step in passes)
    if recipe.calibration is None or not needed:
        return None, tokenizer
    if tokenizer is None:
        raise InputError(f"{recipe.model} has no tokenizer that transformers can load, and calibration needs one")
    vocabulary = model.module.config.get_text_config().vocab_size
    processor = find_processor(recipe.model) if recipe.calibration.has_images else None
    draft = read_draft(recipe.calibration, tokenizer, Path.cwd(), vocab_size=vocabulary, processor=processor)
    feasibility.check_draft(passes, draft)
    return draft, tokenizer


def _whole(model: MoEModel, recipe: Recipe) -> MoEModel | None:
    """The source in memory, if it may be there as a whole."""
    folder, dtype = Path(recipe.model), model.dtype
    quantized = read_json(folder / "config.json").get("quantization_config")
    if quantized or loaded_bytes(folder, dtype) > memory_limit(recipe.compute.memory):
        return None
    with hf.quiet():
        return MoEModel.wrap(load(folder, dtype=dtype).to(model.device))


def _identity(recipe: Recipe, fingerprint: str, draft: Draft | None) -> dict[str, Any]:
    """What decides about the bytes of the result: finished work of another identity is not this run's.

    Plugins by their names, wherever they lie, with the digests of all files of that name.
    """
    plain = recipe.plain()
    plugins: dict[str, list[str]] = {}
    for plugin in map(Path, recipe.plugins):
        plugins.setdefault(plugin.name, []).append(file_digest(plugin))
    return {
        "model": fingerprint,
        "plugins": plugins,
        "passes": plain["passes"],
        "target": plain["target"],
        "calibration": plain["calibration"],
        "data": draft.digest if draft is not None else "",
        "compute": {k: v for k, v in plain["compute"].items() if k not in ("hidden_states", "memory")},
        "versions": versions(),
    }


def _workspace_of(recipe: Recipe) -> Path:
    output = settled(Path(recipe.output))
    return output.with_name(output.name + ".work")


def _run_of(output: Path) -> Any:
    """Which run wrote the output folder, if one did: then only what comes after the export is left to do."""
    try:
        return read_json(output / MANIFEST).get("run")
    except CheckpointError:
        return None


def _report(
    job: _Job,
    calibrated: Calibrated,
    outcomes: list[Outcome],
    verified: Verified,
    scores: tuple[dict[str, Any], dict[str, Any]],
) -> dict[str, Any]:
    source = job.model.source
    return build(
        recipe=job.recipe.plain(),
        before=job.forecast.before,
        outcomes=outcomes,
        calibration=calibrated.text.report if calibrated.text is not None else None,
        scores_before=scores[0],
        scores_after=scores[1],
        stages=job.monitor.records(),
        facts={
            "source": {
                "quantization": source.method if isinstance(source, DecodedCheckpoint) else None,
                "bytes": source.stored_bytes if isinstance(source, DecodedCheckpoint) else source.nbytes,
            },
            "verification": verified.to_json(),
            "tokens_seen": calibrated.tokens,
            "forecast_bytes": job.forecast.after.total_bytes,
        },
    )


__all__ = ["Finished", "Forecast", "plan_run", "read_calibration", "run"]
