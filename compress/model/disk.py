"""A skeleton whose parameters come from a checkpoint folder, one decoder layer at a time.

Promise: between two loads nothing of a layer stays in memory; a tensor that the model needs and the folder doesn't
hold is an error when the folder is opened, not when the layer runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import CheckpointError

from . import beside, hf
from .block import MoEBlock
from .tensors import set_tensor, to_meta

# Tensors outside the decoder layers below this size (bytes) are loaded once and stay; larger ones come when needed.
KEEP_OUTER = 1 << 20


class Overlay(Protocol):
    """What replaces the source's, by layer."""

    def get(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (named relative to the decoder layer) and description of what changed in a layer, or None.

        The description is that of the block (`MoEBlock.state`), if the layer has one, with the packed matrices beside
        it under "matrices" (`beside.packed_state`). Layer `beside.OUTER` is what lies outside the decoder layers.
        """


class DiskWeights:
    """Moves parameters of `module` between the folder and memory.

    Attributes:
        names: disk names ↔ runtime names.
        unowned: tensors of the folder that the model class doesn't own (multi-token-prediction heads, …).
    """

    def __init__(
        self, module: PreTrainedModel, source: Checkpoint, stack: str, device: torch.device, dtype: torch.dtype
    ):
        self.module = module
        self.source = source
        self.stack = stack
        self.device = device
        self.dtype = dtype
        self.names = hf.NameMap(module, source.tensors)
        state = module.state_dict()
        self.unowned = sorted(n for n, runtime in self.names.runtime.items() if runtime not in state)
        check_complete(module, self.names.filled, source.folder)
        for name, runtime in self.names.runtime.items():
            if runtime in state:
                self._check_tensor(name, state[runtime])
        # Parameters take this dtype when they compute; a few are kept in float32 by their family.
        compute = {n: p.dtype for n, p in module.named_parameters()}
        keep = re.compile("|".join(p.replace("*", ".*") for p in hf.kept_in_float32(module, dtype)) or r"(?!)")
        self._compute = {n: torch.float32 if d.is_floating_point and keep.search(n) else d for n, d in compute.items()}
        self._disk_names: dict[str, list[str]] = {}
        for name, runtime in self.names.runtime.items():
            self._disk_names.setdefault(runtime, []).append(name)
        self._tied: dict[str, str] = dict(getattr(module, "all_tied_weights_keys", None) or {})
        self._changed_outer: dict[str, Tensor] = {}
        self._watch_outer()

    def _check_tensor(self, name: str, wanted: Tensor) -> None:
        """Raise CheckpointError for a tensor of the folder that can't be what the model wants."""
        found = self.source.tensors[name]
        where = f"{self.source.folder / found.file}: tensor {name!r}"
        if wanted.is_floating_point() and not found.dtype.is_floating_point:
            model = type(self.module).__name__
            raise CheckpointError(f"{where} holds {found.dtype}, and {model} computes with real numbers there")
        if found.dtype.itemsize == 1 and found.dtype.is_floating_point and found.dtype != wanted.dtype:
            raise CheckpointError(f"{where} holds {found.dtype}, and config.json describes no scale for it")
        if name not in self.names.converted and found.shape != tuple(wanted.shape):
            raise CheckpointError(
                f"{where} has shape {list(found.shape)}, but config.json asks for {list(wanted.shape)}: the checkpoint "
                "and its config.json don't belong together"
            )

    # --- layers ------------------------------------------------------------------------------------------------

    def layer_names(self, index: int) -> dict[str, str]:
        """Disk name → runtime name, relative to the decoder layer, of what the folder holds of it."""
        prefix = f"{self.stack}.{index}."
        found: dict[str, str] = {}
        for runtime, names in self._disk_names.items():
            if runtime.startswith(prefix):
                found.update(dict.fromkeys(names, runtime.removeprefix(prefix)))
        return found

    def stored_dtypes(self, index: int) -> dict[str, torch.dtype]:
        """Runtime name, relative to the layer → dtype in the folder."""
        return {runtime: self.source.tensors[name].dtype for name, runtime in self.layer_names(index).items()}

    def stored_as(self, name: str) -> tuple[str, int] | None:
        """Path on disk and bytes of a matrix ("….weight") that the folder holds as it is; None where it doesn't."""
        found = self._disk_names.get(name, [])
        if len(found) != 1 or found[0] in self.names.converted or not found[0].endswith(".weight"):
            return None
        return found[0].removesuffix(".weight"), self.source.tensors[found[0]].nbytes

    def load_layer(
        self,
        index: int,
        block: MoEBlock | None,
        own: frozenset[str],
        changed: tuple[dict[str, Tensor], dict[str, Any]] | None,
        stored: bool,
    ) -> None:
        """Bring a decoder layer to life.

        Args:
            index: number of the layer.
            block: its router and experts, if it has any.
            own: the names that the block's tensors have in the folder.
            changed: the block's tensors and description where they don't come from the folder.
            stored: dtypes as in the folder, on the CPU; otherwise compute dtypes, on the device.
        """
        layer = self.module.get_submodule(f"{self.stack}.{index}")
        names = self.layer_names(index)
        if changed is not None:
            names = {n: r for n, r in names.items() if not replaced(r, changed[1], own)}
            if block is not None and "experts" in changed[1]:
                block.restructure(changed[1])
            beside.restructure(layer, changed[1].get("matrices") or {}, self.dtype)
        dtypes = self.stored_dtypes(index) if stored else {}
        for name, parameter in list(layer.named_parameters()):
            dtype = dtypes.get(name) or self._compute.get(f"{self.stack}.{index}.{name}", parameter.dtype)
            if parameter.dtype != dtype or not parameter.is_meta:
                set_tensor(layer, name, torch.empty(parameter.shape, dtype=dtype, device="meta"))
        hf.load_into(self.module, {n: self.source.slice(n) for n in names})
        if changed is not None:
            wanted = {n: p.dtype for n, p in layer.named_parameters()}
            for name, tensor in changed[0].items():
                set_tensor(layer, name, tensor if stored else tensor.to(wanted.get(name, tensor.dtype)))
        hollow = [n for n, t in layer.state_dict().items() if t.is_meta]
        if hollow:
            raise CheckpointError(f"{self.source.folder}: nothing fills {self.stack}.{index}.{hollow[0]}")
        if not stored and self.device.type != "cpu":
            layer.to(self.device)
        self.source.close()  # or every page ever read would stay mapped

    # --- what lies outside the decoder layers --------------------------------------------------------------------

    def release_outer(self) -> None:
        """Let go of large tensors outside the decoder layers; they come back when their module runs."""
        for path in self._outer:
            to_meta(self.module.get_submodule(path), recurse=False, above=KEEP_OUTER)

    def change_outer(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Give what lies outside the decoder layers other matrices (named from the model's root); see Overlay."""
        matrices = description["matrices"]
        beside.restructure(self.module, matrices, self.dtype)
        self._changed_outer = dict(tensors)
        self._tied = dict(getattr(self.module, "all_tied_weights_keys", None) or {})
        for path in [*matrices, *(v["head"] for v in matrices.values() if "head" in v)]:
            for inner, module in self.module.get_submodule(path).named_modules(prefix=path):
                if module._parameters and inner not in self._outer:
                    self._outer.append(inner)
                module.register_forward_pre_hook(functools.partial(self._before_outer, inner))

    def _watch_outer(self) -> None:
        """Load small outer tensors now, each large one when its module first runs."""
        inside = self.stack + "."
        self._outer = [
            path
            for path, module in self.module.named_modules()
            if not (path + ".").startswith(inside) and (module._parameters or module._buffers)
        ]
        names: list[str] = []
        for path in self._outer:
            module = self.module.get_submodule(path)
            prefix = path + "." if path else ""
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.numel() * tensor.element_size() <= KEEP_OUTER:
                    self._prepare(prefix + leaf)
                    names += self._sources(prefix + leaf)
            module.register_forward_pre_hook(functools.partial(self._before_outer, path))
        self._fill(names, self._outer)

    def _before_outer(self, path: str, _module: nn.Module, _arguments: Any) -> None:
        self._load_outer(path)

    def _load_outer(self, path: str) -> None:
        module = self.module.get_submodule(path)
        hollow = [leaf for leaf, p in module._parameters.items() if p is not None and p.is_meta]
        if not hollow:
            return
        prefix = path + "." if path else ""
        names: list[str] = []
        for leaf in hollow:
            if (changed := self._changed_outer.get(prefix + leaf)) is not None:
                set_tensor(module, leaf, changed)
                continue
            self._prepare(prefix + leaf)
            names += self._sources(prefix + leaf)
        origins = (self._tied.get(prefix + leaf, prefix + leaf).rpartition(".")[0] for leaf in hollow)
        self._fill(names, {path, *origins})

    def _fill(self, names: Iterable[str], paths: Iterable[str]) -> None:
        """Read tensors by their disk names, and have all that these modules themselves hold on the device."""
        if slices := {n: self.source.slice(n) for n in names}:
            hf.load_into(self.module, slices)
        for path in paths:
            module = self.module.get_submodule(path)
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and not tensor.is_meta and tensor.device != self.device:
                    set_tensor(module, leaf, tensor.to(self.device))
        self._tie()

    def _prepare(self, name: str) -> None:
        """Give the placeholder of a parameter the dtype that it is to have."""
        name = self._tied.get(name, name)
        dtype = self._compute.get(name)
        if dtype is not None:
            shape = self.module.get_parameter(name).shape
            set_tensor(self.module, name, torch.empty(shape, dtype=dtype, device="meta"))

    def _sources(self, name: str) -> list[str]:
        """Disk names of what fills a runtime tensor; of what it is tied to where the folder leaves it out."""
        return self._disk_names.get(name) or self._disk_names.get(self._tied.get(name, ""), [])

    def _tie(self) -> None:
        for name, origin in self._tied.items():
            if name in self._disk_names:
                continue  # the folder holds both: each is loaded as it stands
            tensor = self.module.get_parameter(origin)
            path, _, leaf = name.rpartition(".")
            self.module.get_submodule(path)._parameters[leaf] = tensor


def replaced(name: str, description: dict[str, Any], own: frozenset[str]) -> bool:
    """Whether a tensor of the source gives way to what changed.

    Args:
        name: runtime name, relative to the decoder layer (or to the model, outside the layers).
        description: of what changed; see Overlay.
        own: names of the block's tensors in the source.
    """
    if "experts" in description and (name in own or name in description.get("beside", ())):
        return True
    matrices = description.get("matrices") or {}
    heads = (f"{values['head']}.weight" for values in matrices.values() if "head" in values)
    return name in heads or (name.startswith(tuple(f"{path}." for path in matrices)) and not beside.is_bias(name))


def check_complete(module: PreTrainedModel, filled: set[str], where: Path) -> None:
    """Raise CheckpointError when a tensor that the model needs is filled by nothing in the checkpoint."""
    tied = dict(getattr(module, "all_tied_weights_keys", None) or {})
    ignored = hf.may_be_missing(module)
    for name in sorted(module.state_dict().keys() - filled):
        if tied.get(name) in filled or any(re.search(pattern, name) for pattern in ignored):
            continue
        raise CheckpointError(f"{where} holds nothing for {name!r}, which {type(module).__name__} needs")
