"""What calibration hands to the model: sequences of tokens, with images or without, and which modality a token is of.

Letters: N sequences of text, S tokens of each, b sequences of one forward, s tokens of a sequence with images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_compress.errors import InputError
from moe_compress.model.sweep import MODALITY, TOKEN_WEIGHT, Batch

# Numbers as transformers' processors give them (mm_token_type_ids).
MODALITIES = ("text", "image", "video", "audio")


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Sequences of text of equal length, and sequences with images, of any length.

    `ids`: int64 [N, S]. `domain`: the tag of each sequence, or None; of those with images behind those of text.
    `digest`: sha256 over all that the model reads and what tokens weigh. `report`: plain data: documents read and used,
    tokens, sequences per domain and per source, rows skipped and why, warnings. `samples`: of each sequence with images
    the arguments of the model's forward (`input_ids` [1, s], `pixel_values`, …) and `MODALITY` [1, s].
    `modality_weights`: modality → what each of its tokens counts in statistics and Hessians; None: all count 1.
    """

    ids: Tensor
    domain: list[str | None]
    digest: str
    report: dict[str, Any]
    samples: tuple[Mapping[str, Tensor], ...] = ()
    modality_weights: Mapping[str, float] | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.ids) + len(self.samples)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.ids.numel() + sum(sample["input_ids"].numel() for sample in self.samples)

    def modalities(self) -> dict[str, int]:
        """Modality → tokens, of those that there are."""
        counts = torch.zeros(len(MODALITIES), dtype=torch.int64)
        counts[0] = self.ids.numel()
        for sample in self.samples:
            counts += torch.bincount(sample[MODALITY].flatten().long(), minlength=len(MODALITIES))
        return {name: int(count) for name, count in zip(MODALITIES, counts, strict=True) if count}

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, list[int]]]:
        """Consecutive `(ids [b, S], sequence indices)` of the text with b <= `batch_size`."""
        for start in range(0, len(self.ids), batch_size):
            part = self.ids[start : start + batch_size]
            yield part, list(range(start, start + len(part)))

    def forwards(self, batch_size: int) -> list[Batch]:
        """What each forward is called with (see `Sweep`): the text, then each sequence with images by itself.

        Nothing is padded, so sequences of different length never share a forward.
        """
        found: list[Batch] = [{"input_ids": ids} for ids, _ in self.batches(batch_size)] + list(self.samples)
        if self.modality_weights is None:
            return found
        weights = torch.tensor([self.modality_weights.get(name, 1.0) for name in MODALITIES])
        kinds = [batch.get(MODALITY, torch.zeros_like(batch["input_ids"])) for batch in found]
        return [{**batch, TOKEN_WEIGHT: weights[kind.long()]} for batch, kind in zip(found, kinds, strict=True)]

    def chosen(self, indices: Sequence[int]) -> TokenBatches:
        """Some of the sequences, those of text in front; the report is what it was."""
        text = [i for i in indices if i < len(self.ids)]
        images = [i for i in indices if i >= len(self.ids)]
        samples = tuple(self.samples[i - len(self.ids)] for i in images)
        return self._of(self.ids[text], [self.domain[i] for i in text + images], samples)

    def joined(self, other: TokenBatches) -> TokenBatches:
        """The sequences of both; report and weights are the first one's."""
        ids = torch.cat([self.ids, other.ids])
        samples = (*self.samples, *other.samples)
        own, more = len(self.ids), len(other.ids)
        return self._of(ids, self.domain[:own] + other.domain[:more] + self.domain[own:] + other.domain[more:], samples)

    def weighed(self, weights: Mapping[str, float]) -> TokenBatches:
        """The same sequences, their tokens weighed by modality; part of the digest."""
        text = hashlib.sha256(f"{self.digest} {json.dumps(dict(weights), sort_keys=True)}".encode()).hexdigest()
        return replace(self, digest=text, modality_weights=dict(weights))

    def _of(self, ids: Tensor, tags: list[str | None], samples: tuple[Mapping[str, Tensor], ...]) -> TokenBatches:
        """Other sequences, weighed alike."""
        found = replace(self, ids=ids, domain=tags, digest=digest([ids], tags, samples), samples=samples)
        return found if self.modality_weights is None else found.weighed(self.modality_weights)


def split(text: TokenBatches, share: float) -> tuple[TokenBatches, TokenBatches]:
    """Sequences to learn from, and those held out: every n-th. Raises InputError where there is only one."""
    held = held_out(len(text), share)
    return text.chosen(sorted(set(range(len(text))) - set(held))), text.chosen(held)


def held_out(sequences: int, share: float) -> list[int]:
    """Numbers of the sequences that are held out. Raises InputError where there is only one."""
    if sequences < 2:
        raise InputError("part of the sequences is held out to judge by: calibrate with at least 2 `sequences`")
    count = min(max(1, round(share * sequences)), sequences - 1)
    return sorted(set(torch.linspace(0, sequences - 1, count).round().long().tolist()))


def digest(tensors: Iterable[Tensor], tags: Sequence[object], samples: Sequence[Mapping[str, Tensor]] = ()) -> str:
    """sha256 over token ids, tags, and what sequences with images hold."""
    found = hashlib.sha256()
    for ids in tensors:
        found.update(f"{list(ids.shape)}".encode() + ids.numpy().astype("<i8").tobytes())
    found.update(json.dumps(list(tags)).encode())
    for sample in samples:
        for name, tensor in sorted(sample.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
