"""Everything that this project uses of transformers beyond its public interface, in one place.

Promise: no other module imports a private name of transformers. What is used here is the conversion mapping between
names on disk and names in the module tree (both directions), the loading of a part of a checkpoint into a model on
the meta device, and the interfaces through which experts and attention dispatch their forwards. The conformance test
runs all of it on the oldest and the newest transformers that setup.cfg admits.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from moe_compress.errors import CheckpointError, UnsupportedModelError

# The experts implementation under which a model runs while this toolkit looks at it.
IMPLEMENTATION = "moe_compress"
# The attention function of layers in which it is watched what tokens receive.
_ATTENTION = "moe_compress_received"


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `config.architectures` names, or the causal-LM class of the model type."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    mapped = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if mapped is None:
        named = ", ".join(config.architectures or ()) or "no architecture"
        raise UnsupportedModelError(
            f"model type {config.model_type!r} ({named}) has no model class in transformers "
            f"{transformers.__version__}; models with code of their own are not supported"
        )
    found_class: type[PreTrainedModel] = mapped[0] if isinstance(mapped, (tuple, list)) else mapped
    return found_class


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's module tree, parameters on the meta device (no memory), buffers real, in eval mode."""
    with init_empty_weights(include_buffers=False), quiet():
        model = model_class(config)._from_config(config, dtype=dtype)
    return model.eval()


