"""A smaller top-k said by the config alone, and by a GGUF's metadata, made from it: what every runtime reads, where it
means the same as a rule.

It does where routers choose by the very weights that they hand on, so that the smallest weights are the last chosen,
and where the family normalises the weights exactly if the rule does. Found by measurement, like all about families.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from moe_compress.errors import UnsupportedModelError

from . import families, hf
from .axes import ConfigPath, decoded, numbers, with_count
from .model import MoEModel

# What such a rule is called in shapes (LayerShape.rules): a rule while the model is changed, a number in the file.
AS_CONFIG = "fewer by config"


def top_k_path(model: MoEModel) -> ConfigPath:
    """The key of config.json that says how many experts a token uses, in every layer.

    Raises UnsupportedModelError where no key alone does, or routers choose by more than the weights.
    """
    family = type(model.module).__name__
    for index in model.moe_layers:
        block = model.block(index)
        scored = {n for n in block.axes.tensors if not n.startswith(f"{block.path}.")}
        others = scored - {f"{block.router_path}.weight", f"{block.router_path}.bias"}
        if others or block.groups is not None:
            why = f"by {', '.join(sorted(others))} as well" if others else "in groups"
            raise UnsupportedModelError(
                f"{family} chooses experts {why} (layer {index}), so fewer experts per token in config.json isn't "
                "the same as leaving the smallest weights out: take the target 'native'"
            )
    values = decoded({k: v for k, v in model.config_values.items() if k != "quantization_config"})
    before = {model.block(i).top_k for i in model.moe_layers}
    if len(before) == 1 and (number := next(iter(before))) > 1:
        for path, value in numbers(values):
            if value == number and _says(model, with_count(values, [path], number - 1), number - 1):
                return path
    raise UnsupportedModelError(
        f"no key of {family}'s config.json alone says how many experts a token uses: take the target 'native'"
    )


def with_top_k(model: MoEModel, values: dict[str, Any], count: int) -> dict[str, Any]:
    """`values` of a config with that many experts per token. Raises like `top_k_path`.

    gpt-oss's published config.json says it twice, under a key that transformers doesn't read and other runtimes do.
    """
    path = top_k_path(model)
    twin = (*path[:-1], "experts_per_token")
    return with_count(values, [path, *(other for other, _ in numbers(values) if other == twin)], count)


def renormalizes(weight_SK: Tensor) -> bool:
    """Whether routing weights, ranked or not, sum up to the same number for every token."""
    sums = weight_SK.double().sum(-1)
    return bool((sums - sums.mean()).abs().max() <= 1e-2 * sums.mean().abs())


def _says(model: MoEModel, values: dict[str, Any], count: int) -> bool:
    """Whether every router of the model that a config describes chooses so many."""
    try:
        skeleton = hf.meta_skeleton(type(model.module.config).from_dict(values), type(model.module))
        for index in model.moe_layers:
            block = model.block(index)
            layer = skeleton.get_submodule(f"{model.stack}.{index}")
            parent = layer.get_submodule(block.parent_path)
            if families.top_k(layer.get_submodule(block.router_path), parent) != count:
                return False
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, StrictDataclassError):
        return False  # the config's own validation refuses the key alone
    return True
