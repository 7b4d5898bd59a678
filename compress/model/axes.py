"""Which dimensions, attributes and config keys count experts: measured, not guessed.

The skeleton of a model is built twice on the meta device, once as its config says and once with twice as many experts.
Whatever dimension of a tensor, integer attribute of a module or number in the config follows is an expert count. So
a router's rows, its correction biases and per-expert scales are found in every family without knowing one, also where
the router scores more classes than there are experts (shared experts, a skip class).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moe_compress.errors import UnsupportedModelError

from . import hf
from .experts import FusedExperts

ConfigPath = tuple[str, ...]


@dataclass(frozen=True)
class CountAttribute:
    """An integer attribute of a module that follows the number of experts.

    With E experts its value is E + `offset` where `ratio` is 0, else E / `ratio` (experts per routing group).
    """

    module: str
    name: str
    offset: int
    ratio: int = 0

    def value(self, experts: int) -> int:
        """The attribute's value for that many experts."""
        return experts // self.ratio if self.ratio else experts + self.offset


@dataclass(frozen=True)
class ExpertAxes:
    """Expert counts of one block, names relative to its decoder layer.

    Attributes:
        tensors: tensor → (dimension, number of rows beyond the experts), experts modules' own tensors included.
        attributes: integer attributes that follow the count.
    """

    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)
    attributes: tuple[CountAttribute, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "tensors": {n: list(v) for n, v in self.tensors.items()},
            "attributes": [asdict(a) for a in self.attributes],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ExpertAxes:
        """Back from `to_json`."""
        tensors = {name: (dim, extra) for name, (dim, extra) in values["tensors"].items()}
        return cls(tensors, tuple(CountAttribute(**a) for a in values["attributes"]))


def count_keys(
    config: PreTrainedConfig, values: dict[str, Any], cls: type[PreTrainedModel], stack: str
) -> list[ConfigPath]:
    """Paths of the numbers in `values` (config.json as a dict) that set the number of experts of the layers in `stack`.

    Raises UnsupportedModelError when no key does: then a changed count could not be written down.
    """
    reference = expert_counts(hf.meta_skeleton(config, cls), stack)
    candidates = [
        path for path, value in numbers(values) if "expert" in str(path[-1]) and value in set(reference.values())
    ]
    found = [path for path in candidates if _follows([path], values, config, cls, stack, reference)]
    if not found and candidates and _follows(candidates, values, config, cls, stack, reference):
        found = candidates  # aliases that only count together
    if not found:
        raise UnsupportedModelError(
            f"no number in the config of {cls.__name__} sets its expert count "
            f"(tried {', '.join('.'.join(p) for p in candidates) or 'none: no key names experts'})"
        )
    return found


def with_count(values: dict[str, Any], paths: list[ConfigPath], count: int) -> dict[str, Any]:
    """A deep copy of a config dict with the numbers at `paths` replaced."""
    changed = copy.deepcopy(values)
    for path in paths:
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        old = parent[path[-1]]
        parent[path[-1]] = [count] * len(old) if isinstance(old, list) else count
    return changed


def width_keys(
    config: PreTrainedConfig, values: dict[str, Any], cls: type[PreTrainedModel], stack: str
) -> list[ConfigPath]:
    """Paths of the numbers in `values` that set the number of neurons of the experts in `stack`, and nothing else.

    Raises UnsupportedModelError when no key does, naming what else the one that does sets (shared experts, dense
    layers).
    """

    def built(changed: dict[str, Any]) -> PreTrainedModel:
        model: PreTrainedModel = hf.meta_skeleton(type(config).from_dict(copy.deepcopy(changed)), cls)
        return model

    one = built(values)
    paths = expert_counts(one, stack)
    widths = {path: FusedExperts(one.get_submodule(path)).intermediate_size for path in paths}
    shapes = {name: tensor.shape for name, tensor in one.state_dict().items()}
    beside: dict[str, str] = {}
    for key, value in numbers(values):
        if value not in widths.values():
            continue
        try:
            two = built(with_count(values, [key], 2 * value))
            wide = {path: FusedExperts(two.get_submodule(path)).intermediate_size for path in paths}
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, StrictDataclassError):
            continue  # the config's own validation refuses the key alone
        if wide != {path: 2 * width for path, width in widths.items()}:
            continue
        changed = [n for n, t in two.state_dict().items() if t.shape != shapes.get(n)]
        other = next((n for n in changed if not n.startswith(tuple(f"{p}." for p in paths))), None)
        if other is None:
            return [key]
        beside[".".join(key)] = other
    told = "; ".join(f"{key!r} also sets the size of {other}" for key, other in beside.items())
    raise UnsupportedModelError(
        f"no number in the config of {cls.__name__} sets the width of its experts alone ({told or 'no key follows it'})"
    )