def meta_skeleton(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    """Like `skeleton`, buffers on the meta device too: for looking at shapes only, and cheaper."""
    with torch.device("meta"), quiet():
        return cls._from_config(config)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no advice: what matters is reported by the caller."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_processor(folder: str | Path) -> Any:
    """A checkpoint folder's processor. Where torchvision isn't installed, without the part that prepares videos, which
    alone needs it (images are then resized by pillow). Raises whatever transformers does where that can't be loaded."""
    if importlib.util.find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(folder)
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind not in PROCESSOR_MAPPING_NAMES:
        raise ValueError(f"transformers has no processor for {kind}")
    cls = getattr(transformers, PROCESSOR_MAPPING_NAMES[kind])

    def check(self: Any, name: str, argument: Any) -> Any:
        return type(None) if argument is None else cls.check_argument_for_proper_class(self, name, argument)

    lenient = type(cls.__name__, (cls,), {"check_argument_for_proper_class": check})
    makers = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    if unknown := set(cls.get_attributes()) - {*makers, "video_processor"}:
        raise ValueError(f"{cls.__name__} without torchvision: {', '.join(sorted(unknown))} can't be loaded")
    parts = {n: makers[n].from_pretrained(folder) if n in makers else None for n in cls.get_attributes()}
    values, _ = cls.get_processor_dict(folder)
    parts["chat_template"] = values.get("chat_template") or getattr(parts.get("tokenizer"), "chat_template", None)
    accepted = inspect.signature(cls.__init__).parameters
    return lenient(**parts, **{k: v for k, v in values.items() if k in accepted and k not in parts})


class NameMap:
    """Names of tensors on disk ↔ names in the module tree, as transformers' own loader would map them.

    Attributes:
        runtime: disk name → the tensor that it fills; several may share one (the experts of a layer are fused).
        filled: every tensor that something on disk fills; more than `runtime` names where one fills several.
    """

    def __init__(self, model: PreTrainedModel, disk_names: Iterable[str]):
        self.model = model
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = dict(model.state_dict())
        targets = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
        self.runtime: dict[str, str] = {}
        self.filled: set[str] = set()
        self.converted: set[str] = set()  # disk names of tensors that don't become what they are in the file
        # The loader's order: some renamings switch on when they meet the first of their names.
        for name in sorted(disk_names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            self.runtime[name] = target
            self.filled.add(target)
            if pattern is not None:
                self.converted.add(name)
                first, *others = targets[pattern]
                self.filled.update(target.replace(first, other) for other in others)
        # Only what this checkpoint used may be reverted: a fused file stays fused, a prefix that was absent stays so.
        self.used = [entry for entry in mapping if entry.was_used()]

    def to_disk(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runtime tensors → tensors under the names and in the layout of this checkpoint's files."""
        return to_disk_by(self.used, self.model, tensors)


def conversions(model: PreTrainedModel) -> list[Any] | None:
    """What a model in memory was loaded by, for `to_disk_by`; None for its family's own mapping."""
    return getattr(model, "_weight_conversions", None)


def forget_decoding(model: PreTrainedModel) -> None:
    """Where transformers decoded a quantized checkpoint into this model, let it be saved dense, in its family's layout.

    The loader's mapping, run backwards, would write dense weights under the names of codes, or fail.
    """
    operations = [op for entry in conversions(model) or () for op in getattr(entry, "operations", ())]
    if any(hasattr(operation, "hf_quantizer") for operation in operations):
        model._weight_conversions = None


def to_disk_by(
    entries: list[Any] | None, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Runtime tensors → tensors under the names and in the layout that the conversion `entries` lead from."""
    before = conversions(model)
    model._weight_conversions = None if entries is None else list(entries)
    try:
        return dict(revert_weight_conversion(model, dict(tensors)))
    finally:
        model._weight_conversions = before


def to_disk_default(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Like `NameMap.to_disk` for a model that came from no file here: the layout `save_pretrained` would write."""
    return dict(revert_weight_conversion(model, dict(tensors)))


def save_as_it_runs(model: PreTrainedModel) -> None:
    """Make `save_pretrained` write the names of the module tree, which its loader takes as well, and the guard.

    The family's mapping is for dense experts: it would rename packed ones, and in some families join them. The guard is
    the name of this package's implementation in config.json: transformers refuses it where the package isn't imported,
    instead of initialising experts at random.
    """
    model._weight_conversions = []
    model.config.experts_implementation = IMPLEMENTATION


def untie(model: PreTrainedModel, path: str) -> None:
    """Nothing in the module at `path` shares a parameter with others any more, also when ties are looked up anew."""
    for owner in (model, *(m for m in model.modules() if isinstance(m, PreTrainedModel))):
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            tied = getattr(owner, attribute, None) or {}
            setattr(owner, attribute, {n: o for n, o in tied.items() if not n.startswith(f"{path}.")})


def choose_implementation(model: PreTrainedModel) -> None:
    """Where config.json names this package's implementation (the guard), run what transformers itself would choose."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation_internal", None) == IMPLEMENTATION:
            config._experts_implementation_internal = model.get_correct_experts_implementation(None)  # type: ignore[union-attr]


def run_here(experts: Iterable[nn.Module]) -> None:
    """Run these experts modules by this package's implementation from now on, those that run themselves apart."""
    for module in experts:
        if is_fused_experts(module):
            module.config._experts_implementation_internal = IMPLEMENTATION  # type: ignore[union-attr]


def load_into(model: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
    """Set those parameters of `model` that `tensors` (disk name → tensor or lazy slice) hold; leave all others.

    Each parameter gets the dtype that it has in `model` before the call. Goes through the model's conversion mapping
    (stacking experts, concatenating gate and up, transposing, …), one target parameter at a time.
    Raises CheckpointError when a tensor has no place, has another shape, or cannot be converted.
    """
    # A fresh mapping each time: its entries keep state.
    config = LoadStateDictConfig(device_map={"": "cpu"}, weight_mapping=get_model_conversion_mapping(model))
    # Without this, a thread pool would read the whole part ahead of its conversion and hold it twice.
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
    for name, found, expected in info.mismatched_keys:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(found)}, but config.json asks for {list(expected)}: "
            "the checkpoint and its config.json don't belong together"
        )
    for name, text in info.conversion_errors.items():
        reason = text.strip().splitlines()[-2:]
        raise CheckpointError(f"tensors of {name!r} can't be converted: {' '.join(reason)}")
    for name in sorted(info.unexpected_keys):
        raise CheckpointError(f"tensor {name!r} has no place in {type(model).__name__}")


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Patterns of parameters that transformers keeps in float32 when the model runs in `dtype`."""
    return sorted(model._get_dtype_plan(dtype))


def may_be_missing(model: PreTrainedModel) -> list[str]:
    """Patterns of tensors that a checkpoint needn't hold."""
    return list(model._keys_to_ignore_on_load_missing or ())


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module's class carries transformers' experts interface."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return all(hasattr(module, flag) for flag in flags) and hasattr(module, "_apply_gate")


def register_implementation(forward: Callable[..., torch.Tensor]) -> None:
    """Make `forward(experts, hidden_states, top_k_index, top_k_weights)` selectable as `IMPLEMENTATION`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


@contextmanager
def implementation(model: PreTrainedModel, name: str = IMPLEMENTATION) -> Iterator[None]:
    """Run the model's experts through the named implementation; what was set before comes back afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if is_fused_experts(m)}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation_internal = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]


def register_attention(forward: Callable[..., Any]) -> None:
    """Make `forward(module, query, key, value, attention_mask, **keywords)` what `attending_here` names."""
    AttentionInterface.register(_ATTENTION, forward)


def attending_here(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a module's config under which the module attends by the function registered here."""
    own = copy.copy(config)
    own._attn_implementation_internal = _ATTENTION
    return own


def attends_by(config: PreTrainedConfig) -> str:
    """Name of the implementation by which a module with this config attends."""
    return config._attn_implementation or "eager"


def attention_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function by which a module attends under the name of an implementation; "eager" is its family's own."""
    family: Any = sys.modules[type(module).__module__]
    functions = getattr(family, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    found: Callable[..., Any] | None = functions.get(name, getattr(family, "eager_attention_forward", None))
    if found is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no attention function {name!r}")
    return found
