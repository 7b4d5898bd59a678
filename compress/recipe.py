"""Recipes: what to compress, with what, how far, for whom. Read, checked, and refused with file, line and key.

A recipe is a YAML file. Everything that can be wrong about it without looking at a model is found here; what needs the
model's shapes is found by `feasibility.py`, before any work.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moe_compress.calib.text import Calibration
from moe_compress.checkpoint.names import ModelPath
from moe_compress.errors import RecipeError
from moe_compress.export.targets import Target, find_target
from moe_compress.passes import Pass, find_pass, load_plugin
from moe_compress.rounds import in_rounds
from moe_compress.units import UserPath, checked_size

KeyPath = tuple[str | int, ...]
Part = TypeVar("Part", bound=BaseModel)


class Generation(BaseModel):
    """Greedy continuations of held-out text, and how much they repeat themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int = Field(default=20, ge=1, description="Prompts: beginnings of windows spread over all texts")
    prompt: int = Field(default=32, ge=1, description="Tokens of a prompt")
    tokens: int = Field(default=128, ge=1, description="Tokens that are written at the most")
    ngram: int = Field(default=4, ge=1, description="Tokens of the n-grams whose repetition is counted")


class Evaluation(BaseModel):
    """What to score, before and after."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: list[UserPath] = Field(
        default=[], description="Text files, folders or globs for perplexity, KL divergence and agreement"
    )
    field: str = Field(default="text", description="Field of JSONL or Parquet rows that holds the text")
    length: int = Field(default=2048, ge=2, description="Tokens of one window")
    max_tokens: int | None = Field(default=None, ge=2, description="Tokens of each file at the most; default: all")
    batch_size: int = Field(default=8, ge=1, description="Windows that run at a time")
    tasks: list[str] = Field(default=[], description="lm-eval tasks")
    task_path: UserPath | None = Field(
        default=None, description="Folder with task files of your own; default: lm-eval's tasks"
    )
    limit: int | None = Field(default=None, ge=1, description="Items of each task at the most; default: all")
    generation: Generation | None = Field(
        default=None,
        description="Let both models continue prompts from `text` greedily ({} for 20 prompts), and count repetitions; "
        "loads them whole",
    )

    @model_validator(mode="after")
    def _prompts_are_text(self) -> Self:
        if self.generation is not None and not self.text:
            raise ValueError("generation takes its prompts from `text`: name files there")
        return self


class Compute(BaseModel):
    """Where and how to compute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, …")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="In what live layers compute; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    memory: Annotated[str, BeforeValidator(lambda value: value if value == "auto" else checked_size(value))] = Field(
        default="auto",
        description='Most that a whole model may take where loading it is an option (verifying, tasks), e.g. "8 GB"; '
        "auto: 70% of what is free. A larger one is streamed layer by layer",
    )
    hidden_states: Literal["auto", "memory", "disk"] = Field(
        default="auto", description="Where hidden states of the calibration text wait between layers"
    )


class Recipe(BaseModel):
    """A whole recipe. `steps` and `goal` are its passes and target, ready to use."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: ModelPath = Field(
        description="Checkpoint folder (config.json and safetensors), or its name on the Hub if the cache has it"
    )
    output: UserPath = Field(description="Folder for the result; must not exist, or be empty")
    target: str = Field(
        default="native", description="Runtime that the result is for; `moe-compress passes` lists them"
    )
    format: Literal["auto", "hf", "native", "compressed-tensors", "gptq", "gguf"] = Field(
        default="auto", description="What the result must be written as; auto: what the target loads (docs/targets.md)"
    )
    passes: list[Any] = Field(min_length=1, description="Passes in order: a name, or {name: {option: value}}")
    calibration: Calibration | None = Field(default=None, description="Text that statistics are measured on")
    evaluate: Evaluation = Field(default=Evaluation(), description="What to score, before and after")
    compute: Compute = Field(default=Compute(), description="Where and how to compute")
    seed: int = Field(
        default=0, ge=0, lt=1 << 32, description="Seed of everything random in the passes that name none of their own"
    )
    plugins: list[UserPath] = Field(default=[], description="Python files that register passes of your own")
    keep_workspace: bool = Field(default=False, description="Keep finished statistics and layers after success")

    @property
    def goal(self) -> Target:
        """The target."""
        return find_target(self.target)

    def steps(self) -> list[Pass]:
        """The passes with their options; of one that goes in rounds, each of them."""
        return [part for step in self._entries() for part in in_rounds(step)]

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON values, defaults of passes filled in: what is recorded, and what resuming compares."""
        values = self.model_dump(mode="json")
        values["passes"] = [{step.name: step.options.model_dump(mode="json")} for step in self._entries()]
        return values

    def _entries(self) -> list[Pass]:
        return [build_pass(entry, self.goal, ("passes", number), self.seed) for number, entry in enumerate(self.passes)]


