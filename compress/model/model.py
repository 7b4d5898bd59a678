"""A handle on a Mixture-of-Experts model, on disk or in memory, with the same interface.

On disk nothing is loaded at open: the skeleton is on the meta device, and `with model.layer(i) as layer` has that one
decoder layer live and lets it go on exit. What lies outside the decoder layers (embeddings, head) comes to life when
its module first runs and goes when `release_outer` is called. In memory, layers are simply there.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_compress.checkpoint.reader import Checkpoint, TensorInfo
from moe_compress.constants import COMPRESSED_TENSORS, GGUF, GPTQ, QUANT_METHOD
from moe_compress.errors import CheckpointError, InputError, UnsupportedModelError

from . import families, hf, offload
from .axes import ConfigPath, ExpertAxes, count_keys, decoded, expert_axes, expert_counts, layer_index
from .block import MoEBlock, check_version
from .disk import DiskWeights, Overlay
from .expert_names import ExpertNames, find_expert_names
from .tensors import release_freed, to_meta

# What presents a folder in another quantized format as a dense one: "module:function". By name, like PRESENTED.
DECODER = "moe_compress.quant.sources:decode"
# Formats of others that are read as if they were native: quant_method → "module:function", called with a model and its
# folder, giving the folder presented anew and the description of each layer. By name, because the view of a model
# imports no format.
PRESENTED: dict[str, str] = {
    COMPRESSED_TENSORS: "moe_compress.export.compressed_reader:present",
    GPTQ: "moe_compress.export.gptq_reader:present",
    GGUF: "moe_compress.export.gguf_reader:present",
}


@dataclass
class Layer:
    """A live decoder layer.

    Attributes:
        index: its number.
        module: the module itself.
        block: its router and experts; None in a dense layer.
    """

    index: int
    module: nn.Module
    block: MoEBlock | None


class MoEModel:
    """Build with `open` or `wrap`.

    Attributes:
        module: the transformers model (skeleton or live).
        config_values: its config as a dict (config.json as it stands, for a folder).
        weights: where its tensors come from; None for a model in memory.
        overlay: changed blocks that replace the folder's.
        device: where inputs go.
        stack: module path of the decoder layers that are compressed.
        count_paths: keys of the config that hold the number of experts.
        untouched: experts modules elsewhere (other towers), which stay as they are.
    """

    def __init__(self, module: PreTrainedModel, values: dict[str, Any]):
        self.module = module
        self.config_values = values
        self.weights: DiskWeights | None = None
        self.overlay: Overlay | None = None
        self.device = torch.device("cpu")
        self._conversions = hf.conversions(module)
        self.stack = _find_stack(module)
        self.untouched = sorted(p for p in expert_counts(module) if not p.startswith(self.stack + "."))
        structure = decoded({k: v for k, v in values.items() if k != "quantization_config"})
        self.count_paths: list[ConfigPath] = count_keys(module.config, structure, type(module), self.stack)
        self._axes = expert_axes(module, structure, self.count_paths, self.stack)
        self._paths = _one_per_layer(self._axes, self.stack)
        self.original_experts = self.block(self.moe_layers[0]).num_experts
        self._remember()

    # --- building ----------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        overlay: Overlay | None = None,
        dequantize: bool = False,
        source: Checkpoint | None = None,
    ) -> MoEModel:
        """A checkpoint folder; reads headers and small tensors only.

        A folder that others quantized is seen dense: tensors are decoded when they are read (quant/sources.py).

        Args:
            path: folder with config.json and safetensors.
            dtype: in what layers compute when they are live (float32 on a CPU: bfloat16 is several times slower there).
            device: where live layers go.
            overlay: changed blocks that replace the folder's.
            dequantize: also decode what could stay packed (compressed-tensors), for passes that change it.
            source: what presents the folder's tensors, where that isn't the folder as it stands.

        Raises:
            InputError, CheckpointError: no such folder, or it isn't what it claims to be.
            UnsupportedModelError: a dense model, or a family or quantization that can't be handled, with the reason.
        """
        source = source or Checkpoint(path)
        config = _read_config(source)
        method = (source.config.get("quantization_config") or {}).get("quant_method")
        if method != QUANT_METHOD:
            if "quantization_config" in source.config and (dequantize or method not in PRESENTED):
                source = _named(DECODER)(source)
            config.__dict__.pop("quantization_config", None)  # the skeleton is a dense one
        module = hf.skeleton(config, dtype)
        model = cls(module, source.config)
        quantized = source.config.get("quantization_config") or {}
        if quantized.get("quant_method") == QUANT_METHOD:
            check_version(quantized.get("format_version"))
            for index, description in quantized["blocks"].items():
                block = model.block(int(index))
                if description["experts"] != block.path:
                    raise CheckpointError(
                        f"{path}: quantization_config puts the experts of layer {index} at "
                        f"{description['experts']!r}, {type(module).__name__} has them at {block.path!r}"
                    )
                block.restructure(description)
        elif quantized.get("quant_method") in PRESENTED:
            source, descriptions = _named(PRESENTED[quantized["quant_method"]])(model, source)
            for number, description in descriptions.items():
                model.block(number).restructure(description)
        model._remember()
        model.overlay = overlay
        model.device = torch.device(device)
        model.weights = DiskWeights(module, source, model.stack, model.device)
        return model

    @classmethod
    def wrap(cls, module: PreTrainedModel) -> MoEModel:
        """A loaded model, also one that accelerate dispatched over devices or offloaded.

        Raises UnsupportedModelError for a dense or quantized model, and for a family that can't be handled.
        """
        _refuse(module.config)
        values = json.loads(module.config.to_json_string(use_diff=False))
        quantized = values.pop("quantization_config", None) or {}
        values.pop("experts_implementation", None)
        blocks = quantized.get("blocks", {}).values()
        if quantized and (quantized.get("quant_method") != QUANT_METHOD or any(b["kind"] != "fused" for b in blocks)):
            raise UnsupportedModelError(
                f"this {type(module).__name__} is quantized already ({quantized.get('quant_method')}): start from the "
                "model in full precision"
            )
        model = cls(module, {**values, "architectures": [type(module).__name__]})
        model.device = offload.execution_device(module.get_input_embeddings())
        return model

    # --- looking -----------------------------------------------------------------------------------------------

    @property
    def source(self) -> Checkpoint:
        """The folder that the model is read from. Raises ValueError for a model in memory."""
        if self.weights is None:
            raise ValueError("this model is in memory, not read from a folder")
        return self.weights.source

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers as modules."""
        layers: Any = self.module.get_submodule(self.stack)
        return layers  # type: ignore[no-any-return]

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the decoder layers with experts."""
        return sorted(self._paths)

    def block(self, index: int) -> MoEBlock:
        """Router and experts of a layer, for looking: its tensors hold data only while the layer is live."""
        if index not in self._paths:
            raise InputError(f"decoder layer {index} has no experts")
        layer = f"{self.stack}.{index}"
        path = self._paths[index]
        return MoEBlock(index, self.module.get_submodule(layer), path.removeprefix(layer + "."), self._axes[path])

    @functools.cached_property
    def stored_blocks(self) -> dict[int, dict[str, TensorInfo]]:
        """Layer → disk name → info of its router's and experts' tensors as the folder stores them."""
        assert self.weights is not None
        return {i: self.weights.tensors(i, set(self._own[i])) for i in self.moe_layers}

    def own_names(self, index: int) -> frozenset[str]:
        """Names, relative to the layer, that a block's tensors have in the source."""
        return self._own[index]

    def description(self, index: int) -> dict[str, Any]:
        """A block's description (`MoEBlock.state`) as the source holds it."""
        return self._descriptions[index]

    def _remember(self) -> None:
        """Names and descriptions of blocks before anything changes them."""
        self._own = {i: frozenset(self.block(i).own_names()) for i in self.moe_layers}
        self._descriptions = {i: self.block(i).state()[1] for i in self.moe_layers}

    def axes(self, index: int) -> ExpertAxes:
        """What counts experts in a layer's block."""
        return self._axes[self._paths[index]]

    def stored_dtypes(self, index: int) -> dict[str, torch.dtype]:
        """Tensors of a layer (runtime names relative to it) → dtype in which the source holds them."""
        if self.weights is not None:
            return self.weights.stored_dtypes(index)
        return {name: tensor.dtype for name, tensor in self.layers[index].state_dict().items()}

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors (by full name) as they are on disk: in the folder, or where a model in memory came from."""
        if self.weights is not None:
            return self.weights.names.to_disk(tensors)
        return hf.to_disk_by(self._conversions, self.module, tensors)

    def expert_names(self, index: int, count: int) -> ExpertNames | None:
        """How `count` experts of a layer are called on disk one by one; None where they are stored together."""
        return find_expert_names(self.block(index), f"{self.stack}.{index}.", count, self.to_disk)

    # --- live layers -------------------------------------------------------------------------------------------

    @contextmanager
    def layer(self, index: int, *, stored: bool = False) -> Iterator[Layer]:
        """The decoder layer, live for the duration of the context.

        Args:
            index: its number.
            stored: tensors in the dtypes of the folder and on the CPU, instead of compute dtype and device.
        """
        module = self.layers[index]
        block = self.block(index) if index in self._paths else None
        if self.weights is None:
            yield Layer(index, module, block)
            return
        changed = self.overlay.get(index) if self.overlay is not None else None
        self.weights.load_layer(index, block, self._own.get(index, frozenset()), changed, stored)
        try:
            yield Layer(index, module, block)
        finally:
            to_meta(module)
            release_freed()

    @contextmanager
    def editing(self, layer: Layer) -> Iterator[MoEBlock]:
        """Within the context the tensors of a live layer's block may be read and changed (it must not run there)."""
        assert layer.block is not None
        if self.weights is not None:
            yield layer.block
            return
        with offload.editable(layer.module):
            yield layer.block

    @contextmanager
    def reading(self, index: int | None) -> Iterator[dict[str, Tensor]]:
        """Tensors of a decoder layer of a model in memory, by full name; for None of all outside the layers."""
        if index is None:
            layers = set(self.layers.modules())
            modules = [m for m in self.module.modules() if m not in layers]
            wanted = lambda name: not name.startswith(self.stack + ".")  # noqa: E731
        else:
            modules = list(self.layers[index].modules())
            wanted = lambda name: name.startswith(f"{self.stack}.{index}.")  # noqa: E731
        with offload.real(modules):
            yield {name: tensor for name, tensor in self.module.state_dict().items() if wanted(name)}

    def release_outer(self) -> None:
        """Let go of large tensors outside the decoder layers (folders only). They come back when they are needed."""
        if self.weights is not None:
            self.weights.release_outer()


