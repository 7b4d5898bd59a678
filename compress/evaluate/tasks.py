"""Task scores from lm-eval, of models in memory and of models that don't fit there.

The contract:
- A loaded model is scored by lm-eval's own `HFLM`. An opened `MoEModel` is scored with one decoder layer in memory: all
  requests of all tasks are collected, and each layer is read once for all of them (a second time for tasks of rolling
  log-likelihood, and once more for every `_CALLS` batches or quarter of the memory's worth of hidden states). Both tokenise
  with the same code, and agree to rounding.
- Log-probabilities are computed in float32 whatever the model's dtype, and summed in float64 where we sum.
- The caller's random state, log levels and streams are afterwards what they were before. Nothing is drawn at random but
  few-shot examples, with lm-eval's fixed seeds: equal calls give equal scores.
- What a user can put right is an `InputError` of one line, raised before the model runs.

Sequences of a batch are padded on the right, with no attention mask, as lm-eval's own models do it. In a causal model no
real position sees a later one, so padding changes nothing but rounding. That would not hold where positions reach back:
attention in both directions (prefix and encoder-decoder models, diffusion), or tokens that compete for room (experts with
a capacity, or that choose their tokens). No model that `MoEModel` opens and that predicts the next token is of that kind.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from torch import Tensor

from moe_compress.errors import InputError, RunError, nearest
from moe_compress.model import MoEModel, hf, offload
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress

_log = logging.getLogger(__name__)

# Positions whose logits are turned into log-probabilities at a time.
_POSITIONS = 512
# Logits of one batch may take this much (bytes, as float32): long sequences go in smaller batches. Not measured at run
# time, because what runs together changes the last digits.
_LOGITS = 1 << 30
# Batches that wait in one sweep at most: each is a thread, and containers often limit threads to a few thousand.
_CALLS = 1000
# What a waiting batch holds per token, in multiples of its hidden state: a layer's input, its output, the position
# embeddings, and the residual streams that some families keep side by side.
_STATES = 4
# Names listed in an error; lm-eval knows more than ten thousand.
_LISTED = 30
_NOISY = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "filelock", "fsspec", "httpx", "urllib3")

# Token ids of a context and of what is to be scored after it.
Pair = tuple[list[int], list[int]]


def check_tasks(tasks: Sequence[str], task_path: Path | None) -> None:
    """Raise InputError for a name that is no task, group or tag. Reads task files only, no data.

    Takes a second for tasks that are all in `task_path`; otherwise all of lm-eval's task files are read (about ten
    seconds, once per process).
    """
    if tasks:
        with _quiet():
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
            beginning, with a warning that counts them.
        progress: told of layers (opened models) or batches (loaded ones).

    Returns:
        Task → metric → value, for every task and for every group that defines a mean of its tasks. Metrics are named as
        in lm-eval, without their filter if they have none: "acc", "acc_norm", "exact_match (strict-match)".

    Raises:
        InputError: no such task; data that can't be had; a task that this model can't do; a tokenizer with neither BOS
            nor EOS; something to be scored that is longer than `max_length`.
        RunError: the model's predictions are not numbers.
    """
    if not tasks:
        return {}
    if limit is not None and limit < 1:
        raise InputError(f"limit: must be at least 1 document, not {limit}")
    if batch_size < 1:
        raise InputError(f"batch_size: must be at least 1, not {batch_size}")
    with _quiet():
        lm = language_model(model, tokenizer, batch_size=batch_size, max_length=max_length, progress=progress)
        manager = _manager(tasks, task_path)
        with _datasets_explained():
            loaded = _load(manager, tasks, generates=not isinstance(lm, _lm_classes()[1]))
        import lm_eval

        found = lm_eval.simple_evaluate(
            model=lm, tasks=loaded, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    if lm.lengths.cut:
        _log.warning(
            "%d of %d requests are longer than %d tokens: they lost their beginning",
            lm.lengths.cut, lm.lengths.seen, lm.max_length,
        )  # fmt: skip
    values = {name: _metrics(metrics) for name, metrics in found["results"].items()}
    return {name: metrics for name, metrics in values.items() if metrics}


def language_model(model: Any, tokenizer: Any, *, batch_size: int, max_length: int | None, progress: Progress) -> Any:
    """A model as lm-eval sees it (`lm_eval.api.model.LM`). Arguments and errors are those of `score_tasks`."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has neither a BOS nor an EOS token, and lm-eval begins every text with one: "
            "set bos_token or eos_token in tokenizer_config.json"
        )
    loaded, streamed = _lm_classes()
    if isinstance(model, MoEModel) and model.weights is None:
        model = model.module
    config = (model.module if isinstance(model, MoEModel) else model).config
    length = max_length or _context_length(config, tokenizer)
    # lm-eval gives a tokenizer without padding token one: that must not reach the caller's.
    tokenizer = copy.deepcopy(tokenizer)
    if not isinstance(model, MoEModel):
        return loaded(model, tokenizer, batch_size, length, progress)
    if config.is_encoder_decoder:
        raise InputError(f"model type {config.model_type!r} reads and writes separately: it can't be scored layer by layer")
    return streamed(model, tokenizer, batch_size, length, progress)


def _context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that a model sees at once, where lm-eval looks for it too."""
    text = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(text, name, None)) is not None:
            return int(value)
    # A tokenizer without a limit says 1e30.
    return int(tokenizer.model_max_length) if (tokenizer.model_max_length or math.inf) < 1e9 else 2048


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """lm-eval's metrics ("acc,none": 0.5, "acc_stderr,none": "N/A", "alias": …) as numbers by name."""
    values: dict[str, float] = {}
    for key, value in found.items():
        name, comma, used = key.rpartition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, (int, float, np.number)):
            values[name if used == "none" else f"{name} ({used})"] = float(value)
    return values


