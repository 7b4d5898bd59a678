"""Everything about a recipe that needs the model's shapes, checked before anything is loaded or measured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from moe_compress.calib.text import Calibration, Draft
from moe_compress.checkpoint.writer import neighbours, settled
from moe_compress.contract import followers
from moe_compress.errors import InputError, RecipeError, nearest
from moe_compress.export.targets import TARGETS, Target
from moe_compress.model import MoEModel
from moe_compress.model.fewer import AS_CONFIG, top_k_path
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Pass
from moe_compress.units import show_bytes

# Bytes that rows of dense experts' matrices are a multiple of: `grouped_mm` multiplies no others.
_ALIGNED = 16


def forecast(shape: ModelShape, passes: Sequence[Pass], target: Target) -> list[ModelShape]:
    """Sizes after each pass. Raises RecipeError, BudgetError for a pass that can't follow or a size that can't be."""
    shapes, first = [shape], shape.layers
    for number, step in enumerate(passes):
        step.start = shapes[number - step.round]
        entry = sum(other.round == 0 for other in passes[: number + 1]) - 1  # of the recipe
        for index, layer in shape.layers.items():
            if layer.kind not in step.accepts:
                before = f"can't follow {passes[number - 1].name}" if number else "can't change this model"
                able = ", ".join(followers(layer.kind)) or "no pass"
                raise RecipeError(
                    f"passes[{entry}]: {step.name} {before}: the experts of layer {index} are {layer.kind} already; "
                    f"what could follow: {able} (docs/passes.md)"
                )
        layers, shape = shape.layers, step.forecast(shape)
        for index, layer in layers.items():
            if layer.rules and shape.layers[index].num_experts != layer.num_experts:
                raise RecipeError(
                    f"passes[{entry}]: {step.name} can't follow a pass that skips experts: the rules of layer {index} "
                    f"({', '.join(layer.rules)}) are made for {layer.num_experts} experts; let {step.name} come first"
                )
        shapes.append(shape)
    last = shapes[-1]
    for index, layer in last.layers.items():
        multiple = _ALIGNED // layer.weight_bytes
        if layer.kind == "fused" and layer.intermediate % multiple and not first[index].intermediate % multiple:
            raise RecipeError(
                f"experts of layer {index} would have {layer.intermediate} neurons, and transformers' kernel takes "
                f"multiples of {multiple} alone: leave the option `multiple` of prune.neurons out"
            )
    if target.uniform_experts and len({layer.num_experts for layer in last.layers.values()}) > 1:
        raise RecipeError(f"target {target.name!r} loads the same number of experts in every layer only")
    return shapes[1:]


def check_runtime(model: MoEModel, shape: ModelShape, target: Target, wanted: str = "auto") -> None:
    """Raise RecipeError when the target doesn't load the result: for its experts, their names, or the format asked for.

    Args:
        model: what is compressed; its names on disk are the result's.
        shape: of the result.
        target: runtime that the result is for.
        wanted: format that the recipe asks for, "auto" for the target's own.
    """
    packed = {index: layer for index, layer in shape.layers.items() if layer.kind != "fused"}
    ruled = [i for i, layer in shape.layers.items() if set(layer.rules) - {AS_CONFIG}]
    if not ruled and any(layer.rules for layer in shape.layers.values()):
        top_k_path(model)
    if ruled and target.quantized_format != "native":
        raise RecipeError(
            f"target {target.name!r} runs no rules that skip experts, which layers {ruled} have: set `target: native`"
        )
    said = model.narrowed({i: None if layer.neurons else layer.intermediate for i, layer in shape.layers.items()})
    if isinstance(said, str) and target.quantized_format != "native":
        raise RecipeError(f"target {target.name!r} reads the experts' width from config.json: {said}; take 'native'")
    uniform = len({layer.num_experts for layer in shape.layers.values()}) == 1 and isinstance(said, list)
    form = target.dense_format if uniform and not packed and not ruled else target.quantized_format
    if form is None:
        raise RecipeError(
            f"target {target.name!r} is written from GGUF blocks: let `quantize.gguf` be the last pass (its types may "
            "be BF16 or F16)"
        )
    if wanted not in ("auto", form) and not (wanted == "native" and form == "hf" and target.quantized_format == wanted):
        other = next((t.name for t in TARGETS.values() if t.quantized_format == wanted != form and packed), None)
        hint = f"; the target {other!r} has it" if other else ""
        raise RecipeError(
            f"format: for the target {target.name!r} the result is written as {form!r}, not {wanted!r}{hint}"
        )
    family = type(model.module).__name__
    for index, layer in packed.items():
        if layer.biases and not target.biases:
            raise RecipeError(
                f"target {target.name!r} loads no quantized experts with biases, as {family} has (layer {index})"
            )
        if layer.matrices < 3 and not target.gateless:
            raise RecipeError(f"target {target.name!r} loads no quantized experts without a gate, as {family} has")
        if layer.kind == "packed" and layer.hidden % target.hidden_multiple:
            raise RecipeError(
                f"target {target.name!r} loads packed experts whose hidden size is a multiple of "
                f"{target.hidden_multiple}, and {family} has {layer.hidden} (layer {index}): take the target 'vllm'"
            )
        if target.per_expert and model.expert_names(index, layer.num_experts) is None:
            raise RecipeError(
                f"target {target.name!r} loads quantized experts that are stored one by one, and {family} stores those "
                f"of a layer together (layer {index}): take the target 'native', or a dense one"
            )


def check_calibration(model: MoEModel, passes: Sequence[Pass], has_text: bool, length: int) -> None:
    """Raise RecipeError when calibration text is needed and missing, or longer than the model can read."""
    needing = [step.name for step in passes if step.needs_text()]
    if needing and not has_text:
        raise RecipeError(
            f"{needing[0]} measures the model on text: add `calibration: {{sources: FILE.jsonl}}` to the recipe"
        )
    check_length(model, length if needing else 0, "calibration.length")


def check_domains(passes: Sequence[Pass], calibration: Calibration | None) -> None:
    """Raise RecipeError when a pass asks for domains that the calibration's settings rule out already."""
    asking = [step for step in passes if step.domains()]
    if calibration is None or not asking:
        return
    named = {source.domain for source in calibration.sources if source.domain is not None}
    if all(source.domain_field is None for source in calibration.sources):
        if not named:
            raise RecipeError(
                f"{asking[0].name}: `domains` needs text that says its domains: give the calibration's sources a "
                "`domain_field`, or a `domain`"
            )
        check_tags(passes, named)
    if calibration.domains is not None:
        check_tags(passes, calibration.domains)


