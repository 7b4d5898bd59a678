"""What a layer's experts read on the calibration text, as the roots that factorising needs, some experts at a time.

Second moments are those of GPTQ here (quant/layer_rows.py): rows count by the square of their routing weight, and an
expert that saw few is drawn towards the layer's mean, so one that saw none is factorised for what the layer reads.

Letters: E experts, C experts of a chunk, T tokens, R rows by expert, H hidden, I neurons, K input features.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.model import FusedExperts
from moe_compress.quant.gptq import shrink_hessians
from moe_compress.quant.layer_rows import LayerRows

from .low_rank import root_of

_CHUNK_BYTES = 512 << 20

# A chunk's experts, and projection → S [C, K, K], float64; gate and up have the same tensor.
Roots = tuple[slice, dict[str, Tensor]]


class Reading:
    """The rows of a layer.

    Args:
        experts: dense.
        inputs: what they read.
        damping, shrinkage: see quant/solver.py.
        scale_T: what each token counts besides; None: all the same.
        order_EI: neuron order that activations are wanted in (neuron order[e, i] comes to place i).

    Attributes:
        weight_E: Σ of the rows' weights of each expert, and that of one average row, so that an expert that saw nothing
            counts as one that was chosen once.
    """

    def __init__(
        self,
        experts: FusedExperts,
        inputs: BlockInputs,
        damping: float,
        shrinkage: float | None,
        scale_T: Tensor | None = None,
        order_EI: Tensor | None = None,
    ):
        self.rows = LayerRows(experts, inputs, "gate_squared")
        self.damping, self.shrinkage, self.order_EI = damping, shrinkage, order_EI
        self.names = [name for name, _ in experts.weights().matrices()]
        self._activated = experts
        dispatch = self.rows.dispatch
        weight_R = dispatch.weight_R.double().square()
        if inputs.token_weight_T is not None:
            weight_R = weight_R * inputs.token_weight_T[dispatch.token_R].double()
        if scale_T is not None:
            scale_R = scale_T.to(weight_R.device)[dispatch.token_R]
            weight_R, self.rows.weight_R = weight_R * scale_R, self.rows.weight_R * scale_R
        total = weight_R.new_zeros(experts.num_experts).index_add_(0, dispatch.expert_R, weight_R)
        self.weight_E = (total + weight_R.mean()).cpu()
        self._means = self.rows.means()

    @property
    def mean_root(self) -> Tensor:
        """S of what the layer's experts read together, [H, H]."""
        return root_of(self._means[0], self.damping)

    def __iter__(self) -> Iterator[Roots]:
        mean_HH, mean_II = self._means
        weights = self._activated.weights()
        for part in self.rows.parts(_CHUNK_BYTES):
            here = slice(part.experts.start, part.experts.stop)
            moment = part.moment(part.input_RH)
            root = root_of(shrink_hessians(moment, part.evidence_C, self.shrinkage, mean_HH), self.damping)
            found = {name: root for name in self.names if name != "down"}
            del moment
            activation_RI = self._activated.activations_with(weights.part(part.experts), part.input_RH, part.dispatch)
            moment = shrink_hessians(part.moment(activation_RI), part.evidence_C, self.shrinkage, mean_II)
            if self.order_EI is not None:
                order = self.order_EI[here].to(moment.device)
                moment = moment.gather(1, order.unsqueeze(2).expand_as(moment))
                moment = moment.gather(2, order.unsqueeze(1).expand_as(moment))
            found["down"] = root_of(moment, self.damping)
            yield here, found
