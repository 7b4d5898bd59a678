"""Task scores from lm-eval, of models in memory and of models that don't fit there.

The contract:
- A loaded model is scored by lm-eval's own `HFLM`. A model on disk is scored with one decoder layer in memory: the
  requests of all tasks go through each layer together (those for rolling log-likelihood, as in perplexity tasks, in a
  second turn). Both agree to rounding.
- Equal calls give equal scores: nothing is random but few-shot examples, which lm-eval draws with fixed seeds. The
  caller's random state, log levels and streams are afterwards what they were.
- What a user can put right is an `InputError` of one line, raised before the model runs wherever it is known then.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_compress.errors import InputError, nearest
from moe_compress.progress import Progress

from .harness import language_model, no_generation, quiet, replaced

_log = logging.getLogger(__name__)
# Names listed in an error; lm-eval knows more than ten thousand.
_LISTED = 30


def check_tasks(tasks: Sequence[str], task_path: Path | None) -> None:
    """Raise InputError for a name that is no task, group or tag. Reads task files only, no data.

    Takes a second or two for tasks that are all in `task_path`; otherwise all of lm-eval's task files are read: about
    ten seconds, once per process.
    """
    if tasks:
        with quiet():
            _manager(tasks, task_path)


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_path: Path | None,
    batch_size: int,
    limit: int | None,
    max_length: int | None,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Scores of a model on lm-eval tasks.

    Args:
        model: a loaded transformers model, wherever its weights are, or an opened `MoEModel`.
        tokenizer: the model's; it is not changed.
        tasks: names of tasks, groups or tags, lm-eval's or of `task_path`.
        task_path: folder with task files (YAML) of one's own. If all `tasks` are there, lm-eval's are not read.
        batch_size: sequences that run together.
        limit: only the first so many documents of every task.
        max_length: tokens that the model sees at once; default: what its config says. Longer contexts lose their
            beginning; a warning counts them.
        progress: told of every layer (of a model on disk) or batch (of a loaded one).

    Returns:
        Task → metric → value, for every task, and every group that defines a mean of its tasks. Metrics have lm-eval's
        names, with the filter where there is one: "acc", "acc_norm", "exact_match (strict-match)".

    Raises:
        InputError: no such task; data that can't be had; a task that this model can't do; a tokenizer with neither BOS
            nor EOS; an answer longer than `max_length`.
        RunError: the model's predictions are not numbers.
    """
    if not tasks:
        return {}
    if limit is not None and limit < 1:
        raise InputError(f"limit: must be at least 1 document, not {limit}")
    if batch_size < 1:
        raise InputError(f"batch_size: must be at least 1, not {batch_size}")
    with quiet(), contextlib.ExitStack() as stack:
        lm = language_model(model, tokenizer, batch_size=batch_size, max_length=max_length, progress=progress)
        manager = _manager(tasks, task_path)
        loaded = _load(manager, tasks, lm.generates)
        from lm_eval import evaluator

        # They describe the machine for lm-eval's log: they start git, gcc and pip, and git complains on standard error.
        stack.enter_context(replaced(evaluator, "get_git_commit_hash", lambda: None))
        stack.enter_context(replaced(evaluator, "add_env_info", lambda storage: None))
        found = evaluator.simple_evaluate(
            model=lm, tasks=loaded, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    if lm.lengths.cut:
        counts = f"{lm.lengths.cut} of {lm.lengths.seen}"
        _log.warning(f"{counts} task requests are longer than {lm.lengths.limit} tokens and lost their beginning")
    values = {name: _metrics(metrics) for name, metrics in found["results"].items()}
    return {name: metrics for name, metrics in values.items() if metrics}


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """lm-eval's metrics ("acc,none": 0.5, "acc_stderr,none": "N/A", "alias": …) as numbers by name."""
    values: dict[str, float] = {}
    for key, value in found.items():
        name, comma, used = key.rpartition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, (int, float, np.number)):
            values[name if used == "none" else f"{name} ({used})"] = float(value)
    return values


def _manager(tasks: Sequence[str], task_path: Path | None) -> Any:
    """lm-eval's index of tasks, with all of `tasks` in it."""
    from lm_eval.tasks import TaskManager

    if task_path is not None and not task_path.is_dir():
        raise InputError(f"task_path: {task_path} is not a folder")
    manager = TaskManager(include_path=None if task_path is None else str(task_path), include_defaults=False)
    index = manager.task_index
    if set(tasks) <= set(index):
        return manager
    own = sorted(index)
    for name, entry in _lm_eval_tasks().items():
        index.setdefault(name, entry)
    for name in tasks:
        if name not in index:
            raise InputError(f"unknown task {name!r}{_hint(name, own, sorted(index), task_path)}")
    return manager


@functools.cache
def _lm_eval_tasks() -> dict[str, Any]:
    """All that lm-eval brings: reading them takes ten seconds, and they don't change meanwhile."""
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _hint(name: str, own: Sequence[str], known: Sequence[str], task_path: Path | None) -> str:
    """Why the task is missing, or what may have been meant."""
    for file in sorted(task_path.rglob("*.yaml")) if task_path is not None else ():
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:  # lm-eval passes over such a file without a word
            return f"; {file} is not valid YAML: {_line(error)}"
    for names in (own, known):
        if (hint := nearest(name, names)).startswith("; did you mean"):
            return hint
    return f"; {task_path} has {', '.join(own[:_LISTED])}" if own else "; `lm-eval ls tasks` lists all"


def _load(manager: Any, names: Sequence[str], generates: bool) -> list[Any]:
    """Tasks and groups with their data. Raises InputError for what can't be loaded, or not be done by this model."""
    found: list[Any] = []
    asked: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            with _explained():
                loaded = manager.load([name])
        except InputError:
            raise
        except Exception as error:  # task files run code of their own: anything may go wrong in it
            raise InputError(f"task {name!r} can't be loaded: {_line(error)}") from error
        for task, built in loaded["tasks"].items():
            if task in asked:
                raise InputError(f"tasks: {task!r} is in {asked[task]!r} and in {name!r}: ask for one of the two")
            asked[task] = name
            if not generates and built.get_config("output_type") == "generate_until":
                raise no_generation(task)
            if getattr(built, "UNSAFE_CODE", False):
                raise InputError(f"task {task!r} runs code that the model writes: score it with lm-eval, in a sandbox")
            if getattr(built, "MULTIMODAL", False):
                raise InputError(f"task {task!r} shows the model more than text: that is not supported")
        inner = {member for members in loaded["group_map"].values() for member in members}
        found += [group for key, group in loaded["groups"].items() if key not in inner]
        found += [task for key, task in loaded["tasks"].items() if key not in inner]
    return found


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Failures to get a task's data become one line that names the task and the data set."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download

    def explained(task: Any, *arguments: Any, **keywords: Any) -> None:
        config = task.config
        try:
            download(task, *arguments, **keywords)
        except Exception as error:
            if config.dataset_path is None:
                raise InputError(f"task {config.task!r}: its data can't be read: {_line(error)}") from error
            data = repr(config.dataset_path) + (f" ({config.dataset_name})" if config.dataset_name else "")
            advice = "check its name and the network"
            if datasets.config.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE:
                advice = "run once without HF_HUB_OFFLINE and HF_DATASETS_OFFLINE to download it"
            raise InputError(
                f"task {config.task!r} needs the data set {data}, which can't be loaded: {advice}, "
                f"or leave the task out ({_line(error)})"
            ) from error

    with replaced(ConfigurableTask, "download", explained):
        yield


def _line(error: BaseException) -> str:
    """Another library's error on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