# --- tasks ---------------------------------------------------------------------------------------------------------


def _manager(tasks: Sequence[str], task_path: Path | None) -> Any:
    """lm-eval's index of tasks, with all of `tasks` in it."""
    from lm_eval.tasks import TaskManager

    own: list[str] = []
    if task_path is not None:
        if not task_path.is_dir():
            raise InputError(f"task_path: {task_path} is not a folder")
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
        own = manager.all_tasks
        if set(tasks) <= set(own):
            return manager
    manager = _all_tasks(task_path)
    if not set(tasks) <= set(manager.all_tasks):
        _all_tasks.cache_clear()  # the folder may have changed since
        manager = _all_tasks(task_path)
    for name in tasks:
        if name not in manager.all_tasks:
            raise InputError(f"unknown task {name!r}{_hint(name, own, manager.all_tasks, task_path)}")
    return manager


@functools.lru_cache(maxsize=4)
def _all_tasks(task_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if task_path is None else str(task_path))


def _hint(name: str, own: Sequence[str], known: Sequence[str], task_path: Path | None) -> str:
    """What may have been meant, or why the task is missing."""
    for file in sorted(task_path.rglob("*.yaml")) if task_path is not None else ():
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:  # lm-eval passes over such a file without a word
            return f"; {file} is not valid YAML: {_line(error)}"
    for names in (own, known):
        if (hint := nearest(name, names)).startswith("; did you mean"):
            return hint
    return f"; {task_path} has {', '.join(own[:_LISTED])}" if own else "; `lm-eval ls tasks` lists them"


def _load(manager: Any, names: Sequence[str], generates: bool) -> list[Any]:
    """Tasks and groups with their data, once each. Raises InputError for what can't be loaded or can't be done."""
    found: list[Any] = []
    asked: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
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
                raise InputError(
                    f"task {task!r} makes the model write text, which takes all of it for every token, but this model is "
                    "streamed layer by layer because it doesn't fit in memory: leave the task out, or use a larger machine"
                )
            if getattr(built, "UNSAFE_CODE", False):
                raise InputError(f"task {task!r} runs code that the model writes: run it with lm-eval itself, in a sandbox")
            if getattr(built, "MULTIMODAL", False):
                raise InputError(f"task {task!r} shows the model more than text, which is not supported")
        inner = {member for members in loaded["group_map"].values() for member in members}
        found += [group for key, group in loaded["groups"].items() if key not in inner]
        found += [task for key, task in loaded["tasks"].items() if key not in inner]
    return found


