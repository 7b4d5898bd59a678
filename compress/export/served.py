"""Quantized layers in a format of servers: what is written of each, and what config.json has to say.

Promise: everything that follows from the layers' descriptions and the source's names is checked before a byte is
written; what was really written is compared with the source at the end, before the folder gets its name (rules.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_compress.constants import COMPRESSED_TENSORS, GPTQ
from moe_compress.errors import RunError
from moe_compress.model import MoEModel
from moe_compress.model.axes import ConfigPath

from . import compressed_tensors, gptq_format
from .matching import WrittenLayer
from .rules import ONE_SCHEME, check_complete, check_dtypes, check_kernels, check_routing
from .schemes import Scheme
from .targets import Target

# Format → the module that writes it: `layer_scheme`, `layer_tensors`, `quantization_config`.
SERVED: dict[str, ModuleType] = {COMPRESSED_TENSORS: compressed_tensors, GPTQ: gptq_format}


class Served:
    """What a server has to be told, and gets.

    Args:
        model: what is written.
        config: config.json of the result, without what is said of quantized layers.
        form: format; for any that isn't in `SERVED` nothing is checked or kept.
        descriptions: decoder layer → how its block, and what is packed beside it, are described (see Overlay).
        target: runtime that has to load it; None checks what all have in common.

    Raises RunError for a rule that is broken.
    """

    def __init__(
        self,
        model: MoEModel,
        config: Mapping[str, Any],
        form: str,
        descriptions: Mapping[int, Mapping[str, Any]],
        target: Target | None,
    ):
        self._model, self._source, self._target = model, config, target
        self._format = SERVED.get(form)
        self._layers: dict[int, WrittenLayer] = {}
        self._names: set[str] = set()
        self._dense: list[str] = []
        self._reduced: dict[int, int] = {}  # layers whose experts stay dense, but fewer
        self._linears: dict[int, dict[str, Scheme]] = {}
        if self._format is None:
            return
        self._linears = {i: self._schemes(i, own) for i, d in descriptions.items() if (own := d.get("matrices"))}
        descriptions = {i: description for i, description in descriptions.items() if "experts" in description}
        counts = {i: int(description["num_experts"]) for i, description in descriptions.items()}
        blocks = {i: model.block(i) for i in counts}
        infeasible = {i: reason for i, block in blocks.items() if (reason := block.infeasible(counts[i]))}
        check_routing(counts.values(), [_at(config, path) for path in model.count_paths], infeasible)
        for index, description in descriptions.items():
            if description["kind"] == "fused":
                if counts[index] != model.description(index)["num_experts"]:
                    self._reduced[index] = counts[index]
                continue
            names = model.expert_names(index, counts[index])
            if names is None:
                raise RunError(f"layer {index}: {type(model.module).__name__} doesn't store its experts one by one")
            scheme = self._format.layer_scheme(index, description["layout"])
            self._layers[index] = WrittenLayer(scheme, names, counts[index])
        if target is not None:
            schemes = {layer.scheme for layer in self._layers.values()}
            schemes |= {scheme for own in self._linears.values() for scheme in own.values()}
            check_kernels(target.name, target.schemes, target.bits, sorted(schemes))

    def foreseen(self) -> dict[str, Any]:
        """`config` of a folder, from the source's names alone, so that what is wrong is found before the writing."""
        gone = self._gone()
        shapes = {n: info.shape for n, info in self._model.source.tensors.items() if n not in gone}
        dense = matrices(shapes)
        for index, count in self._reduced.items():
            if (names := self._model.expert_names(index, count)) is not None:
                dense += [names.linear(expert, p) for expert in range(count) for p in names.leaves]
        return self.config(dense)

    def config(self, dense: Collection[str] | None = None) -> dict[str, Any]:
        """`quantization_config`.

        Args:
            dense: paths of the matrices that stay as they are; those that were added, if none are given.

        Raises RunError where a server would read a module in another way than it is written.
        """
        assert self._format is not None
        # A head that shares the embedding's weights isn't in the file, and is a linear layer all the same.
        tied = [n.removesuffix(".weight") for n in getattr(self._model.module, "all_tied_weights_keys", None) or {}]
        named = [*(self._dense if dense is None else dense), *tied]
        name = None if self._target is None else self._target.name
        linears = {"linears": self._linears} if self._linears else {}
        return self._format.quantization_config(self._layers, named, name, **linears)  # type: ignore[no-any-return]

    def tensors(self, index: int, packed: Mapping[str, Tensor], description: Mapping[str, Any]) -> dict[str, Tensor]:
        """A quantized layer's tensors as servers read them, from those that run (by full name)."""
        assert self._format is not None
        linears, packed = self._parted(index, packed, description)
        if not packed:
            return linears
        block = self._model.block(index)
        inside = f"{self._model.stack}.{index}.{block.path}."
        experts = {name.removeprefix(inside): tensor for name, tensor in packed.items()}
        stored = next(t.dtype for n, t in experts.items() if n.endswith(".scale"))
        dtype: torch.dtype = compressed_tensors.scale_dtype(self._source, stored)
        written: dict[str, Tensor] = self._format.layer_tensors(
            index, experts, description["layout"], self._layers[index].names, dtype
        )
        return written | linears

    def _parted(
        self, index: int, packed: Mapping[str, Tensor], description: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Linear layers beside the experts as servers read them, and the experts' tensors as they run."""
        prefix = self._model.prefix(index)
        known = {m.path: m for m in self._model.matrices[index]}
        rest = dict(packed)
        written: dict[str, Tensor] = {}
        for path in description.get("matrices") or {}:
            start = f"{prefix}{path}."
            own = {n.removeprefix(start): rest.pop(n) for n in packed if n.startswith(start)}
            stored = next(t.dtype for n, t in own.items() if n.endswith(".scale"))
            written |= compressed_tensors.linear_tensors(
                known[path], own, compressed_tensors.scale_dtype(self._source, stored)
            )
        return written, rest

    def _schemes(self, index: int, described: Mapping[str, Mapping[str, Any]]) -> dict[str, Scheme]:
        """Module path, as in the file → scheme. Raises RunError where what servers join to one differs (rule 1)."""
        if self._format is not compressed_tensors:
            raise RunError(f"layer {index}: the format has no place for packed linear layers beside the experts")
        known = {m.path: m for m in self._model.matrices[index]}
        if foreign := sorted(described.keys() - known.keys()):
            raise RunError(f"{self._model.prefix(index)}{foreign[0]} can't be told by its name in the checkpoint")
        found = {path: compressed_tensors.linear_scheme(known[path], values) for path, values in described.items()}
        for path, scheme in found.items():
            first = known[path].together
            if found.get(first, scheme) != scheme:
                raise ONE_SCHEME.broken(f"layer {index}: {path!r} and {first!r} are joined, and differ in their scheme")
        return {known[path].disk: scheme for path, scheme in found.items()}

    def leave(self, names: Collection[str]) -> None:
        """Remember what was copied from the source."""
        self._names.update(names)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what was written as it is. Raises RunError for a tensor with another dtype than its source's."""
        if self._format is None:
            return
        self._names.update(tensors)
        self._dense += matrices({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if self._model.weights is not None:
            source = self._model.source.tensors
            check_dtypes({n: (source[n].dtype, t.dtype) for n, t in tensors.items() if n in source})

    def finish(self) -> None:
        """Compare what was written with the source's names. Raises RunError when something is lost."""
        if self._format is not None and self._model.weights is not None:
            check_complete(self._model.source.tensors, self._names, self._gone())

    def _gone(self) -> set[str]:
        """Names of the source's tensors that aren't written under their own: experts that were quantized or removed."""
        weights = self._model.weights
        assert weights is not None
        found: set[str] = set()
        for index in (*self._layers, *self._reduced):
            inside = self._model.block(index).path + "."
            found |= {name for name, runtime in weights.layer_names(index).items() if runtime.startswith(inside)}
        return found | {f"{module}.weight" for own in self._linears.values() for module in own}


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Paths of the modules with a matrix, among tensors by name."""
    found = [n for n, shape in shapes.items() if n.endswith(".weight") and len(shape) > 1]
    return [n.removesuffix(".weight") for n in found]


def _at(config: Mapping[str, Any], path: ConfigPath) -> int:
    """An integer of a config; of a list of one repeated integer, that integer."""
    value: Any = config
    for key in path:
        value = value[key]
    return int(value[0] if isinstance(value, list) else value)
