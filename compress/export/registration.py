"""Making transformers' own `from_pretrained` load the `native` format.

Before weights are loaded, the blocks that config.json describes are reshaped and their experts replaced by packed ones;
then transformers' loader fills them, name by name. Packed weights stay packed in memory.

This module is imported while transformers itself is being imported, so it may import nothing heavy at its top.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_compress.constants import FORMAT_VERSION, QUANT_METHOD

# Whether transformers gives the tensors of a quantized model the dtype asked for (5.23), or some of them (5.17).
_CASTS = hasattr(HfQuantizer, "get_new_dtype")


class MoeCompressConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native checkpoint (docs/format.md)."""

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        stack: str = "",
        axes: list[dict[str, Any]] | None = None,
        blocks: dict[str, Any] | None = None,
        matrices: dict[str, Any] | None = None,
        **_: Any,
    ):
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.stack = stack
        self.axes = axes or []
        self.blocks = blocks or {}
        if matrices:
            self.matrices = matrices

    def restructure(self, model: Any) -> None:
        """Reshape the blocks of a skeleton.

        Raises CheckpointError for a version that this package doesn't know, and for a model of another structure.
        """
        from moe_compress.errors import CheckpointError, UnsupportedModelError
        from moe_compress.model import MoEBlock
        from moe_compress.model.axes import ExpertAxes
        from moe_compress.model.saved import check_version

        check_version(self.format_version)
        axes = [ExpertAxes.from_json(values) for values in self.axes]
        stack = self.stack_in(model)
        for index, description in self.blocks.items():
            try:
                layer = model.get_submodule(f"{stack}.{index}")
                block = MoEBlock(int(index), layer, description["experts"], axes[description["axes"]])
                block.restructure(description)
            except (AttributeError, KeyError, IndexError, TypeError, ValueError, UnsupportedModelError) as error:
                raise CheckpointError(
                    f"quantization_config describes layer {index} of {self.stack!r}, which doesn't fit "
                    f"{type(model).__name__}: {error}"
                ) from error
            # The file fills all of it; some families' initialisation would look for the fused parameters.
            block.parent._is_hf_initialized = True  # type: ignore[assignment]
        self._restructure_beside(model)

    def _restructure_beside(self, model: Any) -> None:
        from moe_compress.errors import CheckpointError, InputError
        from moe_compress.model import beside

        try:
            beside.restructure(model, self.matrices_in(model), model.dtype)
        except (AttributeError, TypeError, InputError) as error:
            raise CheckpointError(
                f"quantization_config describes packed matrices that don't fit {type(model).__name__}: {error}"
            ) from error

    def matrices_in(self, model: Any) -> dict[str, dict[str, Any]]:
        """Packed matrices beside the experts, by their module paths in a model: a base model lacks head and prefix."""
        matrices: dict[str, dict[str, Any]] = getattr(self, "matrices", {})
        prefix = f"{model.base_model_prefix}."
        if hasattr(model, model.base_model_prefix):
            return matrices
        return {p.removeprefix(prefix): v for p, v in matrices.items() if p.startswith(prefix)}

    def stack_in(self, model: Any) -> str:
        """Module path of the decoder layers in a model: a base model lacks the prefix of the one with a head."""
        prefix = f"{model.base_model_prefix}."
        has_base = hasattr(model, model.base_model_prefix)
        return self.stack.removeprefix(prefix) if not has_base else self.stack


class MoeCompressQuantizer(HfQuantizer):
    """Reshapes the skeleton before transformers loads weights into it, and checks that the files fill it."""

    quantization_config: MoeCompressConfig
    _expected: Mapping[str, Any] = MappingProxyType({})

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Called before the model is built: registers the experts implementation that config.json names."""
        import moe_compress.model  # noqa: F401

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        from moe_compress.model.hf import choose_implementation

        choose_implementation(model)
        self.quantization_config.restructure(model)
        self._expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            self._check_names(model, checkpoint_files)
        return model

    def _check_names(self, model: Any, files: list[str]) -> None:
        """Raise CheckpointError where transformers would only warn: for what nothing fills, or nothing takes."""
        from pathlib import Path

        from safetensors import safe_open

        from moe_compress.errors import CheckpointError
        from moe_compress.model.disk import check_complete
        from moe_compress.model.hf import NameMap
        from moe_compress.model.routes import rule_prefix

        stored: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as shard:
                stored.update(shard.keys())
        names = NameMap(model, stored)
        folder = Path(files[0]).parent
        check_complete(model, names.filled, folder)
        config = self.quantization_config
        stack, state = config.stack_in(model), model.state_dict().keys()
        packed = tuple(f"{stack}.{i}.{b['experts']}." for i, b in config.blocks.items() if b["kind"] != "fused")
        packed += tuple(rule_prefix(f"{stack}.{i}.{b['experts']}") for i, b in config.blocks.items())
        packed += tuple(f"{path}." for path in config.matrices_in(model))
        for name, runtime in sorted(names.runtime.items()):
            if runtime.startswith(packed) and runtime not in state:
                raise CheckpointError(f"{folder} holds {name!r}, which its quantization_config doesn't describe")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        import torch

        from moe_compress.errors import CheckpointError
        from moe_compress.model.hf import kept_in_float32, run_here, save_as_it_runs
        from moe_compress.model.routes import routes_of

        keep = re.compile("|".join(p.replace("*", ".*") for p in kept_in_float32(model, model.dtype)) or r"(?!)")
        # transformers before 5.23 checks no shapes of a quantized model, and casts nothing that it renames.
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in self._expected:
                continue
            shape, dtype = self._expected[name]
            if tensor.shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} has the shape {list(tensor.shape)}, but config.json asks for {list(shape)}: "
                    "the checkpoint and its config.json don't belong together"
                )
            if not _CASTS and tensor.is_floating_point() and not tensor.is_meta:
                tensor.data = tensor.data.to(torch.float32 if keep.search(name) else dtype)
        save_as_it_runs(model)
        # Others compute a slot of weight 0 like any other.
        run_here(module for module in model.modules() if routes_of(module) is not None)
        return model

    def is_serializable(self, **_: Any) -> bool:
        """A loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights can't be trained."""
        return False


def register() -> None:
    """Tell transformers about the format. Doing it twice does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(MoeCompressConfig)
        register_quantizer(QUANT_METHOD)(MoeCompressQuantizer)


def attach(model: Any, values: dict[str, Any] | None) -> None:
    """Make a model that was changed in memory what loading it would give: `save_pretrained` then writes it right.

    Args:
        model: a transformers model whose blocks are changed already.
        values: its `quantization_config`, or None where it needs none.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if values is not None:
        quantizer = MoeCompressQuantizer(MoeCompressConfig(**values))
        model.hf_quantizer, model.is_quantized = quantizer, True
        model.quantization_method = QUANT_METHOD
        quantizer.postprocess_model(model)
    elif quantizer is not None:
        quantizer.remove_quantization_config(model)
        model.config.__dict__.pop("experts_implementation", None)
