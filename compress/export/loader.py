"""Loading the `native` format: through plain transformers, and through this package.

`register` makes transformers' `from_pretrained` understand `quant_method: moe_compress`: before weights are loaded, the
blocks that config.json describes are reshaped and their experts replaced by packed ones; then transformers' own
loader fills them, name by name. Packed weights stay packed in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import moe_compress.quant.packed  # noqa: F401  registers the kind "packed"
from moe_compress.errors import CheckpointError
from moe_compress.model import MoEBlock, hf
from moe_compress.model.axes import ExpertAxes
from moe_compress.model.model import QUANT_METHOD

from .write import FORMAT_VERSION


class MoeCompressConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native checkpoint (docs/format.md)."""

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        stack: str = "",
        axes: list[dict[str, Any]] | None = None,
        blocks: dict[str, Any] | None = None,
        **_: Any,
    ):
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.stack = stack
        self.axes = axes or []
        self.blocks = blocks or {}

    def restructure(self, model: torch.nn.Module) -> None:
        """Reshape the blocks of a skeleton. Raises CheckpointError for a version that this package doesn't know."""
        if self.format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {self.format_version}, this moe-compress reads up to {FORMAT_VERSION}: "
                "install a newer one"
            )
        axes = [ExpertAxes.from_json(values) for values in self.axes]
        for index, description in self.blocks.items():
            layer = model.get_submodule(f"{self.stack}.{index}")
            block = MoEBlock(int(index), layer, description["experts"], axes[description["axes"]])
            block.restructure(description)
            # The file fills all of it; some families' initialisation would look for the fused parameters.
            block.parent._is_hf_initialized = True  # type: ignore[assignment]


class MoeCompressQuantizer(HfQuantizer):
    """Reshapes the skeleton before transformers loads weights into it."""

    quantization_config: MoeCompressConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self.quantization_config.restructure(model)
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


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint that this package wrote, in any of its formats.

    Args:
        folder: the checkpoint.
        options: for transformers' `from_pretrained` (`dtype`, `device_map`, …).

    Returns:
        A model of the class that config.json names, in eval mode; packed experts stay packed.

    Raises:
        InputError, CheckpointError, UnsupportedModelError: the folder isn't a checkpoint that can be loaded.
    """
    from moe_compress.checkpoint.reader import Checkpoint

    register()
    Checkpoint(folder).close()  # truncated or missing shards: one clear line instead of a loader's
    config = AutoConfig.from_pretrained(folder)
    return hf.model_class(config).from_pretrained(folder, **options).eval()  # type: ignore[no-any-return]