def check_tags(passes: Sequence[Pass], tags: Iterable[str | None]) -> None:
    """Raise RecipeError when a pass asks for a domain that no calibration text is tagged with."""
    known = {tag for tag in tags if tag is not None}
    for step in passes:
        if lacking := [domain for domain in step.domains() or () if domain not in known]:
            raise RecipeError(
                f"{step.name}: no calibration text has the domain {lacking[0]!r}{nearest(lacking[0], known)}"
            )


def check_draft(passes: Sequence[Pass], draft: Draft) -> None:
    """Raise RecipeError when a pass asks for a domain that no sequence has, read or yet to be written."""
    written = [source.domain for source in draft.settings.sources if source.self_sampling is not None]
    check_tags(passes, [*draft.text.domain, *written])


def check_length(model: MoEModel, length: int, key: str) -> None:
    """Raise RecipeError when sequences are longer than the positions that the model knows."""
    known = positions(model.module.config)
    if known is not None and length > known:
        raise RecipeError(f"{key} is {length}, and the model reads at most {known} tokens (max_position_embeddings)")


def positions(config: PreTrainedConfig) -> int | None:
    """Tokens that a model reads at most, where its config says so."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    return known if isinstance(known, int) else None


def usual_length(config: PreTrainedConfig, usual: int) -> int:
    """Tokens of a sequence where nobody says: the usual, or as many as the model has positions for."""
    known = positions(config)
    return usual if known is None else min(usual, known)


def check_place(output: Path, workspace: Path, model: Path) -> None:
    """Raise InputError when writing the output could touch the model, or can't begin at all."""
    source, target = model.resolve(), settled(output).resolve()
    if target == source or source in target.parents or target in source.parents:
        how = "is" if target == source else "lies in" if source in target.parents else "holds"
        raise InputError(f"output {output} {how} the model's own folder {model}: choose another")
    for folder in (workspace, *neighbours(settled(output))):
        if source in (folder.resolve(), *folder.resolve().parents) or folder.resolve() in source.parents:
            raise InputError(f"the work on output {output} needs {folder}, and the model is there: choose another")
    parent = _existing(settled(output))
    if not parent.is_dir():
        raise InputError(f"output {output} can't be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {output} can't be made: {parent} may not be written to; choose another output")


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    folder = folder.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return folder


def check_disk(output: Path, workspace: Path, before: ModelShape, shapes: Sequence[ModelShape]) -> None:
    """Raise InputError when the result and the work on the way to it won't fit on the disk.

    The workspace holds one changed copy of the experts, and of what is packed beside them, at any time (a pass's layers
    replace the former pass's).
    """
    result = shapes[-1].total_bytes
    work = max(shape.work_bytes for shape in shapes)
    folder = _existing(settled(output))
    free = shutil.disk_usage(folder).free
    if result + work > free:
        raise InputError(
            f"{folder} has {show_bytes(free)} free; the result takes {show_bytes(result)} and the work on the way "
            f"to it {show_bytes(work)} more: free some, or choose an output on another disk"
        )