def read_config(path: str | Path) -> PreTrainedConfig:
    """config.json of a checkpoint folder as transformers' config object. Raises like `MoEModel.open`."""
    return _read_config(Checkpoint(path))


def _read_config(source: Checkpoint) -> PreTrainedConfig:
    values = source.config
    model_type = values.get("model_type")
    if not model_type:
        raise CheckpointError(f"{source.folder / 'config.json'} names no model_type")
    if reason := families.refusal(str(model_type)):
        raise UnsupportedModelError(f"model type {model_type!r} is not supported: {reason}")
    try:
        config = AutoConfig.from_pretrained(source.folder)
    except (ValueError, TypeError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"transformers can't read {source.folder / 'config.json'}: {reason}") from error
    _refuse(config)
    return config


def _named(where: str) -> Any:
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(module), function)


def _refuse(config: PreTrainedConfig) -> None:
    for model_type in (config.model_type, config.get_text_config().model_type):
        if reason := families.refusal(model_type):
            raise UnsupportedModelError(f"model type {model_type!r} is not supported: {reason}")


def _find_stack(module: PreTrainedModel) -> str:
    """Module path of the list of decoder layers that holds the most experts modules, the text decoder's if several."""
    lists: Counter[str] = Counter()
    for path in expert_counts(module):
        parts = path.split(".")
        for position in range(len(parts) - 1, 0, -1):
            if parts[position].isdigit():
                lists[".".join(parts[:position])] += 1
                break
    if not lists:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no layers with experts: it is a dense model, or not of this kind"
        )
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else None
    inside = {id(m) for m in decoder.modules()} if decoder is not None else set()
    text = [path for path in lists if id(module.get_submodule(path)) in inside]
    return max(text or lists, key=lambda path: lists[path])


def _one_per_layer(axes: dict[str, ExpertAxes], stack: str) -> dict[int, str]:
    """Decoder layer → path of its experts module; the first, where a layer has several (text before vision)."""
    found: dict[int, str] = {}
    for path in axes:
        index = layer_index(path, stack)
        if index is not None:
            found.setdefault(index, path)
    return found
