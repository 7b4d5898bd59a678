"""What a block's experts read: the norm that puts it out, and every matrix that reads the same.

Promise: found by following one forward of the skeleton on the meta device, operation by operation, in any family and
without a weight. A norm counts only where all that becomes of its output is known: it is reshaped, cast or picked by
token, and multiplied with matrices that read nothing else. Then factors can move between the norm and those matrices
(`move_factors`), and the model computes what it did. Where anything else happens to it, the reason is given instead.

Letters: H channels of the norm's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedConfig, PreTrainedModel

from . import hf
from .block import MoEBlock
from .calls import no_cache
from .experts import FusedExperts
from .tensors import set_tensor

# Operations that leave every channel what it is: views, casts, and picking tokens.
_VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias", "detach", "alias", "unsqueeze", "squeeze", "expand", "t")
_SAME = frozenset(
    (*_VIEWS, "transpose", "permute", "_to_copy", "clone", "contiguous", "index", "slice", "select", "split")
)
# Products → where among the arguments the two factors are.
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# Sequences and their length in the forward that is followed; no model has so few channels in a product by accident.
_FOLLOWED = (2, 7)
# What weights of norms are added to before they multiply: nothing, or one.
_OFFSETS = (0.0, 1.0)
# Experts' weights (float32) changed at a time, in bytes.
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Reads:
    """What experts of a layer read, names relative to the decoder layer.

    Attributes:
        norm: path of the norm. Its output is proportional to its weight plus `offset`; a bias is added behind it.
        readers: matrix → the dimension that goes along the norm's channels; those of the experts not among them.
    """

    norm: str
    offset: float
    readers: Mapping[str, int]


class Lazily(Mapping[int, "Reads | str"]):
    """What `follow` finds, looked for when it is first asked for."""

    def __init__(self, find: Callable[[], Mapping[int, Reads | str]]):
        self._find = find

    def __getitem__(self, layer: int) -> Reads | str:
        return self._find()[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._find())

    def __len__(self) -> int:
        return len(self._find())


def follow(
    config: PreTrainedConfig, cls: type[PreTrainedModel], stack: str, experts: Mapping[int, str]
) -> dict[int, Reads | str]:
    """Decoder layer → what its experts read, or why that isn't known.

    Args:
        config, cls: of the model.
        stack: module path of the decoder layers.
        experts: decoder layer → path of its experts module, relative to it.
    """
    model = hf.meta_skeleton(config, cls).eval()
    layers = {i: model.get_submodule(f"{stack}.{i}") for i in experts}
    norms = {f"{stack}.{i}.{p}": m for i, layer in layers.items() for p, m in layer.named_modules() if _may_be_norm(m)}
    followed = _Followed(model)
    read: dict[int, str] = {}
    handles = [
        norm.register_forward_hook(lambda _m, _a, output, path=path: followed.put_out(path, output))
        for path, norm in norms.items()
    ]
    for index, path in experts.items():
        module: Any = layers[index].get_submodule(path)

        def forward(hidden: Tensor, *_: Any, index: int = index, **__: Any) -> Tensor:
            read[index] = followed.source(hidden)
            return torch.empty_strided(hidden.shape, hidden.stride(), dtype=hidden.dtype, device="meta")

        module.forward = forward
    ids = torch.ones(_FOLLOWED, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), hf.quiet(), followed:
            model(input_ids=ids, **no_cache(model))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        reason = f"the forward of {cls.__name__} can't be followed without data ({_first_line(error)})"
        return dict.fromkeys(experts, reason)
    finally:
        for handle in handles:
            handle.remove()
    return {i: _reads(f"{stack}.{i}.", read.get(i, ""), followed, norms) for i in experts}


def move_factors(
    block: MoEBlock, reads: Reads, factor_H: Tensor, stored: Mapping[str, torch.dtype] | None = None
) -> Tensor:
    """Divide what a live layer's experts read by factors, in the norm, and multiply what reads it, in place.

    The norm is rounded to what will be stored first, and the others get just what that took from it: what the layer
    computes changes by no more than the rounding of the matrices, nothing at all where factors are powers of two and
    the norm has no offset. A channel keeps its factor of 1 where the norm silences it, or can't be stored divided.

    Args:
        block: router and experts, dense.
        reads: as the skeleton says.
        factor_H: positive.
        stored: names relative to the layer → dtype in which tensors will be stored; their own where there is none.

    Returns the factors as they came out, float64 [H]. The block then counts what was changed beside it as its own.
    """
    kept = stored or {}
    weight_H, factor_H = _divided(block, reads, factor_H, kept)

    def put(name: str, value: Tensor) -> None:
        before = _parameter(block.module, name)
        set_tensor(block.module, name, value.to(kept.get(name, before.dtype)).to(before.dtype))

    name = f"{reads.norm}.weight"
    put(name, weight_H)
    changed = [name]
    if block.module.get_submodule(reads.norm)._parameters.get("bias") is not None:
        put(name := f"{reads.norm}.bias", _parameter(block.module, name).double() / factor_H)
        changed.append(name)
    for name, dim in reads.readers.items():
        weight = _parameter(block.module, name)
        along = [1] * weight.dim()
        along[dim] = -1
        put(name, weight.double() * factor_H.to(weight.device).view(along))
        changed.append(name)
    weights = FusedExperts(block.experts_module).weights()
    for name, value_EIH in weights.matrices():
        if name == "down":
            continue
        step = max(1, _CHUNK_BYTES // (4 * value_EIH[0].numel()))
        for part in value_EIH.split(step):
            part.copy_(part.float() * factor_H.to(part.device, torch.float32))
    block.also_changed(changed)
    return factor_H


def movable(block: MoEBlock, reads: Reads, factor_H: Tensor, stored: Mapping[str, torch.dtype] | None = None) -> Tensor:
    """The factors, float64 [H], that `move_factors` would move in place of these, as the norm is rounded."""
    return _divided(block, reads, factor_H, stored or {})[1]


def _divided(
    block: MoEBlock, reads: Reads, factor_H: Tensor, stored: Mapping[str, torch.dtype]
) -> tuple[Tensor, Tensor]:
    """The norm's weight with what it multiplies divided by factors, as it will be stored, and what that really was."""
    name = f"{reads.norm}.weight"
    before_H = _parameter(block.module, name)
    scale_H = before_H.double() + reads.offset
    weight_H = torch.where(scale_H == 0, before_H, scale_H / factor_H.to(scale_H) - reads.offset)
    weight_H = weight_H.to(stored.get(name, before_H.dtype)).to(before_H.dtype)
    left_H = weight_H.double() + reads.offset
    lost_H = (scale_H == 0) | (left_H == 0) | left_H.isinf()
    return torch.where(lost_H, before_H, weight_H), torch.where(lost_H, 1.0, scale_H / left_H)


