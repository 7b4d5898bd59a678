"""How consistent routing is over neighbouring tokens: what a cache of experts would gain (arXiv 2505.16056).

Two measures of a trace of routing decisions. SRP asks how well one fixed set of experts per segment of text would
predict which experts its tokens choose; SCH, how often a small cache of experts holds what the next token asks for.

Letters: T tokens, K experts per token, E experts, N sequences, S tokens of the longest, m tokens of a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_sequence(index_TK: Tensor, sequence_T: Tensor) -> list[Tensor]:
    """Routing decisions [T, K], -1 for none, of each sequence: [S, K] each, its tokens in order.

    Tokens with sequence -1 belong to none and are left out.
    """
    known = sequence_T >= 0
    order = sequence_T[known].long().argsort(stable=True)
    _, lengths = sequence_T[known][order].unique_consecutive(return_counts=True)
    return list(index_TK[known][order].long().split(lengths.tolist()))


def chosen(index_NSK: Tensor, experts: int) -> Tensor:
    """Whether each expert is among a token's choices: [N, S, E] booleans."""
    index = torch.where(index_NSK < 0, experts, index_NSK)
    mask = torch.zeros(*index.shape[:2], experts + 1, dtype=torch.bool)
    return mask.scatter_(2, index, True)[..., :experts]


def segment_counts(sequences: list[Tensor], experts: int, segment: int) -> Tensor:
    """How many (segment, expert) pairs have the expert chosen c times in the segment: [m + 1], index c, int64.

    Segments are all runs of m consecutive tokens of one of the sequences [S, K]; shorter ones have none.
    """
    counts = torch.zeros(segment + 1, dtype=torch.int64)
    for index_SK in sequences:
        if len(index_SK) < segment:
            continue
        times = chosen(index_SK.unsqueeze(0), experts)[0].long().cumsum(dim=0)
        total = torch.cat([torch.zeros(1, experts, dtype=torch.int64), times])
        counts += torch.bincount((total[segment:] - total[:-segment]).flatten(), minlength=segment + 1)
    return counts


def srp(counts: Tensor) -> dict[str, float]:
    """Segment routing best performance of `segment_counts`, of one layer or summed over layers.

    An expert is predicted for the whole segment where it is chosen at least p times in it. With c how often each is
    chosen, F1(p) = 2·Σ_{c ≥ p} c / (m · predicted + Σ c); the best over p is returned.

    Returns `srp`: the best F1, 0 where there is no segment; `threshold`: its p; `predicted`: experts per segment that
    it predicts, as a share of all.
    """
    segment = len(counts) - 1
    times = torch.arange(segment + 1)
    matches = (counts * times).flip(0).cumsum(0).flip(0).double()  # Σ_{c ≥ p} c
    predicted = counts.flip(0).cumsum(0).flip(0).double()
    if not matches[0]:
        return {"srp": 0.0, "threshold": 0.0, "predicted": 0.0}
    f1 = 2 * matches[1:] / (segment * predicted[1:] + matches[0])
    best = int(f1.argmax())
    return {
        "srp": float(f1[best]),
        "threshold": float(best + 1),
        "predicted": float(predicted[best + 1] / predicted[0]),
    }


def sch(sequences: list[Tensor], experts: int, capacity: int, horizon: int) -> tuple[int, int]:
    """Segment cache best hit rate over sequences [S, K]: (requests found in the cache, all requests).

    A cache of `capacity` experts per sequence, empty at its beginning. A request (token, expert) hits if the expert is
    in the cache when the token comes. Then, of what was in the cache and what was just requested, those stay that the
    next `horizon` tokens of the sequence ask for most often; ties go to the expert that was requested last, then to the
    lower number. With a horizon of 0 that is a cache that drops the least recently used (LRU).
    """
    if not sequences:
        return 0, 0
    mask = chosen(torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1), experts)
    count, length = mask.shape[:2]
    total = torch.cat([torch.zeros(count, 1, experts, dtype=torch.int64), mask.long().cumsum(dim=1)], dim=1)
    cached = torch.zeros(count, experts, dtype=torch.bool)
    last = torch.full((count, experts), -1)
    hits = 0
    behind = torch.arange(experts).flip(0)  # the lower number first
    for token in range(length):
        now = mask[:, token]
        hits += int((cached & now).sum())
        last[now] = token
        ahead = total[:, min(token + 1 + horizon, length)] - total[:, token + 1]
        rank = ((ahead * (length + 1) + last + 1) * experts + behind).masked_fill(~(cached | now), -1)
        if capacity < experts:
            places = rank.topk(capacity, dim=1)
            cached = torch.zeros_like(cached).scatter_(1, places.indices, places.values >= 0)
        else:
            cached |= now
    return hits, int(mask.sum())
