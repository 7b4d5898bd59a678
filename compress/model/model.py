"""A handle on a Mixture-of-Experts model, on disk or in memory, with the same interface.

On disk nothing is loaded at open: the skeleton is on the meta device, and `with model.layer(i) as layer` has that one
decoder layer live and lets it go on exit. What lies outside the decoder layers (embeddings, head) comes to life when
its module first runs and goes when `release_outer` is called. In memory, layers are simply there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.constants import COMPRESSED_TENSORS, QUANT_METHOD
from moe_compress.errors import CheckpointError, InputError, UnsupportedModelError
from moe_compress.heap import release_freed

from . import beside, hf, offload
from .above import DECODER, PRESENTED, function_at
from .axes import ConfigPath, ExpertAxes, count_keys, decoded, expert_axes, expert_counts, layer_index, width_keys
from .beside import OUTER, Matrix
from .block import MoEBlock
from .disk import DiskWeights, Overlay
from .expert_names import ExpertNames, find_expert_names
from .experts import FusedExperts
from .opening import config_of, find_stack, one_per_layer, refuse, refuse_codes
from .reading import Reads, follow
from .saved import check_version
from .tensors import to_meta


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
    """Build with `open` or `wrap`. `plain` is the model as its config alone describes it, for looking at shapes.

    Attributes:
        module: the transformers model (skeleton or live).
        config_values: its config as a dict (config.json as it stands, for a folder).
        weights: where its tensors come from; None for a model in memory.
        overlay: changed layers that replace the folder's.
        device: where inputs go.
        dtype: in what layers compute when they are live.
        stack: module path of the decoder layers that are compressed.
        count_paths: keys of the config that hold the number of experts.
        config_widths: layer → neurons of each expert, as the config says.
        untouched: experts modules elsewhere (other towers), which stay as they are.
    """

    def __init__(self, module: PreTrainedModel, values: dict[str, Any], plain: PreTrainedModel):
        self.module = module
        self.config_values = values
        self.weights: DiskWeights | None = None
        self._overlay: Overlay | None = None
        self.device = torch.device("cpu")
        packed = beside.packed_state(module)[0]  # a module with packed embeddings answers with their scales' dtype
        computing = (p.dtype for n, p in module.named_parameters() if p.is_floating_point() and n not in packed)
        self.dtype = next(computing, module.dtype)
        self._conversions = hf.conversions(module)
        self.stack = find_stack(plain)
        self.untouched = sorted(p for p in expert_counts(plain) if not p.startswith(self.stack + "."))
        structure = decoded({k: v for k, v in values.items() if k != "quantization_config"})
        self.count_paths: list[ConfigPath] = count_keys(module.config, structure, type(module), self.stack)
        self._axes = expert_axes(module, structure, self.count_paths, self.stack)
        self._paths = one_per_layer(self._axes, self.stack)
        own = {i: FusedExperts(plain.get_submodule(path)) for i, path in sorted(self._paths.items())}
        self.original_experts = own[self.moe_layers[0]].num_experts
        self.config_widths = {i: experts.intermediate_size for i, experts in own.items()}
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

        A folder that others quantized is seen packed if `PRESENTED` reads it as it stands, else dense: tensors are
        decoded when they are read (quant/sources.py).

        Args:
            path: folder with config.json and safetensors, or its name on the Hub if the local cache has it.
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
        config = config_of(source)
        method = source.quantization.get("quant_method")
        if method is None:
            refuse_codes(source)
        elif method != QUANT_METHOD:
            if dequantize or method not in PRESENTED:
                source = function_at(DECODER)(source)
            config.__dict__.pop("quantization_config", None)  # the skeleton is a dense one
        module = hf.skeleton(config, dtype)
        model = cls(module, source.config, module)
        model.device, model.dtype = torch.device(device), dtype
        quantized = source.quantization
        if quantized.get("quant_method") == QUANT_METHOD:
            check_version(quantized.get("format_version"))
            model._restructure(quantized.get("matrices") or {}, dtype)
            for index, description in quantized["blocks"].items():
                block = model.block(int(index))
                if description["experts"] != block.path:
                    raise CheckpointError(
                        f"{path}: quantization_config puts the experts of layer {index} at "
                        f"{description['experts']!r}, {type(module).__name__} has them at {block.path!r}"
                    )
                block.restructure(description)
        elif quantized.get("quant_method") in PRESENTED:
            present = function_at(PRESENTED[quantized["quant_method"]])
            try:
                source, descriptions, matrices = present(model, source)
            except UnsupportedModelError:
                if quantized["quant_method"] != COMPRESSED_TENSORS:
                    raise
                # Packed as nothing here is (zero points, rows, blocks): dense, as passes see it, or refused by name.
                return cls.open(path, dtype=dtype, device=device, overlay=overlay, dequantize=True, source=source)
            for number, description in descriptions.items():
                model.block(number).restructure(description)
            model._restructure(matrices, dtype)
        model._remember()
        model.weights = DiskWeights(module, source, model.stack, model.device, dtype)
        model.overlay = overlay
        return model

    @classmethod
    def wrap(cls, module: PreTrainedModel) -> MoEModel:
        """A loaded model, also one that accelerate dispatched over devices or offloaded.

        Raises UnsupportedModelError for a dense model, one that others quantized, and a family that can't be handled.
        """
        refuse(module.config)
        values = json.loads(module.config.to_json_string(use_diff=False))
        quantized = values.pop("quantization_config", None) or {}
        values.pop("experts_implementation", None)
        if quantized and quantized.get("quant_method") != QUANT_METHOD:
            raise UnsupportedModelError(
                f"this {type(module).__name__} is quantized already ({quantized.get('quant_method')}): start from the "
                "model in full precision"
            )
        hf.forget_decoding(module)
        if not quantized:  # decoding leaves a text model's own
            module.config.get_text_config().__dict__.pop("quantization_config", None)
            (values.get("text_config") or {}).pop("quantization_config", None)
        plain = hf.meta_skeleton(module.config, type(module))  # layers of `module` may be others by now
        model = cls(module, {**values, "architectures": [type(module).__name__]}, plain)
        model.device = offload.execution_device(module.get_input_embeddings())
        return model

    # --- looking -----------------------------------------------------------------------------------------------

    @property
    def source(self) -> Checkpoint:
        """The folder that the model is read from. Raises ValueError for a model in memory."""
        if self.weights is None:
            raise ValueError("this model is in memory, not read from a folder")
        return self.weights.source

    @functools.cached_property
    def width_paths(self) -> list[ConfigPath]:
        """Keys of the config that set the experts' width. Raises UnsupportedModelError where none sets that alone."""
        values = decoded({k: v for k, v in self.config_values.items() if k != "quantization_config"})
        return width_keys(self.module.config, values, type(self.module), self.stack)

    def narrowed(self, widths: Mapping[int, int | None]) -> str | list[ConfigPath]:
        """How a config says that layers' experts have these widths: the keys to change, none where it says so already,
        or why it can't. None stands for experts of unequal width."""
        if all(widths[i] == width for i, width in self.config_widths.items()):
            return []
        if None in widths.values():
            return "experts of a layer differ in width"
        if len(set(widths.values())) > 1:
            return "layers differ in the width of their experts"
        try:
            return self.width_paths
        except UnsupportedModelError as error:
            return str(error)

    @property
    def overlay(self) -> Overlay | None:
        """Changed layers that replace the folder's."""
        return self._overlay

    @overlay.setter
    def overlay(self, overlay: Overlay | None) -> None:
        self._overlay = overlay
        self.refresh_outer()

    def refresh_outer(self) -> None:
        """Let what lies outside the decoder layers be as the overlay has it (folders only)."""
        changed = self._overlay.get(OUTER) if self._overlay is not None else None
        if changed is not None and self.weights is not None:
            self.weights.change_outer(*changed)

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
        module, own = self.module.get_submodule(layer), path.removeprefix(layer + ".")
        return MoEBlock(index, module, own, self._axes[path], lambda: self.reads[index])

    def own_names(self, index: int) -> frozenset[str]:
        """Names, relative to the layer, that a block's tensors have in the source; none where there is no block."""
        return self._own.get(index, frozenset())

    def prefix(self, index: int) -> str:
        """What stands before the names of a decoder layer's tensors, or (OUTER) of those outside the layers."""
        return "" if index == OUTER else f"{self.stack}.{index}."

    def descriptions(self) -> dict[int, dict[str, Any]]:
        """What blocks and packed matrices are now: decoder layer, or OUTER → description (see Overlay)."""
        found = {i: self.block(i).state()[1] for i in self.moe_layers}
        for path, values in beside.packed_state(self.module)[1].items():
            number = layer_index(path, self.stack)
            index = OUTER if number is None else number
            own = found.setdefault(index, {})
            own.setdefault("matrices", {})[path.removeprefix(self.prefix(index))] = values
        return found

    def description(self, index: int) -> dict[str, Any]:
        """A block's description (`MoEBlock.state`) as the source holds it."""
        return self._descriptions[index]

    def _remember(self) -> None:
        """Names and descriptions of blocks and packed matrices before anything changes them."""
        self._own = {i: frozenset(self.block(i).own_names()) for i in self.moe_layers}
        self._descriptions = {i: self.block(i).state()[1] for i in self.moe_layers}
        self.packed_matrices = beside.packed_state(self.module)[1]

    def _restructure(self, matrices: Mapping[str, dict[str, Any]], dtype: torch.dtype) -> None:
        try:
            beside.restructure(self.module, matrices, dtype)
        except (AttributeError, TypeError) as error:
            raise CheckpointError(
                f"quantization_config describes packed matrices that don't fit {type(self.module).__name__}: {error}"
            ) from error

    @functools.cached_property
    def _beside(self) -> tuple[dict[int, list[Matrix]], dict[str, str]]:
        blocks = {index: self.block(index) for index in self.moe_layers}
        return beside.find_matrices(self.module, self.stack, blocks, self._stored_as, self._holds)

    def _holds(self, path: str) -> bool:
        """Whether a folder holds a module's matrix as it is."""
        return self.weights is not None and self.weights.stored_as(f"{path}.weight") is not None

    def _stored_as(self, weights: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
        """See `beside.stored_whole`."""
        if self.weights is not None:
            return {p: found for p in weights if (found := self.weights.stored_as(f"{p}.weight")) is not None}
        return beside.stored_whole(weights, self.to_disk)

    @property
    def matrices(self) -> dict[int, list[Matrix]]:
        """Decoder layer, or OUTER → what can be packed beside its experts, as the source has it."""
        return self._beside[0]

    @property
    def kept(self) -> dict[str, str]:
        """Full path of linear layers and embeddings that are never packed → why."""
        return self._beside[1]

    @functools.cached_property
    def reads(self) -> dict[int, Reads | str]:
        """Layer → the norm and the matrices that what its experts read has to do with, or why that isn't known."""
        experts = {i: self.block(i).path for i in self.moe_layers}
        return follow(self.module.config, type(self.module), self.stack, experts)

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
        changed = self._overlay.get(index) if self._overlay is not None else None
        self.weights.load_layer(index, block, self._own.get(index, frozenset()), changed, stored)
        try:
            yield Layer(index, module, block)
        finally:
            to_meta(module)
            release_freed()

    @contextmanager
    def editing(self, layer: Layer) -> Iterator[Any]:
        """Within the context the tensors of a live layer may be read and changed (it must not run there).

        Gives the layer's block, if it has one.
        """
        if self.weights is not None:
            yield layer.block
            return
        with offload.editable(layer.module):
            yield layer.block

    def round_block(self, layer: Layer) -> None:
        """Give a changed block's live weights the values that will be stored: what follows must see those."""
        block = layer.block
        assert block is not None
        tensors, description = block.state()
        stored = self.stored_dtypes(layer.index)
        if description["kind"] == "fused":
            block.assign({n: t.to(stored.get(n, t.dtype)).to(t.dtype) for n, t in tensors.items()})
        if description["kind"] == "ragged":  # holds its dense weights as they are stored
            came = next(d for n, d in stored.items() if n.startswith(block.path) and "down_proj" in n)
            block.assign({n: tensors[n].to(came) for n in block.weight_names() if not n.endswith("_bias")})

    @contextmanager
    def outer_weights(self, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Dense matrices of embeddings and head by path, as the source stores them."""
        if self.weights is not None:
            disk = {m.path: f"{m.disk}.weight" for m in self.matrices[OUTER]}
            yield {path: self.source.get(disk[path]) for path in paths}
            return
        modules: dict[str, Any] = {path: self.module.get_submodule(path) for path in paths}
        with offload.real(modules.values()):
            yield {path: module.weight.detach() for path, module in modules.items()}

    def put_outer(self, path: str, module: nn.Module, head: str = "") -> None:
        """Put a packed module in place of embeddings or head; `head` is what shares the embeddings' weights."""
        before = self.module.get_submodule(path)
        beside.replace(self.module, path, module)
        offload.inherit(before, module)
        if head:
            before = self.module.get_submodule(head)
            beside.share(self.module, path, head)
            offload.inherit(before, self.module.get_submodule(head))

    @contextmanager
    def reading(self, index: int) -> Iterator[dict[str, Tensor]]:
        """Tensors of a decoder layer of a model in memory, by full name; for OUTER of all outside the layers."""
        if index == OUTER:
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