class _Followed(TorchDispatchMode):
    """Remembers, of all tensors of a forward, which are a norm's output or a parameter, whatever their shape.

    Attributes:
        model: whose forward it is.
        readers: norm → parameter → dimension that its channels are multiplied along.
        others: norm → what else was done with its output.
        uses: parameter → what it was multiplied with, by norm ("": anything else).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.readers: dict[str, dict[str, int]] = {}
        self.others: dict[str, set[str]] = {}
        self.uses: dict[str, set[str]] = {}
        self._parameters = dict(model.named_parameters())
        self._names = {_storage(p): name for name, p in self._parameters.items()}
        self._norms: dict[int, str] = {}
        self._alive: list[Tensor] = []  # or storages would come again

    def put_out(self, norm: str, output: Any) -> None:
        """Take note of what a norm returned."""
        if isinstance(output, Tensor):
            self._alive.append(output)
            self._norms[_storage(output)] = norm

    def source(self, tensor: Tensor) -> str:
        """The norm whose output a tensor is, or ""."""
        return self._norms.get(_storage(tensor), "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":  # a branch on data: any answer will do, or the reader won't be found
            return True if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        outputs = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        self._alive += outputs
        whole = name != "index" or len(args[1]) < args[0].dim()  # or channels themselves are picked
        if name in _SAME and whole and not any(self.source(value) for value in inputs[1:]):
            for known in (self._norms, self._names):
                if (what := known.get(_storage(inputs[0]))) is not None:
                    known.update({_storage(output): what for output in outputs})
        elif name in _PRODUCTS:
            left, right = (args[position] for position in _PRODUCTS[name])
            self._multiplied(name, left, right, [v for v in inputs if v is not left and v is not right])
        else:
            self._other(name, inputs)
        return result

    def _multiplied(self, name: str, left: Tensor, right: Tensor, added: Sequence[Tensor]) -> None:
        norm, parameter = self.source(left), self._names.get(_storage(right))
        if parameter is None or (dim := self._along(right, parameter, left.shape[-1])) is None:
            self._other(name, [left, right, *added])
            return
        self._other(name, added)
        self.uses.setdefault(parameter, set()).add(norm)
        if norm:
            self.readers.setdefault(norm, {})[parameter] = dim

    def _along(self, right: Tensor, parameter: str, size: int) -> int | None:
        """The dimension of a parameter that the first of the last two dimensions of its view `right` is."""
        own = self._parameters[parameter]
        fitting = [d for d in range(own.dim()) if own.shape[d] == size and own.stride(d) == right.stride(-2)]
        return fitting[0] if len(fitting) == 1 and right.numel() == own.numel() else None

    def _other(self, name: str, inputs: Sequence[Tensor]) -> None:
        for value in inputs:
            if norm := self.source(value):
                self.others.setdefault(norm, set()).add(name)
            if (parameter := self._names.get(_storage(value))) is not None:
                self.uses.setdefault(parameter, set()).add("")


def _reads(prefix: str, norm: str, followed: _Followed, norms: Mapping[str, nn.Module]) -> Reads | str:
    """What is known of the experts of the layer whose names begin with `prefix`."""
    if not norm:
        return "no norm with a weight puts out just what its experts read"
    own = norm.removeprefix(prefix)
    if others := followed.others.get(norm):
        elsewhere = ", ".join(sorted(others))
        return f"what {own} puts out is not only multiplied with matrices, but also goes into {elsewhere}"
    readers = followed.readers.get(norm, {})
    if shared := [name for name in readers if followed.uses[name] != {norm}]:
        return f"{shared[0]} reads more than what {own} puts out"
    if sum(m._parameters.get("weight") is norms[norm].weight for m in followed.model.modules()) > 1:
        return f"the weight of {own} is another module's as well"
    if foreign := [name for name in (norm, *readers) if not name.startswith(prefix)]:
        return f"{foreign[0]}, which lies outside the layer, has to do with what its experts read"
    if (offset := _offset(norms[norm])) is None:
        return f"what {own} puts out isn't proportional to its weight"
    return Reads(own, offset, {name.removeprefix(prefix): dim for name, dim in sorted(readers.items())})


def _may_be_norm(module: nn.Module) -> bool:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    weight = parameters.get("weight")
    alone = not parameters.keys() - {"weight", "bias"} and next(module.children(), None) is None
    return alone and weight is not None and weight.dim() == 1


@torch.no_grad()
def _offset(norm: Any) -> float | None:
    """Of `_OFFSETS`, what a norm's class adds to its weight; None where its output isn't proportional to the sum."""
    norm = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    channels = len(norm.weight)
    input_RH, weight_H, bias_H = (torch.randn(*s, channels, generator=generator) for s in ((4,), (), ()))
    factor_H = torch.rand(channels, generator=generator) + 0.5

    def output(weight_H: Tensor, bias_H: Tensor) -> Any:
        norm.weight.copy_(weight_H)
        if norm._parameters.get("bias") is not None:
            norm.bias.copy_(bias_H)
        return norm(input_RH)

    try:
        once = output(weight_H, bias_H)
        for offset in _OFFSETS:
            less = output((weight_H + offset) / factor_H - offset, bias_H / factor_H)
            if torch.allclose(less * factor_H, once, rtol=1e-4, atol=1e-5):
                return offset
    except (RuntimeError, TypeError, AttributeError):  # it wants more than what it normalises
        return None
    return None


def _parameter(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(name).detach()


def _storage(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120] or type(error).__name__
