"""What each width costs matrices beside the routed experts, measured where experts' costs are measured.

It is the squared change of the hidden state, relative to it, of a matrix as it will be rounded: with the factors that
it gets where it reads what the experts read.

Letters: T tokens, V vocabulary, K input features, M matrices, B widths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import LayerStatistic, Result
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEModel, beside
from moe_compress.model.beside import OUTER, Matrix

from .grid import Grid, dequantize
from .input_smoothing import unmovable
from .packed_linear import packed
from .rotation import NO_ROTATIONS
from .rtn import round_to_nearest
from .solver import SolverOptions
from .space import Space, spaces_of
from .stack import Stack

# Dense rows made at a time, bytes.
_CHUNK_BYTES = 64 << 20


def included(matrices: list[Matrix], kinds: frozenset[str], group_size: int) -> list[Matrix]:
    """Those of these kinds whose rows are whole groups."""
    return [m for m in matrices if m.among(kinds) and (group_size == -1 or m.columns % group_size == 0)]


@dataclass(frozen=True)
class MatrixError(LayerStatistic):
    """Error behind a decoder layer when one matrix beside the experts alone is rounded to nearest, all else exact.

    Result: `relative` [M, B], in the order of `included`: Σ over tokens of ‖h_t − h'_t‖² / ‖h_t‖², h the hidden state
    behind the layer (every stream of it), which is computed again with the rounded matrix. Measured on whole batches of
    at least `tokens` tokens, for all tokens of the sweep. Outside the layers: of embeddings, the same of the embedded
    tokens; of the head, ‖z_t − z'_t‖² / ‖z_t‖² of the logits, about their means, which softmax doesn't see; of weights
    that both share, the sum. `smoothing`: options that factors of what experts read follow from (see space.py), which
    matrices that read the same have too: at each width those that the layer would get if all its experts had it.
    """

    name: ClassVar[str] = "matrix_error"
    kinds: tuple[str, ...]
    bits: tuple[float, ...]
    group_size: int = 64
    symmetric: bool = True
    tokens: int = 4096
    smoothing: dict[str, Any] = field(default_factory=dict)

    def layers(self, model: MoEModel) -> list[int]:
        """See LayerStatistic."""
        return [i for i, own in model.matrices.items() if self._included(own)]

    def measure(self, model: MoEModel, step: Any) -> Result:
        """See LayerStatistic."""
        numbers, used = step.sample(self.tokens)
        exact: list[Tensor] = []
        for number in numbers:
            hidden = step.behind(number)
            if hidden is None:
                raise UnsupportedModelError(
                    f"layer {step.index} returns no hidden state per token that errors could be compared with: set "
                    "`include: [experts]` in quantize.mixed"
                )
            exact.append(hidden.float())
        rows = []
        spaces = self._spaces(model, step)
        for matrix in self._included(model.matrices[step.index]):
            module: Any = step.layer.module.get_submodule(matrix.path)
            spaces_B = spaces.get(matrix.path, [Space()] * len(self.bits))
            with step.readable():
                weight_1OK = module.weight.detach()[None]
                stacks = [
                    Stack.holding(round_to_nearest(space.turned(weight_1OK), grid))
                    for space, grid in zip(spaces_B, self._grids, strict=True)
                ]
            errors = []
            for stack, space in zip(stacks, spaces_B, strict=True):
                rounded = packed(module, stack, weight_1OK.dtype)
                if space.factor_EK is not None:
                    rounded.register_forward_pre_hook(lambda _, read, space=space: (space.read(*read),))
                beside.replace(step.layer.module, matrix.path, rounded)
                try:
                    changed = [step.behind(number).float() for number in numbers]
                finally:
                    beside.replace(step.layer.module, matrix.path, module)
                errors.append(sum(float(_relative(c - e, e).sum()) for c, e in zip(changed, exact, strict=True)))
            rows.append(errors)
        return {"relative": torch.tensor(rows, dtype=torch.float64) * (step.tokens / used)}

    def measure_outer(self, model: MoEModel, sweep: Any) -> Result:
        """See LayerStatistic."""
        rows = []
        for matrix in self._included(model.matrices[OUTER]):
            with model.outer_weights([matrix.path]) as weights:
                weight = weights[matrix.path]
                error = torch.zeros(len(self.bits), dtype=torch.float64)
                if matrix.kind == "embeddings":
                    error += self._embedded(weight, torch.cat([b["input_ids"].flatten() for b in sweep.batches]))
                if head := matrix.head or (matrix.path if matrix.kind == "head" else ""):
                    read_TK = sweep.reaching(model.module.get_submodule(head), 0)
                    read_TK = read_TK.reshape(-1, read_TK.shape[-1])[: self.tokens]
                    error += self._logits(weight, read_TK) * (sweep.tokens / len(read_TK))
                rows.append(error)
        return {"relative": torch.stack(rows)}

    def _spaces(self, model: MoEModel, step: Any) -> dict[str, list[Space]]:
        """Path of a matrix that reads what the experts read → where it is rounded at each width; none of the others."""
        block = step.layer.block
        if not self.smoothing or block is None or unmovable(block) is not None:
            return {}
        readers = {name.removesuffix(".weight") for name in block.reads.readers}
        if not (own := readers & {m.path for m in self._included(model.matrices[step.index])}):
            return {}
        inputs = BlockInputs()
        step.run(inputs.observe, inputs_only=True)
        with step.readable():
            spaces = spaces_of(block, self.bits, NO_ROTATIONS, SolverOptions(**self.smoothing), inputs)
        return dict.fromkeys(own, spaces["up"])

    @property
    def _grids(self) -> list[Grid]:
        return [Grid.of_width(b, self.group_size, self.symmetric) for b in self.bits]

    def _included(self, matrices: list[Matrix]) -> list[Matrix]:
        return included(matrices, frozenset(self.kinds), self.group_size)

    def _embedded(self, weight_VK: Tensor, tokens: Tensor) -> Tensor:
        """Σ over the text of ‖Δe‖² / ‖e‖², [B]."""
        occurring, counts = tokens.unique(return_counts=True)
        occurring = occurring.to(weight_VK.device)
        error = torch.zeros(len(self.bits), dtype=torch.float64)
        for start in range(0, len(occurring), step := rows_at_once(weight_VK)):
            own = weight_VK[occurring[start : start + step]].float()
            for column, grid in enumerate(self._grids):
                change = dequantize(round_to_nearest(own, grid), torch.float32) - own
                error[column] += (_relative(change, own).cpu() * counts[start : start + step].cpu()).sum()
        return error

    def _logits(self, weight_VK: Tensor, read_TK: Tensor) -> Tensor:
        """Σ over tokens of ‖Δz‖² / ‖z‖² about their means, [B]; never all logits at once."""
        total = len(weight_VK)
        moments = torch.zeros(2, 1 + len(self.bits), len(read_TK), dtype=torch.float64)
        read_TK = read_TK.float()
        for start in range(0, total, step := min(rows_at_once(weight_VK), max(1, _CHUNK_BYTES // (4 * len(read_TK))))):
            own = weight_VK[start : start + step].to(read_TK.device, torch.float32)
            products = [own, *(dequantize(round_to_nearest(own, grid), torch.float32) - own for grid in self._grids)]
            for number, part in enumerate(products):
                logits = (read_TK @ part.T).double()
                moments[0, number] += logits.sum(1).cpu()
                moments[1, number] += logits.square().sum(1).cpu()
        spread = (moments[1] - moments[0].square() / total).clamp_min(0)
        return (spread[1:] / spread[0]).nan_to_num(0.0, posinf=0.0).sum(1)


def rows_at_once(weight: Tensor) -> int:
    """How many rows of a matrix are made dense at a time."""
    return max(1, _CHUNK_BYTES // (4 * weight.shape[-1]))


def _relative(change: Tensor, exact: Tensor) -> Tensor:
    """‖change‖² / ‖exact‖² of every row, float64; 0 where there is nothing to compare with."""
    ratio = change.double().square().sum(-1) / exact.double().square().sum(-1)
    return ratio.nan_to_num(0.0, posinf=0.0)
