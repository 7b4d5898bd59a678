"""How much attention tokens receive, seen while their decoder layer runs, for what decides by it in the same layer.

transformers calls attention through a registry of functions. In a layer that is watched the one registered here is
called: it has the function that the model is configured with compute the result, and sums up beside it what every
token received. Whether that is what the family computes is measured, not known: on the first forward a few rows of
the result are computed again from queries, keys and values, and a family that does something else is refused.

Letters: B texts of a forward, Q queries and L keys of each (L > Q with a cache), N heads, M heads of keys and values,
D head size, T = B · Q tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moe_compress.errors import UnsupportedModelError

from . import hf

# Functions whose masks say of every query and key whether they meet.
_IMPLEMENTATIONS = ("eager", "sdpa")
# Attention weights (float32) that exist at a time.
_WEIGHTS_AT_ONCE = 1 << 22
# How far rows that are computed again may be from the result, relative to its norm: bfloat16 is within a fifth of it.
_TOLERANCE = 0.05
_WATCH = "moe_compress_attention"


class Attention:
    """What a watched decoder layer's attention says of the tokens of the forward that runs.

    Attributes:
        where: the layer, for messages.
    """

    def __init__(self, where: str):
        self.where = where
        self.checked = False
        self.forget()

    def forget(self) -> None:
        """Before a forward."""
        self._received_T: Tensor | None = None
        self._calls = 0
        self._refusal = "none of its modules attends through transformers' attention interface before its experts run"

    def read(self, tokens: int) -> Tensor:
        """Attention that each token received, [T], see `received`.

        Raises UnsupportedModelError where this family, as it is configured, doesn't let it be seen.
        """
        if self._received_T is None:
            self._refuse(self._refusal)
        elif len(self._received_T) != tokens:
            self._refuse(f"it attends among {len(self._received_T)} tokens, and its experts see {tokens}")
        assert self._received_T is not None
        return self._received_T

    def put(self, received_T: Tensor | None, refusal: str = "") -> None:
        """What one attention module found, or why it found nothing."""
        self._calls += 1
        if self._calls > 1:
            received_T, refusal = None, "it attends more than once"
        self._received_T, self._refusal = received_T, refusal

    def _refuse(self, reason: str) -> None:
        raise UnsupportedModelError(
            f"{self.where}: the attention that tokens receive can't be seen: {reason}; set `protect: norm`"
        )


@dataclass
class _Watch:
    """Of one module: whom it reports to, and its own config, which says how the model attends."""

    attention: Attention
    config: PreTrainedConfig


def attention_of(layer: nn.Module) -> Attention | None:
    """What `watch` gave for a decoder layer, or None."""
    watch = layer.__dict__.get(_WATCH)
    return watch if isinstance(watch, Attention) else None


def watch(layer: nn.Module, number: int, apart: Iterable[nn.Module]) -> Attention:
    """See from now on what tokens receive in a decoder layer, whatever calls it.

    Modules that may attend get a config of their own, which names the function registered here: nothing is swapped
    while the model runs, and copies of the model have what the original has.

    Args:
        layer: the decoder layer.
        number: of it.
        apart: modules in it that keep their config.
    """
    found = attention_of(layer)
    if found is not None:
        return found
    attention = Attention(f"layer {number} ({type(layer).__name__})")
    left = {inner for module in apart for inner in module.modules()}
    for module in layer.modules():
        config = getattr(module, "config", None)
        if module not in left and module is not layer and isinstance(config, PreTrainedConfig):
            module.__dict__[_WATCH] = _Watch(attention, config)
            module.config = hf.attending_here(config)  # type: ignore[assignment]
    layer.__dict__[_WATCH] = attention
    layer.register_forward_pre_hook(_forget)
    return attention


def unwatch(layer: nn.Module) -> None:
    """Let a decoder layer be as it was before `watch`."""
    layer.__dict__.pop(_WATCH, None)
    for number, hook in list(layer._forward_pre_hooks.items()):
        if hook is _forget:
            del layer._forward_pre_hooks[number]
    for module in layer.modules():
        if isinstance(own := module.__dict__.pop(_WATCH, None), _Watch):
            module.config = own.config  # type: ignore[assignment]


@contextmanager
def watching(layer: nn.Module, number: int, apart: Iterable[nn.Module]) -> Iterator[Attention]:
    """Like `watch`, for the duration of the context; a layer that was watched before still is afterwards."""
    before = attention_of(layer)
    try:
        yield watch(layer, number, apart)
    finally:
        if before is None:
            unwatch(layer)


def _forget(layer: nn.Module, _arguments: Any) -> None:
    attention = attention_of(layer)
    if attention is not None:
        attention.forget()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> Any:
    """The registered attention function."""
    watch: _Watch = module.__dict__[_WATCH]
    name = hf.attends_by(watch.config)
    result = hf.attention_function(module, name)(module, query, key, value, attention_mask, **keywords)
    with torch.no_grad():
        tensors = query, key, value, attention_mask
        watch.attention.put(*_seen(watch.attention, module, name, tensors, keywords, result))
    return result


hf.register_attention(_attend)


def _seen(
    attention: Attention, module: nn.Module, name: str, tensors: Any, keywords: dict[str, Any], result: Any
) -> tuple[Tensor | None, str]:
    """What tokens received, or None and why it isn't known."""
    query, key, value, mask = tensors
    kind = type(module).__name__
    if name not in _IMPLEMENTATIONS:
        return None, f"it attends by {name!r}, not by {' or '.join(map(repr, _IMPLEMENTATIONS))} (attn_implementation)"
    if query.shape[1] % key.shape[1] or (mask is not None and (mask.dim() != 4 or mask.shape[2] != query.shape[2])):
        return None, f"the queries, keys and mask of {kind} don't belong together"
    causal = keywords.get("is_causal")
    meets = Meeting(
        query,
        key,
        mask,
        scaling=keywords.get("scaling"),
        causal=name == "sdpa" and (getattr(module, "is_causal", True) if causal is None else bool(causal)),
        sinks=keywords.get("s_aux"),
        softcap=keywords.get("softcap"),
    )
    if query.shape[2] > 1 and not attention.checked and not keywords.get("dropout"):
        if not meets.gives(value, result[0]):
            return None, f"{kind} isn't softmax attention as its queries, keys and mask say"
        attention.checked = True
    received_BQ = meets.received()
    if received_BQ is None:
        return None, f"{kind} has keys that aren't those of one token each"
    return received_BQ.flatten(), ""


