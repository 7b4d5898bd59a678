"""What commands print."""

from __future__ import annotations

import inspect as python_inspect
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from moe_compress.calib.text import Draft
from moe_compress.checkpoint.decoded import DecodedCheckpoint
from moe_compress.checkpoint.names import local_folder
from moe_compress.errors import InputError
from moe_compress.export.targets import TARGETS
from moe_compress.feasibility import usual_length
from moe_compress.model import MoEModel, families
from moe_compress.model.shape import model_shape
from moe_compress.passes import all_passes, find_pass
from moe_compress.pipeline import Finished, Forecast
from moe_compress.recipe import Evaluation, Recipe
from moe_compress.report.text import headline
from moe_compress.units import show_bytes

# A line is not broken: paths stay whole where the output goes elsewhere.
console = Console(highlight=False, soft_wrap=True)
# Options of passes that nobody leaves as they are.
_CHOSEN = ("keep", "experts", "neurons", "scheme", "bits", "size", "widths", "experts_per_token")


def show_forecast(recipe: Recipe, model: MoEModel, forecast: Forecast, draft: Draft | None) -> None:
    """Sizes before and after each pass, and what would be calibrated on."""
    _show_stored(_quantized(model))
    table = Table("", "checkpoint", "experts", "bits per weight", "experts per layer", box=None, pad_edge=False)
    for name, shape in [
        ("source", forecast.before),
        *zip([p.name for p in forecast.passes], forecast.shapes, strict=True),
    ]:
        counts = sorted({layer.num_experts for layer in shape.layers.values()})
        table.add_row(
            name,
            show_bytes(shape.total_bytes),
            show_bytes(shape.expert_bytes),
            f"{shape.bits_per_weight:.3g}",
            ", ".join(map(str, counts)),
        )
    console.print(table)
    if draft is not None:
        count, length = len(draft.text) + sum(draft.sampled.values()), draft.settings.length
        console.print(f"calibrated on {count} sequences of {length} tokens")
    console.print(f"{recipe.model} → {recipe.output} for {recipe.target}; nothing was changed")


def show_result(finished: Finished) -> None:
    """The before/after table, and where everything is."""
    table = Table("", "before", "after", box=None, pad_edge=False)
    for row in headline(finished.report):
        table.add_row(*row)
    console.print(table)
    for step in finished.report["passes"]:
        for note in step["notes"]:
            console.print(f"{step['name']}: {note}", markup=False)
    console.print(f"checkpoint: {finished.output}", markup=False)
    console.print(f"report:     {finished.output / 'report.md'}", markup=False)


def inspected(path: str) -> dict[str, Any]:
    """What a checkpoint holds, as JSON values."""
    model = MoEModel.open(path)
    shape = model_shape(model)
    layers = []
    for index, layer in shape.layers.items():
        layers.append(
            {
                "layer": index,
                "experts": layer.num_experts,
                "top_k": layer.top_k,
                "routing_groups": layer.groups,
                "hidden": layer.hidden,
                "neurons": layer.intermediate,
                "kind": layer.kind,
                "bytes": layer.bytes,
            }
        )
    return {
        "model_type": model.module.config.model_type,
        "architecture": type(model.module).__name__,
        "decoder_layers": len(model.layers),
        "layers_with_experts": len(layers),
        "bytes": shape.total_bytes,
        "quantized_source": _quantized(model),
        "expert_bytes": shape.expert_bytes,
        "bits_per_weight": shape.bits_per_weight,
        "expert_weights": sum(layer.weights for layer in shape.layers.values()),
        "config_keys_of_the_expert_count": [".".join(map(str, p)) for p in model.count_paths],
        "experts_elsewhere": model.untouched,
        "tensors_the_model_class_does_not_own": model.weights.unowned if model.weights else [],
        "layers": layers,
    }


def _quantized(model: MoEModel) -> dict[str, Any] | None:
    """How the folder is quantized, and its bytes as stored, where it is seen dense."""
    source = model.source
    if not isinstance(source, DecodedCheckpoint):
        return None
    return {"method": source.method, "bytes": source.stored_bytes}


def _show_stored(quantized: dict[str, Any] | None) -> None:
    if quantized is not None:
        stored = f"{show_bytes(quantized['bytes'])} as stored ({quantized['method']})"
        console.print(f"{stored}; decoded while it is read, sizes below are of the dense weights")


def show_inspection(found: dict[str, Any]) -> None:
    """The same for people."""
    console.print(
        f"{found['architecture']} ({found['model_type']}): {found['decoder_layers']} decoder layers, "
        f"{found['layers_with_experts']} with experts"
    )
    _show_stored(found["quantized_source"])
    share = found["expert_bytes"] / max(1, found["bytes"])
    console.print(
        f"{show_bytes(found['bytes'])}, of which experts {show_bytes(found['expert_bytes'])} ({share:.0%}), "
        f"{found['expert_weights'] / 1e9:.3g} billion weights at {found['bits_per_weight']:.3g} bits"
    )
    table = Table(
        "layers", "experts", "top-k", "groups", "hidden", "neurons", "held as", "bytes each", box=None, pad_edge=False
    )
    for first, last, layer in _runs(found["layers"]):
        groups = layer["routing_groups"]
        table.add_row(
            f"{first}" if first == last else f"{first}–{last}",
            str(layer["experts"]),
            str(layer["top_k"]),
            "–" if groups is None else f"{groups[1]} of {groups[0]}",
            str(layer["hidden"]),
            str(layer["neurons"]),
            layer["kind"],
            show_bytes(layer["bytes"]),
        )
    console.print(table)
    if found["experts_elsewhere"]:
        console.print(f"left as they are: {', '.join(found['experts_elsewhere'])}", markup=False)
    if found["tensors_the_model_class_does_not_own"]:
        names = found["tensors_the_model_class_does_not_own"]
        console.print(
            f"carried over as they are: {len(names)} tensors that the model class doesn't own ({names[0]}, …)"
        )