class _KeyError(RecipeError):
    """A recipe error at a key, before file and line are known."""

    def __init__(self, path: KeyPath, message: str):
        super().__init__(message)
        self.path = path


def read_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: YAML file.
        overrides: dotted keys → YAML values ("passes.0.keep": "0.5"), as `--set` gives them.

    Raises RecipeError with file, line, key and, for a misspelt one, the nearest valid name.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no such recipe: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} can't be read as a recipe: {error}") from error
    try:
        node = yaml.compose(text)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if (twice := _twice(node)) is not None:
        raise RecipeError(f"{path}:{twice.start_mark.line + 1}: the key {twice.value!r} is there twice")
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping (model: …, output: …, passes: …)")
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    try:
        return _make(values)
    except _KeyError as error:
        at = _line(node, error.path)
        where = f"{path}:{at}" if at else str(path)
        raise RecipeError(f"{where}: {_dotted(error.path)}: {error}") from error


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Check a recipe given as a dict. Raises RecipeError with the key."""
    try:
        return _make(values)
    except _KeyError as error:
        raise RecipeError(f"{_dotted(error.path)}: {error}") from error


def make_part(part: type[Part], values: Any, key: str) -> Part:
    """Check a part of a recipe (calibration, evaluate), given as a dict or ready. Raises RecipeError with the key."""
    if isinstance(values, part):
        return values
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{key}: {type(values).__name__} can't be read as {part.__name__}: give a mapping of its keys"
        )
    try:
        return part.model_validate(values)
    except ValidationError as error:
        explained = _explained(error, part, (key,))
        raise RecipeError(f"{_dotted(explained.path)}: {explained}") from error


def make_passes(entries: Sequence[Any], target: Target) -> list[Pass]:
    """The passes of a recipe given as a list, rounds one by one. Raises RecipeError with the key."""
    try:
        steps = [build_pass(entry, target, ("passes", number)) for number, entry in enumerate(entries)]
        return [part for step in steps for part in in_rounds(step)]
    except _KeyError as error:
        raise RecipeError(f"{_dotted(error.path)}: {error}") from error


def _make(values: Mapping[str, Any]) -> Recipe:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _explained(error, Recipe, ()) from error
    for plugin in recipe.plugins:
        load_plugin(Path(plugin))
    try:
        find_target(recipe.target)
    except RecipeError as error:
        raise _KeyError(("target",), str(error)) from error
    recipe.steps()
    return recipe


def build_pass(entry: Any, target: Target, path: KeyPath = (), seed: int = 0) -> Pass:
    """A pass from its entry in a recipe: a name, {name: options}, or a Pass already.

    `seed`: of passes that have one and name none.
    """
    if isinstance(entry, Pass):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise _KeyError(path, "a pass is a name, or one name with its options: {prune.experts: {keep: 0.75}}")
    ((name, options),) = entry.items()
    try:
        cls = find_pass(str(name))
    except RecipeError as error:
        raise _KeyError(path, str(error)) from error
    if options is not None and not isinstance(options, Mapping):
        raise _KeyError((*path, name), "options are a mapping")
    seeded = {"seed": seed} if "seed" in cls.Options.model_fields else {}
    try:
        return cls(cls.Options.model_validate({**seeded, **(options or {})}), target)
    except ValidationError as error:
        raise _explained(error, cls.Options, (*path, name)) from error
    except RecipeError as error:  # of an option that looks its value up
        raise _KeyError((*path, name), str(error)) from error


def _explained(error: ValidationError, model: type[BaseModel], path: KeyPath) -> _KeyError:
    """The first thing that is wrong, in words of the recipe."""
    first = error.errors()[0]
    location = tuple(first["loc"])
    owner = _model_at(model, location[:-1])
    if first["type"] == "extra_forbidden":
        known = list(owner.model_fields) if owner else []
        close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
        return _KeyError((*path, *location), f"unknown key {location[-1]!r}{hint}")
    if first["type"] == "missing":
        field = owner.model_fields.get(str(location[-1])) if owner else None
        what = f" ({field.description})" if field is not None and field.description else ""
        return _KeyError((*path, *location), f"this key is needed{what}")
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool)) and repr(given) not in message else ""
    return _KeyError((*path, *location), f"{message}{shown}")


def _model_at(model: type[BaseModel], location: KeyPath) -> type[BaseModel] | None:
    """The pydantic model whose fields live at a location."""
    current: type[BaseModel] | None = model
    for key in location:
        if current is None:
            return None
        if isinstance(key, int) or key not in current.model_fields:
            continue  # an index, or the name of a union's member
        found = [
            a
            for a in _flatten(current.model_fields[key].annotation)
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        current = found[0] if found else None
    return current


def _flatten(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [annotation] if not inner else [a for part in inner for a in _flatten(part)]


def _override(values: dict[str, Any], key: str, text: str) -> None:
    """Set a dotted key. An entry of `passes` is reached by number, or by name; its options follow directly."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {key}={text}: the value is not YAML") from error
    current: Any = values
    parts = key.split(".")
    if parts[0] == "passes" and len(parts) > 2:
        current, parts = _pass_options(values, parts, key)
    for part in parts[:-1]:
        if isinstance(current, dict):
            current = current.setdefault(part, {})
        elif isinstance(current, list) and part.isdigit() and int(part) < len(current):
            current = current[int(part)]
        else:
            raise RecipeError(f"--set {key}: nothing to set at {part!r}")
    last = parts[-1]
    if isinstance(current, dict):
        current[last] = value
    elif isinstance(current, list) and last.isdigit() and int(last) < len(current):
        current[int(last)] = value
    else:
        raise RecipeError(f"--set {key}: nothing to set at {last!r}")