@contextlib.contextmanager
def _datasets_explained() -> Iterator[None]:
    """Failures to get a task's data become one line with the names of task and data set."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download

    def explained(task: Any, *arguments: Any, **keywords: Any) -> None:
        try:
            download(task, *arguments, **keywords)
        except Exception as error:
            path = task.config.dataset_path
            subset = f" ({task.config.dataset_name})" if task.config.dataset_name else ""
            if path is None:
                raise InputError(f"task {task.config.task!r}: its data can't be read: {_line(error)}") from error
            offline = datasets.config.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE
            advice = (
                "this process is offline (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set): download it once with network, "
                "or leave the task out"
                if offline
                else "check the network and the name, or leave the task out"
            )
            raise InputError(
                f"task {task.config.task!r} needs the data set {path!r}{subset}, which can't be loaded: {advice} [{_line(error)}]"
            ) from error

    with _replaced(ConfigurableTask, "download", explained):
        yield


# --- models as lm-eval sees them -----------------------------------------------------------------------------------


class _Lengths:
    """Keeps count of requests that don't fit into the model's context, and refuses those that never can."""

    def __init__(self, limit: int):
        self.limit = limit
        self.seen = 0
        self.cut = 0

    def check(self, pairs: Sequence[Pair], requests: Sequence[Any]) -> None:
        """Raises InputError for a choice that is longer than the context."""
        for number, (context, wanted) in enumerate(pairs):
            self.seen += 1
            self.cut += len(context) + len(wanted) > self.limit + 1
            if not wanted or len(wanted) > self.limit:
                task = getattr(requests[number], "task_name", None) if number < len(requests) else None
                what = f"has {len(wanted)} tokens: it must have 1 to {self.limit} (max_length)"
                raise InputError(f"task {task!r}: an answer to be scored {what}")


@functools.cache
def _lm_classes() -> tuple[Any, Any]:
    """(of loaded models, of opened ones); made here because importing lm-eval takes seconds."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class LoadedLM(HFLM):  # type: ignore[misc]
        """A model in memory."""

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, length: int, progress: Progress):
            super().__init__(
                model, tokenizer=tokenizer, batch_size=batch_size, max_length=length, softmax_dtype="float32"
            )
            self._device = offload.execution_device(model.get_input_embeddings())  # `model.device` may be meta
            self.lengths = _Lengths(length)
            self._progress = progress
            self._requests: Sequence[Any] = ()

        def loglikelihood(self, requests: list[Any], *arguments: Any, **keywords: Any) -> list[tuple[float, bool]]:
            self._requests = requests
            return super().loglikelihood(requests, *arguments, **keywords)  # type: ignore[no-any-return]

        def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **keywords: Any) -> list[tuple[float, bool]]:
            self.lengths.check([(context, wanted) for _, context, wanted in requests], self._requests)
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *arguments, **keywords)
            return _numbers(found)

        def loglikelihood_rolling(self, requests: list[Any], *arguments: Any, **keywords: Any) -> list[float]:
            self._requests = ()
            return super().loglikelihood_rolling(requests, *arguments, **keywords)  # type: ignore[no-any-return]

        def _model_call(self, *arguments: Any, **keywords: Any) -> Tensor:
            self._progress.step()
            return super()._model_call(*arguments, **keywords)  # type: ignore[no-any-return]

    class StreamedLM(TemplateLM):  # type: ignore[misc]
        """A model on disk."""

        # Tokens, special ones included, exactly as for a model in memory.
        tok_encode = HFLM.tok_encode
        prefix_token_id = HFLM.prefix_token_id
        custom_prefix_token_id = None
        add_bos_token = None

        def __init__(self, model: MoEModel, tokenizer: Any, batch_size: int, length: int, progress: Progress):
            super().__init__()
            self.tokenizer = tokenizer
            self.max_length = length
            self.lengths = _Lengths(length)
            self._streamed = StreamedLikelihood(model, batch_size, length, progress)

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        def loglikelihood(self, requests: list[Any], *arguments: Any, **keywords: Any) -> list[tuple[float, bool]]:
            self._requests = requests
            return super().loglikelihood(requests, *arguments, **keywords)  # type: ignore[no-any-return]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, wanted) for _, context, wanted in requests]
            self.lengths.check(pairs, self._requests)
            return self._streamed(pairs)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            pairs: list[Pair] = []
            owner: list[int] = []
            for number, request in enumerate(requests):
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                pairs += map(make_disjoint_window, windows)
                owner += [number] * (len(pairs) - len(owner))
            totals = [0.0] * len(requests)
            for number, (value, _) in zip(owner, self._streamed(pairs), strict=True):
                totals[number] += value
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise InputError(
                f"task {requests[0].task_name!r} makes the model write text: not possible for a model that is streamed "
                "layer by layer because it doesn't fit in memory"
            )

    return LoadedLM, StreamedLM