def _runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Consecutive layers that are alike."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for layer in layers:
        same = runs and {**runs[-1][2], "layer": 0} == {**layer, "layer": 0} and runs[-1][1] == layer["layer"] - 1
        if same:
            runs[-1] = (runs[-1][0], layer["layer"], runs[-1][2])
        else:
            runs.append((layer["layer"], layer["layer"], layer))
    return runs


def evaluated(model: str, against: str | None, tasks: str | None, device: str, **wanted: Any) -> dict[str, Any]:
    """Scores of a checkpoint in the shape of a report's `after`; of a quantized one seen dense, how it is stored."""
    import tempfile

    from moe_compress.evaluate.score import check_scoring, score_folders
    from moe_compress.progress import Monitor
    from moe_compress.report.build import sizes
    from moe_compress.resources import device_and_dtype

    where, dtype = device_and_dtype(device, "auto")
    names = [t for t in (tasks or "").split(",") if t]
    try:
        prompts = wanted.pop("generation", None)
        given = {k: v for k, v in wanted.items() if v is not None}
        written = None if prompts is None else {"prompts": prompts}
        evaluation = Evaluation.model_validate({"tasks": names, "generation": written, **given})
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0] if first["loc"] else "generation")
        raise InputError(f"--{option.replace('_', '-')}: {first['msg'].removeprefix('Value error, ')}") from error
    opened = MoEModel.open(model, dtype=dtype, device=where)
    if "length" not in given:
        evaluation = evaluation.model_copy(update={"length": usual_length(opened.module.config, evaluation.length)})
    check_scoring(opened, evaluation)
    with tempfile.TemporaryDirectory() as folder:
        original = Path(local_folder(against)) if against else None
        _, after = score_folders(opened.source.folder, original, evaluation, opened, Path(folder), Monitor())
    return {
        **sizes(model_shape(opened)),
        **{key: {} for key in ("perplexity", "tasks", "generation", "experts_per_token", "kl", "agreement")},
        **after,
        **({"quantized_source": quantized} if (quantized := _quantized(opened)) else {}),
    }


def show_scores(scores: dict[str, Any]) -> None:
    """Scores as a table."""
    _show_stored(scores.get("quantized_source"))
    table = Table("", "", box=None, pad_edge=False, show_header=False)
    blank = {"bytes": 0, "expert_bytes": 0, "bits_per_weight": 0, "perplexity": {}, "tasks": {}}
    for name, _, value in headline({"before": blank, "after": scores}):
        table.add_row(name, value)
    console.print(table)


def show_passes() -> None:
    """All passes and targets."""
    table = Table("pass", "what it does", box=None, pad_edge=False)
    for name, cls in all_passes().items():
        table.add_row(name, cls.summary)
    console.print(table)
    console.print()
    table = Table("target", "what it is", box=None, pad_edge=False)
    for target in TARGETS.values():
        table.add_row(target.name, target.summary)
    console.print(table)
    console.print("\n`moe-compress passes NAME` explains a pass and its options; docs/targets.md, what targets load")


def show_pass(name: str) -> None:
    """One pass and its options."""
    cls = find_pass(name)
    console.print(f"{cls.name}: {cls.summary}", markup=False)
    console.print(python_inspect.cleandoc(cls.__doc__ or ""), markup=False)
    if cls.paper:
        console.print(f"from: {cls.paper}", markup=False)
    table = Table("option", "default", "meaning", box=None, pad_edge=False)
    for option, field in sorted(cls.Options.model_fields.items(), key=_chosen_first):
        default = "needed" if field.is_required() else repr(field.default)
        table.add_row(option, default, field.description or "")
    console.print()
    console.print(table)
    for option, choices in cls.choices().items():
        table = Table(option, "from", box=None, pad_edge=False)
        for choice, source in choices.items():
            table.add_row(choice, source)
        console.print()
        console.print(table)


def _chosen_first(option: tuple[str, Any]) -> int:
    """What decides about sizes comes first; the rest as it was declared."""
    return _CHOSEN.index(option[0]) if option[0] in _CHOSEN else len(_CHOSEN)


def show_families() -> None:
    """Families of the installed transformers."""
    table = Table("family", "", box=None, pad_edge=False)
    found = families.installed()
    for name, status in found.items():
        table.add_row(name, status if status == "supported" else f"refused: {status}")
    console.print(table)
    supported = sum(status == "supported" for status in found.values())
    console.print(f"\n{supported} of {len(found)} families are supported")