def expert_axes(
    model: PreTrainedModel, values: dict[str, Any], paths: list[ConfigPath], stack: str
) -> dict[str, ExpertAxes]:
    """Axes of every layer's block: module path of an experts module → its axes.

    Args:
        model: skeleton or live model as its config says.
        values: its config as a dict.
        paths: what `count_keys` found.
        stack: module path of the list of decoder layers.
    """
    # Both at their pristine size: `model` may already hold layers with fewer experts.
    one = hf.meta_skeleton(type(model.config).from_dict(copy.deepcopy(values)), type(model))
    counts = expert_counts(one, stack)
    count = max(counts.values())
    two = hf.meta_skeleton(type(model.config).from_dict(with_count(values, paths, 2 * count)), type(model))
    axes: dict[str, ExpertAxes] = {}
    for path, experts in counts.items():
        index = layer_index(path, stack)
        if index is None or experts != count:
            continue
        layer = f"{stack}.{index}"
        # Several experts modules in one layer: each owns what lies beside it.
        scope = block_path(path, layer, [p for p in counts if p.startswith(layer + ".")])
        axes[path] = _compare(one.get_submodule(layer), two.get_submodule(layer), scope, experts)
    return axes


def expert_counts(model: nn.Module, stack: str = "") -> dict[str, int]:
    """Module path of every fused experts module (under `stack`) → number of experts."""
    prefix = stack + "." if stack else ""
    return {
        path: int(module.down_proj.shape[0])
        for path, module in model.named_modules()
        if path.startswith(prefix) and hf.is_fused_experts(module)
    }


def layer_index(path: str, stack: str) -> int | None:
    """Number of the decoder layer that a module path lies in."""
    match = re.match(re.escape(stack) + r"\.(\d+)\.", path)
    return int(match[1]) if match else None


def block_path(experts: str, layer: str, in_layer: list[str]) -> str:
    """Path, relative to the layer, of the module that holds router and experts; '' where that is the layer itself."""
    parent = experts.removeprefix(layer + ".").rpartition(".")[0]
    if parent == "" and len(in_layer) > 1:
        raise UnsupportedModelError(f"{layer} has several experts modules directly in the layer: {', '.join(in_layer)}")
    return parent


def _compare(one: nn.Module, two: nn.Module, scope: str, experts: int) -> ExpertAxes:
    prefix = scope + "." if scope else ""
    tensors: dict[str, tuple[int, int]] = {}
    ours = dict(one.named_parameters()) | dict(one.named_buffers())
    theirs = dict(two.named_parameters()) | dict(two.named_buffers())
    for name, tensor in ours.items():
        other = theirs.get(name)
        if not name.startswith(prefix) or other is None or tensor.shape == other.shape:
            continue
        changed = [d for d, (a, b) in enumerate(zip(tensor.shape, other.shape, strict=True)) if a != b]
        if len(changed) != 1 or other.shape[changed[0]] - tensor.shape[changed[0]] != experts:
            raise UnsupportedModelError(
                f"tensor {name!r} goes from {list(tensor.shape)} to {list(other.shape)} when the experts double: "
                "no dimension of it counts experts"
            )
        tensors[name] = (changed[0], tensor.shape[changed[0]] - experts)
    attributes = []
    modules = dict(two.named_modules())
    for path, module in one.named_modules():
        if not (path + ".").startswith(prefix) or path not in modules:
            continue
        for name, value in vars(module).items():
            other_value = vars(modules[path]).get(name)
            if type(value) is not int or type(other_value) is not int or value == other_value:
                continue
            if other_value - value == experts:
                attributes.append(CountAttribute(path, name, value - experts))
            elif other_value == 2 * value and experts % value == 0:
                attributes.append(CountAttribute(path, name, 0, ratio=experts // value))
            else:
                raise UnsupportedModelError(f"{path}.{name} goes from {value} to {other_value} when the experts double")
    return ExpertAxes(tensors, tuple(attributes))


def _follows(
    paths: list[ConfigPath],
    values: dict[str, Any],
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    stack: str,
    reference: dict[str, int],
) -> bool:
    """Whether doubling the numbers at `paths` doubles the experts of some layer."""
    count = max(reference.values())
    try:
        changed = type(config).from_dict(with_count(values, paths, 2 * count))
        counts = expert_counts(hf.meta_skeleton(changed, cls), stack)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return False  # the config's own validation refuses the key alone
    return any(counts.get(path, 0) == 2 * count for path in reference)


def numbers(values: dict[str, Any], prefix: ConfigPath = ()) -> Iterator[tuple[ConfigPath, int]]:
    """Integers in a nested dict; of a list of one repeated integer, that integer."""
    for key, value in values.items():
        path = (*prefix, key)
        if isinstance(value, dict):
            yield from numbers(value, path)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield path, value
        elif isinstance(value, list) and value and all(type(v) is int for v in value) and len(set(value)) == 1:
            yield path, value[0]


def decoded(values: Any) -> Any:
    """JSON values of a config with what transformers writes for infinite numbers turned back into numbers."""
    if isinstance(values, dict):
        return float(values["__float__"]) if "__float__" in values else {k: decoded(v) for k, v in values.items()}
    return [decoded(v) for v in values] if isinstance(values, list) else values