class StreamedLikelihood:
    """Log-likelihoods from a model with one decoder layer in memory. Call it with all pairs at once.

    Args:
        model: on disk.
        batch_size: sequences that run together at most.
        length: tokens that the model sees at once; longer contexts lose their beginning.
        progress: told of every layer.
    """

    def __init__(self, model: MoEModel, batch_size: int, length: int, progress: Progress):
        self._model = model
        self._batch_size = batch_size
        self._length = length
        self._progress = progress
        config = model.module.config.get_text_config()
        self._hidden, self._vocabulary = int(config.hidden_size), int(config.vocab_size)
        # Without it the head makes logits of all positions, and only a few are read.
        self._keeps = "logits_to_keep" in inspect.signature(model.module.forward).parameters

    def __call__(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """For each pair the log-likelihood (nats) of its second part, and whether it is what greedy decoding gives."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (context, wanted) in enumerate(pairs):
            # The last token is only predicted. Pairs that differ in nothing else (answers of one token) share a row.
            rows.setdefault(tuple((context + wanted)[-(self._length + 1) : -1]), []).append(number)
        found: list[tuple[float, bool]] = [(math.nan, False)] * len(pairs)
        for batches in self._sweeps(self._batches(rows, pairs)):
            with Sweep(self._model, [self._inputs(batch, keep) for batch, keep in batches]) as sweep:
                for step in sweep:
                    step.advance()
                    self._progress.layer(step.index)
                for index, logits in sweep.outputs():
                    batch = batches[index][0]
                    offset = len(batch[0]) - logits.shape[1]  # positions at the front that have no logits
                    for row, ids in enumerate(batch):
                        for number in rows[ids]:
                            wanted = pairs[number][1]
                            end = len(ids) - offset
                            found[number] = _likelihood(logits[row, end - len(wanted) : end], wanted)
        return _numbers(found)

    def _batches(
        self, rows: dict[tuple[int, ...], list[int]], pairs: Sequence[Pair]
    ) -> list[tuple[list[tuple[int, ...]], int]]:
        """Rows of similar length together, longest first, and how many positions at the end of a batch are read."""
        batches: list[tuple[list[tuple[int, ...]], int]] = []
        batch: list[tuple[int, ...]] = []
        keep = 0
        for ids in sorted(rows, key=lambda ids: (-len(ids), ids)):
            width = len(batch[0]) if batch else len(ids)
            needed = max(keep, width - len(ids) + max(len(pairs[number][1]) for number in rows[ids]))
            size = 4 * (len(batch) + 1) * (needed if self._keeps else width) * self._vocabulary
            if batch and (len(batch) == self._batch_size or size > _LOGITS):
                batches.append((batch, keep))
                batch, needed = [], max(len(pairs[number][1]) for number in rows[ids])
            batch, keep = [*batch, ids], needed
        return [*batches, (batch, keep)] if batch else batches

    def _sweeps(
        self, batches: Sequence[tuple[list[tuple[int, ...]], int]]
    ) -> Iterator[list[tuple[list[tuple[int, ...]], int]]]:
        """Batches that go through the layers together: all, unless their hidden states would fill the memory."""
        limit = _free_memory(self._model.device) // 4
        part: list[tuple[list[tuple[int, ...]], int]] = []
        held = 0
        for batch, keep in batches:
            size = _STATES * len(batch) * len(batch[0]) * self._hidden * self._model.module.dtype.itemsize
            if part and (len(part) == _CALLS or held + size > limit):
                yield part
                part, held = [], 0
            part.append((batch, keep))
            held += size
        if part:
            yield part

    def _inputs(self, batch: Sequence[tuple[int, ...]], keep: int) -> dict[str, Any]:
        """A batch [B, S] as the model's arguments, padded on the right with id 0 as lm-eval does it."""
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return {"input_ids": ids, "logits_to_keep": keep} if self._keeps else {"input_ids": ids}


def _likelihood(logits: Tensor, wanted: Sequence[int]) -> tuple[float, bool]:
    """Of the tokens `wanted` [S], from the logits [S, V] that predict them: Σ log p (nats), and whether all are the likeliest."""
    total, greedy = 0.0, True
    for start in range(0, len(wanted), _POSITIONS):
        part = logits[start : start + _POSITIONS].float().log_softmax(-1)
        ids = torch.tensor(wanted[start : start + _POSITIONS], device=part.device)
        total += float(part.gather(1, ids.unsqueeze(1)).double().sum())
        greedy = greedy and bool((part.argmax(-1) == ids).all())
    return total, greedy


def _numbers(found: list[tuple[float, bool]]) -> list[tuple[float, bool]]:
    if any(math.isnan(value) for value, _ in found):
        raise RunError("the model's predictions are not numbers: its weights are damaged")
    return found


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where hidden states will be."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


# --- quiet ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and what it uses say nothing but errors, and leave no trace in the caller's random state.

    Standard error is not redirected: progress of our own is shown there meanwhile.
    """
    from lm_eval import evaluator
    from tqdm import tqdm

    start = tqdm.__init__

    def silent(bar: Any, *arguments: Any, **keywords: Any) -> None:
        start(bar, *arguments, **{**keywords, "disable": True})

    levels = {name: logging.getLogger(name).level for name in _NOISY}
    states = random.getstate(), np.random.get_state()
    with contextlib.ExitStack() as stack:
        for name, level in levels.items():
            stack.callback(logging.getLogger(name).setLevel, level)
            logging.getLogger(name).setLevel(logging.ERROR)
        stack.callback(random.setstate, states[0])
        stack.callback(np.random.set_state, states[1])
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(hf.quiet())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(_replaced(tqdm, "__init__", silent))
        # These describe the machine for lm-eval's log: they start git, gcc and pip, and git complains on standard error.
        stack.enter_context(_replaced(evaluator, "get_git_commit_hash", lambda: None))
        stack.enter_context(_replaced(evaluator, "add_env_info", lambda storage: None))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """An attribute has another value within the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _line(error: BaseException) -> str:
    """Another library's error on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