class Meeting:
    """Queries and keys of one attention, and who of them meets whom.

    Args:
        query: [B, N, Q, D].
        key: [B, M, L, D], N a multiple of M; the queries' own keys are among them, one after the other.
        mask: [B or 1, N or 1, Q, ≥ L]: true where they meet, or what is added to scores; None: as `causal`.
        scaling: of scores; by default 1/√D.
        causal: without a mask, queries see no later keys; otherwise all meet.
        sinks: [N], a score for nobody, in every query's softmax.
        softcap: c · tanh(score / c) takes the score's place.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None = None,
        causal: bool = False,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ):
        queries = query.shape[2]
        # As transformers does: without a mask, keys behind the queries are room in a cache.
        self.causal = causal and mask is None and queries > 1
        if self.causal:
            key = key[:, :, :queries]
        self.query, self.key = query, key
        self.mask = None if mask is None else mask[..., : key.shape[2]]
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.sinks, self.softcap = sinks, softcap

    def received(self) -> Tensor | None:
        """Attention that each query's token receives, [B, Q]: mean over heads, and over the queries that see it.

        Σ_i A[i → j] / (L − j) of ODP's importance (arXiv 2410.06270, Eq. 6) where all later tokens see a token. Queries
        of padding, which nobody sees, aren't counted. 0 where a text has one query: no other token has seen it yet.
        None where it can't be told which key is whose.
        """
        batch, heads, queries, _ = self.query.shape
        length = self.key.shape[2]
        if queries == 1:
            return self.query.new_zeros(batch, 1)
        start = self._first()
        if start is None:
            return None
        own = slice(start, start + queries)
        real_BQ = self._seen_by_any()[:, own]
        total_BL, seen_BL = (
            torch.zeros(batch, length, dtype=_wide(self.query), device=self.query.device) for _ in range(2)
        )
        for rows in self._rows.split(max(1, _WEIGHTS_AT_ONCE // (batch * heads * length))):
            weight, meet = self.weights(rows)
            real = real_BQ[:, None, rows, None]
            total_BL += weight.masked_fill(~real, 0).sum(2).mean(1)  # what padding asks for may be no number
            seen_BL += (meet & real).sum(2).to(seen_BL.dtype).mean(1)
        return (total_BL / seen_BL.clamp_min(1))[:, own]

    def weights(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights [B, N, rows, L] of some queries, float32 or wider, and who meets whom (1 for N: alike)."""
        wide = _wide(self.query)
        batch, heads, _, size = self.query.shape
        groups, length = self.key.shape[1], self.key.shape[2]
        query = self.query[:, :, rows].reshape(batch, groups, -1, size).to(wide)
        score = (query @ self.key.to(wide).transpose(2, 3)).view(batch, heads, len(rows), length) * self.scaling
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        meet = self._meet(rows).expand(batch, -1, -1, -1)
        if self.mask is not None and self.mask.is_floating_point():
            score = score + self.mask[:, :, rows].to(wide)
        score = score.masked_fill(~meet, torch.finfo(wide).min)
        if self.sinks is not None:
            nobody = self.sinks.to(wide).view(1, -1, 1, 1).expand(batch, heads, len(rows), 1)
            score = torch.cat([score, nobody], dim=-1)
        return score.softmax(-1)[..., :length] * meet, meet

    def gives(self, value: Tensor, result: Any) -> bool:
        """Whether attention to these values [B, M, L, D'] is what the model's function returned, [B, Q, N, D']."""
        batch, heads, queries, _ = self.query.shape
        if not isinstance(result, Tensor) or result.shape != (batch, queries, heads, value.shape[-1]):
            return False
        rows = torch.tensor([queries // 2, queries - 1], device=self.query.device)
        weight, meet = self.weights(rows)
        value = value[:, :, : self.key.shape[2]].to(weight)
        expected = weight.reshape(batch, value.shape[1], -1, weight.shape[-1]) @ value
        expected = expected.view(batch, heads, 2, -1).transpose(1, 2)
        seeing = meet.any(1).any(-1)[:, :, None, None]
        expected, found = (t.masked_fill(~seeing, 0) for t in (expected, result[:, rows].to(weight)))
        return float((found - expected).norm()) <= _TOLERANCE * float(expected.norm())

    def _meet(self, rows: Tensor) -> Tensor:
        """Whether queries and keys meet: booleans [B or 1, N or 1, rows, L]."""
        if self.mask is None:
            columns = torch.arange(self.key.shape[2], device=rows.device)
            meet = columns <= rows[:, None] if self.causal else columns.ge(0).expand(len(rows), -1)
            return meet[None, None]
        part = self.mask[:, :, rows]
        return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2

    def _seen_by_any(self) -> Tensor:
        """Keys that a query sees, [B, L]."""
        batch, length = len(self.query), self.key.shape[2]
        if self.mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=self.query.device)
        return self._meet(self._rows).any(1).any(1).expand(batch, -1)

    def _first(self) -> int | None:
        """The first query's own key; None where there are more keys than queries and no query's last is its own."""
        queries, length = self.query.shape[2], self.key.shape[2]
        if length == queries:
            return 0
        if self.mask is None:
            return None
        # Behind the last query's own key may be room that a cache has.
        seen_BL = self._seen_by_any()
        first = int(seen_BL.any(0).nonzero().max()) + 1 - queries
        last_BQ = length - 1 - self._meet(self._rows).any(1).byte().flip(-1).argmax(-1)
        own_Q = first + self._rows
        fits = (last_BQ == own_Q) | ~seen_BL[:, own_Q.clamp_min(0)]
        return first if first >= 0 and bool(fits.all()) else None

    @property
    def _rows(self) -> Tensor:
        return torch.arange(self.query.shape[2], device=self.query.device)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
