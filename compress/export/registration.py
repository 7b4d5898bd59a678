"""Making transformers' own `from_pretrained` load the `native` format.

Before weights are loaded, the blocks that config.json describes are reshaped and their experts replaced by packed ones;
then transformers' loader fills them, name by name. Packed weights stay packed in memory.

This module is imported while transformers itself is being imported, so it may import nothing heavy at its top.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_compress.constants import FORMAT_VERSION, QUANT_METHOD


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

    def restructure(self, model: nn.Module) -> None:
        """Reshape the blocks of a skeleton. Raises CheckpointError for a version that this package doesn't know."""
        from moe_compress.errors import CheckpointError
        from moe_compress.model import MoEBlock
        from moe_compress.model.axes import ExpertAxes

        if self.format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {self.format_version}, this moe-compress reads up to "
                f"{FORMAT_VERSION}: install a newer one"
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

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
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