def _pass_options(values: dict[str, Any], parts: list[str], key: str) -> tuple[dict[str, Any], list[str]]:
    entries = values.get("passes")
    if not isinstance(entries, list):
        raise RecipeError(f"--set {key}: the recipe has no list of passes")
    names = [next(iter(e)) if isinstance(e, dict) and e else e for e in entries]
    if parts[1].isdigit() and int(parts[1]) < len(entries):
        number, rest = int(parts[1]), parts[2:]
        if len(rest) > 2 and ".".join(rest[:2]) == names[number]:  # as messages write it
            rest = rest[2:]
    elif len(parts) > 3 and ".".join(parts[1:3]) in names:
        number, rest = names.index(".".join(parts[1:3])), parts[3:]
    else:
        raise RecipeError(f"--set {key}: no such pass; there are {', '.join(f'{i}: {n}' for i, n in enumerate(names))}")
    name = names[number]
    options = entries[number].get(name) if isinstance(entries[number], dict) else None
    entries[number] = {name: dict(options or {})}
    return entries[number][name], rest


def _twice(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first key that its mapping has already: YAML's reader would take the last and say nothing."""
    parts = [node] if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
    for part in parts:
        known: set[str] = set()
        for item in part.value:
            key, value = item if isinstance(item, tuple) else (None, item)
            if isinstance(key, yaml.ScalarNode):
                if key.value in known:
                    return key
                known.add(key.value)
            if isinstance(value, yaml.SequenceNode | yaml.MappingNode) and value not in parts:
                parts.append(value)
    return None


def _line(node: yaml.Node | None, path: KeyPath) -> int | None:
    """Line of the deepest part of a key path that the file has, if it has any."""
    line = None
    for key in path:
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == str(key)]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _dotted(path: KeyPath) -> str:
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text or "recipe"
