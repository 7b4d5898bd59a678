"""What a backward sweep starts from: the loss at the logits of one batch, and its gradient there.

The gradients are written out, because they are simple and autograd would keep several tensors of the logits' size.
Means are over the predicted tokens of all batches: position s predicts token s + 1, the last one of a sequence none.

Letters: B sequences of a batch, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compress.errors import RunError, UnsupportedModelError

# (batch number, logits [B, S, V]) → the batch's share of the loss, and the gradient of the loss at the logits.
Loss = Callable[[int, Tensor], tuple[float, Tensor]]

# Positions whose logits are turned into probabilities at a time.
_POSITIONS = 512


class NextToken:
    """Cross-entropy of the next token, in nats, mean over all predicted tokens.

    Args:
        batches: what the sweep reads; `input_ids` [B, S] of each are the targets too.

    Raises UnsupportedModelError, when called, for a model that returns no logits over a vocabulary per position.
    """

    def __init__(self, batches: Sequence[Mapping[str, Any]]):
        self._ids = [batch["input_ids"] for batch in batches]
        self.predicted = predicted_tokens(batches)

    def __call__(self, number: int, logits: Tensor) -> tuple[float, Tensor]:
        """See Loss."""
        ids = self._ids[number].to(logits.device)
        if logits.dim() != 3 or logits.shape[:2] != ids.shape or int(ids.max()) >= logits.shape[-1]:
            raise UnsupportedModelError(
                f"gradients of the next token's loss need logits [sequences, positions, vocabulary], and this model "
                f"returns {list(logits.shape)} for tokens {list(ids.shape)}"
            )
        gradient = torch.zeros_like(logits)
        value = 0.0
        for row, positions in _parts(logits):
            target = ids[row, positions.start + 1 : positions.stop + 1].unsqueeze(1)
            log_p = _real(logits[row, positions]).log_softmax(-1)
            value -= float(log_p.gather(1, target).sum(dtype=torch.float64))
            part = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0))
            gradient[row, positions] = (part / self.predicted).to(gradient.dtype)
        return value / self.predicted, gradient


class Divergence:
    """KL(reference ‖ model) of the next token's distribution, mean over all predicted tokens, times temperature².

    Args:
        batches: what the sweep reads.
        reference: (batch number, logits) of the reference on the same batches in the same order, such as
            `Sweep.outputs()`; one batch is taken at a time.
        temperature: logits of both are divided by it.

    Raises RunError, when called, for a reference of other batches or another vocabulary.
    """

    def __init__(
        self, batches: Sequence[Mapping[str, Any]], reference: Iterator[tuple[int, Tensor]], temperature: float = 1.0
    ):
        self._reference = reference
        self._temperature = temperature
        self.predicted = predicted_tokens(batches)

    def __call__(self, number: int, logits: Tensor) -> tuple[float, Tensor]:
        """See Loss."""
        place, reference = next(self._reference)
        if place != number or reference.shape != logits.shape:
            raise RunError(
                f"batch {number} with logits {list(logits.shape)} can't be compared with the reference's batch {place} "
                f"with {list(reference.shape)}"
            )
        gradient = torch.zeros_like(logits)
        value, heat = 0.0, self._temperature
        for row, positions in _parts(logits):
            log_q = (_real(reference[row, positions]) / heat).log_softmax(-1).to(logits.device)
            log_p = (_real(logits[row, positions]) / heat).log_softmax(-1)
            q = log_q.exp()
            terms = torch.where(q > 0, q * (log_q - log_p), 0.0)
            value += heat**2 * float(terms.sum(-1, dtype=torch.float64).clamp_min(0).sum())
            gradient[row, positions] = (heat * (log_p.exp_() - q) / self.predicted).to(gradient.dtype)
        return value / self.predicted, gradient


def predicted_tokens(batches: Sequence[Mapping[str, Any]]) -> int:
    """Tokens that are predicted: all but the first of every sequence."""
    return sum(batch["input_ids"][:, 1:].numel() for batch in batches)


def _parts(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Predicting positions, row by row, some at a time."""
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1] - 1, _POSITIONS):
            yield row, slice(start, min(start + _POSITIONS, logits.shape[1] - 1))


def _real(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
