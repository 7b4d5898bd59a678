"""What lm-eval needs to score a model of this package, and to keep quiet while it does.

A loaded model runs in lm-eval's own `HFLM`; a model on disk runs layer by layer (`likelihood.py`). Both turn text into
tokens with the same code, lm-eval's. This module imports lm-eval only when it is called: that takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.errors import InputError
from moe_compress.model import MoEModel, hf, offload
from moe_compress.progress import Progress

from .likelihood import Likelihood, Pair, StreamedLikelihood, finite

STREAMED = "streamed layer by layer because it doesn't fit in memory"
_NOISY = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "filelock", "fsspec", "httpx", "urllib3")


def language_model(model: Any, tokenizer: Any, *, batch_size: int, max_length: int | None, progress: Progress) -> Any:
    """A model as lm-eval sees it.

    Args:
        model: a loaded transformers model, wherever its weights are, or a `MoEModel`.
        tokenizer: the model's; it is not changed.
        batch_size: sequences that run together.
        max_length: tokens that the model sees at once; default: what its config says.
        progress: told of every layer (of a model on disk) or batch (of a loaded one).

    Returns:
        An `lm_eval.api.model.LM` with the attributes `lengths` (`Lengths`) and `generates`.

    Raises:
        InputError: a tokenizer with neither BOS nor EOS, or an encoder-decoder on disk.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has neither a BOS nor an EOS token, and lm-eval begins every text with one: "
            "set bos_token or eos_token in tokenizer_config.json"
        )
    if isinstance(model, MoEModel) and model.weights is None:
        model = model.module
    on_disk = isinstance(model, MoEModel)
    config = model.module.config if on_disk else model.config
    if on_disk and config.is_encoder_decoder:
        raise InputError(f"model type {config.model_type!r} reads and writes separately: it can't be {STREAMED}")
    loaded, streamed = _classes()
    # lm-eval gives a tokenizer without padding token one: that must not reach the caller's.
    own = copy.deepcopy(tokenizer)
    length = max_length or context_length(config, tokenizer)
    return (streamed if on_disk else loaded)(model, own, batch_size, length, progress)


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that a model sees at once, looked for where lm-eval looks for it."""
    text = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(text, name, None)) is not None:
            return int(value)
    known = tokenizer.model_max_length or math.inf
    return int(known) if known < 1e9 else 2048  # a tokenizer that doesn't know says 1e30


class Lengths:
    """Counts requests that are longer than the model's context, and refuses those that can't be answered.

    Attributes:
        seen, cut: requests, and those that lose the beginning of their context.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.seen = 0
        self.cut = 0

    def check(self, requests: Sequence[Any], pairs: Sequence[Pair]) -> None:
        """Raises InputError for an answer that is empty or longer than the context."""
        for request, (context, wanted) in zip(requests, pairs, strict=True):
            if not 1 <= len(wanted) <= self.limit:
                raise InputError(
                    f"task {request.task_name!r}: an answer of {len(wanted)} tokens can't be scored, "
                    f"it must have 1 to {self.limit} (max_length)"
                )
            self.seen += 1
            self.cut += len(context) + len(wanted) > self.limit + 1


@functools.cache
def _classes() -> tuple[Any, Any]:
    """(for loaded models, for models on disk)."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class LoadedLM(HFLM):  # type: ignore[misc]
        """A model in memory."""

        generates = True

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, length: int, progress: Progress):
            # float32: in bfloat16, a log-likelihood of -600 nats would be rounded to a multiple of four.
            super().__init__(
                model, tokenizer=tokenizer, batch_size=batch_size, max_length=length, softmax_dtype="float32"
            )
            self._device = offload.execution_device(model.get_input_embeddings())  # `model.device` may be meta
            self._progress = progress
            self._requests: Sequence[Any] | None = None
            self.lengths = Lengths(length)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Likelihood]:
            self._requests = requests
            try:
                return super().loglikelihood(requests, disable_tqdm)  # type: ignore[no-any-return]
            finally:
                self._requests = None

        def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **keywords: Any) -> list[Likelihood]:
            if self._requests is not None:  # windows of rolling likelihoods fit
                self.lengths.check(self._requests, [(context, wanted) for _, context, wanted in requests])
            # Requests that differ only in their last token share a forward. Up to lm-eval 0.4.13 that scores the wrong
            # tokens where the same text is split in two ways (documents that overlap): then nothing is shared.
            splits = {(tuple(context + wanted[:-1]), len(wanted)) for _, context, wanted in requests}
            self.logits_cache = len(splits) == len({tokens for tokens, _ in splits})
            return finite(super()._loglikelihood_tokens(requests, *arguments, **keywords))

        def _model_call(self, *arguments: Any, **keywords: Any) -> Tensor:
            self._progress.step()
            return super()._model_call(*arguments, **keywords)  # type: ignore[no-any-return]

    class StreamedLM(TemplateLM):  # type: ignore[misc]
        """A model on disk: each method takes the requests of all tasks, and reads each layer once."""

        generates = False
        # Tokens, special ones included, exactly as for a model in memory.
        tok_encode = HFLM.tok_encode
        prefix_token_id = HFLM.prefix_token_id
        custom_prefix_token_id = None
        add_bos_token = None

        def __init__(self, model: MoEModel, tokenizer: Any, batch_size: int, length: int, progress: Progress):
            super().__init__()
            self.tokenizer = tokenizer
            self.max_length = length
            self.lengths = Lengths(length)
            self._likelihood = StreamedLikelihood(model, batch_size, length, progress)
            self._requests: Sequence[Any] = ()

        @property
        def eot_token_id(self) -> int | None:
            return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Likelihood]:
            self._requests = requests
            return super().loglikelihood(requests, disable_tqdm)  # type: ignore[no-any-return]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[Likelihood]:
            pairs = [(context, wanted) for _, context, wanted in requests]
            self.lengths.check(self._requests, pairs)
            return self._likelihood(pairs)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            pairs: list[Pair] = []
            owners: list[int] = []
            for number, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
                pairs += map(make_disjoint_window, windows)
                owners += [number] * (len(pairs) - len(owners))
            totals = [0.0] * len(requests)
            for number, (value, _) in zip(owners, self._likelihood(pairs), strict=True):
                totals[number] += value
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise no_generation(requests[0].task_name)

    return LoadedLM, StreamedLM


def no_generation(task: str) -> InputError:
    """The error for a task that a model on disk can't do."""
    return InputError(
        f"task {task!r} lets the model write text, and every token takes all layers, but this model is "
        f"{STREAMED}: leave the task out, or score it on a larger machine"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and what it uses say nothing but errors, and leave no trace in the caller's random state.

    Standard error is not redirected: progress of our own is shown there meanwhile.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    start = tqdm.__init__

    def silent(bar: Any, *arguments: Any, **keywords: Any) -> None:
        start(bar, *arguments, **{**keywords, "disable": True})

    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, _NOISY):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(hf.quiet())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(replaced(tqdm, "__init__", silent))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value within the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
