"""Experts whose weights stay packed: the module that runs them, and that the `native` format stores as it is.

Each projection (gate, up, down) of all experts of a layer is held in stacks. A stack holds the same projection of
several experts in one encoding: packed integers with group scales (and zero points), or dense. Which expert is in
which stack is a list, so any mixture of widths is just several stacks, and the tensors in memory are the tensors in the
file. While running, only experts that got tokens are unpacked, a few at a time (run_packed.py), or inside the matrix
product on a GPU (kernels/triton_moe.py); a dense copy of the layer never exists. Matrices of low rank may be added to
those of a projection (run_low_rank.py).

docs/format.md specifies the tensors byte by byte.

Letters: E experts, S experts of a stack, O/K output and input features of a projection, G groups, R rows by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock
from moe_compress.model.dispatch import Dispatch
from moe_compress.model.experts import run_experts
from moe_compress.quant.rotation import NO_ROTATIONS, Rotation, Rotations
from moe_compress.quant.run_low_rank import LowRank
from moe_compress.quant.run_packed import fused_kernel, run_or_index
from moe_compress.quant.stack import Encoding, Stack, keeping_dtype, name_of

PROJECTIONS = ("gate", "up", "down")
# Key of a layout → attribute of Rotations.
_ROTATIONS = {"input_rotation": "inward", "rotation": "down"}


class PackedProjection(nn.Module):
    """One projection of all experts of a layer.

    Args:
        stacks: encoding name → stack; slots of a stack are its experts in ascending order.
        assignment: encoding name of each expert.
        low_rank: what is added to the matrices in the stacks, if anything is.
    """

    low_rank: LowRank | None

    def __init__(
        self,
        stacks: dict[str, Stack],
        assignment: Sequence[str],
        out_features: int,
        in_features: int,
        low_rank: LowRank | None = None,
    ):
        super().__init__()
        self.low_rank = low_rank
        self.assignment = list(assignment)
        self.out_features, self.in_features = out_features, in_features
        self.names = sorted(stacks)
        for name in self.names:
            self.add_module(name, stacks[name])
        filled: dict[str, int] = {}
        slots = []
        for name in assignment:
            slots.append(filled.get(name, 0))
            filled[name] = slots[-1] + 1
        # A plain list, not a buffer: it follows from the description, and needn't move between devices.
        self.slots = slots

    @property
    def stacks(self) -> dict[str, Stack]:
        """Encoding name → stack."""
        return {name: self.get_submodule(name) for name in self.names}  # type: ignore[misc]

    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The matrices of some experts, unpacked: [len(experts), O, K]."""
        if self.low_rank is not None:
            return (self._stacked(experts, torch.float32) + self.low_rank.matrices(experts)).to(dtype)
        return self._stacked(experts, dtype)

    def _stacked(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the stacks hold of `matrices`."""
        parts = []
        order = []
        for name in self.names:
            positions = [p for p, e in enumerate(experts) if self.assignment[e] == name]
            if positions:
                parts.append(self.stacks[name]([self.slots[experts[p]] for p in positions], dtype))
                order += positions
        if len(parts) == 1:
            return parts[0]  # type: ignore[no-any-return]
        back = torch.tensor(order, device=parts[0].device).argsort()
        return torch.cat(parts)[back]

    def linear(self, input_RK: Tensor, dispatch: Dispatch) -> Tensor:
        """Each expert's rows times its own matrix → [R, O]; only experts with rows are unpacked, some at a time."""
        if torch.is_grad_enabled() and input_RK.requires_grad:
            output: Tensor = _Linear.apply(input_RK, self, dispatch)
            return output
        return self.products(input_RK, dispatch)

    def products(self, input_RK: Tensor, dispatch: Dispatch, backward: bool = False) -> Tensor:
        """`linear` without autograd; `backward`: the rows [R, O] times the matrices transposed → [R, K]."""
        output = self._stack_products(input_RK, dispatch, backward)
        return output if self.low_rank is None else self.low_rank.add(output, input_RK, dispatch, backward)

    def _stack_products(self, input_RK: Tensor, dispatch: Dispatch, backward: bool) -> Tensor:
        """`products` with what the stacks hold."""
        kernel = None if backward else fused_kernel(input_RK.device.type)
        if kernel is not None and kernel.takes(input_RK, list(self.stacks.values())):
            return kernel.grouped_packed(input_RK, self, dispatch.offsets_E)  # type: ignore[no-any-return]
        visited: dict[str, list[int]] = {}
        rows: dict[str, list[int]] = {}
        start = 0
        for expert, count in enumerate(dispatch.counts):
            if count:
                name = self.assignment[expert]
                visited.setdefault(name, []).append(expert)
                rows.setdefault(name, []).extend(range(start, start + count))
                start += count
        output = input_RK.new_empty(input_RK.shape[0], self.in_features if backward else self.out_features)
        for name, experts in visited.items():
            stack = self.get_submodule(name)
            slots, own = [self.slots[e] for e in experts], [dispatch.counts[e] for e in experts]
            if len(visited) == 1:
                return stack(slots, input_RK, own, backward)  # type: ignore[no-any-return]
            mine = run_or_index(rows[name], input_RK.device)
            output[mine] = stack(slots, input_RK[mine], own, backward)
        return output


class _Linear(torch.autograd.Function):
    """A packed projection whose backward unpacks again: no graph holds on to unpacked matrices."""

    @staticmethod
    def forward(ctx: Any, input_RK: Tensor, projection: PackedProjection, dispatch: Dispatch) -> Tensor:
        ctx.projection, ctx.dispatch = projection, dispatch
        return projection.products(input_RK, dispatch)

    @staticmethod
    def backward(ctx: Any, gradient_RO: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.projection.products(gradient_RO.contiguous(), ctx.dispatch, backward=True), None, None


class PackedExperts(nn.Module):
    """Experts with packed weights: same forward as the experts class they replace, whose own activation they use.

    Args:
        original: the fused experts module that is replaced; its class's arithmetic is kept, its weights are dropped.
        projections: "gate" (if the experts have one), "up", "down" → projection.
        biases: "gate_bias", "up_bias", "down_bias" → [E, O], where experts have biases.
        rotations: what projections read is rotated so first; their matrices are.
    """

    kind = "packed"
    _original: FusedExperts

    def __init__(
        self,
        original: nn.Module,
        projections: dict[str, PackedProjection],
        biases: dict[str, Tensor],
        rotations: Rotations = NO_ROTATIONS,
    ):
        super().__init__()
        self.rotations = rotations
        view = FusedExperts(original)
        if view.has_norm:
            self.post_expert_norm = original.post_expert_norm
        for name, projection in projections.items():
            self.add_module(f"{name}_proj", projection)
        for name, value in biases.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.num_experts = len(projections["down"].assignment)
        self.hidden_size = projections["down"].out_features
        self.intermediate_size = projections["down"].in_features
        for name in [n for n in original._parameters if n.startswith(("gate_up_proj", "up_proj", "down_proj"))]:
            del original._parameters[name]
        # Held outside the module tree: it has no weights any more, only the class's arithmetic.
        object.__setattr__(self, "_original", view)

    @property
    def projections(self) -> dict[str, PackedProjection]:
        """The projections there are, by name."""
        names = [n for n in PROJECTIONS if f"{n}_proj" in self._modules]
        return {n: self.get_submodule(f"{n}_proj") for n in names}  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ over a token's experts of weight · expert(token): [T, H], [T, K], [T, K] → [T, H]."""
        return run_experts(self, hidden_states, top_k_index, top_k_weights)[0]

    def activations(self, input_RH: Tensor, dispatch: Dispatch) -> Tensor:
        """Neuron activations [R, I]."""
        if self.rotations.inward is not None:
            input_RH = self.rotations.inward(input_RH)
        projected = {n: self._project(n, input_RH, dispatch) for n in self.projections if n != "down"}
        view: FusedExperts = self._original
        if view.has_gate:
            return view.activate(view.interleave(projected["gate"], projected["up"]))
        return view.activate(projected["up"])

    def outputs(self, activation_RI: Tensor, dispatch: Dispatch) -> Tensor:
        """Expert outputs [R, H]."""
        if self.rotations.down is not None:
            activation_RI = self.rotations.down(activation_RI)
        output = self._project("down", activation_RI, dispatch)
        norm: Any = self.post_expert_norm if self._original.has_norm else None
        return output if norm is None else norm(output)

    def weights(self) -> ExpertWeights:
        """All experts, unpacked: a full-precision copy of the layer, for looking at."""
        everyone = range(self.num_experts)
        return self._weights(everyone)

    def expert(self, index: int) -> ExpertWeights:
        """One expert, unpacked."""
        return self._weights([index]).map(lambda stacked: stacked[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in self.children():
            child._apply(fn)
        super()._apply(keeping_dtype(fn), recurse=False)
        return self

    def describe(self) -> dict[str, Any]:
        """JSON from which `build_packed` rebuilds the module."""
        encodings: dict[str, Encoding] = {}
        projections = {}
        for name, projection in self.projections.items():
            for encoding in projection.names:
                encodings[encoding] = projection.get_submodule(encoding).encoding  # type: ignore[assignment]
            projections[name] = {
                "out_features": projection.out_features,
                "in_features": projection.in_features,
                "experts": projection.assignment,
                **({} if projection.low_rank is None else {"low_rank": projection.low_rank.to_json()}),
            }
        return {
            "encodings": {name: encodings[name].to_json() for name in sorted(encodings)},
            "projections": projections,
            "biases": {n: name_of(p.dtype) for n, p in self._parameters.items() if p is not None},
            **{
                key: rotation.to_json()
                for key, name in _ROTATIONS.items()
                if (rotation := getattr(self.rotations, name)) is not None
            },
        }

    def _weights(self, experts: Sequence[int]) -> ExpertWeights:
        dtype = torch.float32
        matrices = {n: p.matrices(experts, dtype) for n, p in self.projections.items()}
        for name in matrices:
            if (rotation := self.rotations.of(name)) is not None:
                matrices[name] = rotation.back(matrices[name])
        index = torch.tensor(list(experts))
        biases = {n: p.data[index] for n, p in self._parameters.items() if p is not None}
        return ExpertWeights(**matrices, **biases)

    def _project(self, name: str, input_RK: Tensor, dispatch: Dispatch) -> Tensor:
        output = self.projections[name].linear(input_RK, dispatch)
        bias = self._parameters.get(f"{name}_bias")
        return output if bias is None else output + bias[dispatch.expert_R].to(output.dtype)


def build_packed(block: MoEBlock, layout: dict[str, Any]) -> PackedExperts:
    """The module that `describe` described, for a block's experts, tensors on the meta device."""
    encodings = {name: Encoding(**values) for name, values in layout["encodings"].items()}
    projections = {}
    biases = {}
    for name, entry in layout["projections"].items():
        assignment, out_features = entry["experts"], entry["out_features"]
        stacks = {
            e: Stack(encodings[e], assignment.count(e), out_features, entry["in_features"])
            for e in dict.fromkeys(assignment)
        }
        sides = out_features, entry["in_features"]
        low_rank = LowRank.from_json(entry["low_rank"], *sides) if "low_rank" in entry else None
        projections[name] = PackedProjection(stacks, assignment, *sides, low_rank)
        if f"{name}_bias" in layout["biases"]:
            dtype = getattr(torch, layout["biases"][f"{name}_bias"])
            biases[f"{name}_bias"] = torch.empty(len(assignment), out_features, dtype=dtype, device="meta")
    rotations = {name: Rotation.from_json(layout[key]) for key, name in _ROTATIONS.items() if key in layout}
    return PackedExperts(fused_module(block), projections, biases, Rotations(**rotations))


def pack_experts(
    block: MoEBlock,
    matrices: dict[str, list[tuple[list[int], Stack]]],
    rotations: Rotations = NO_ROTATIONS,
    low_rank: Mapping[str, LowRank] = MappingProxyType({}),
) -> PackedExperts:
    """Replace a block's fused experts by packed ones.

    Args:
        block: with fused experts.
        matrices: projection → [(experts, their matrices in the same order)]; every expert once. Several entries may
            share an encoding.
        rotations: with which the matrices given are rotated.
        low_rank: projection → what is added to its matrices, where anything is.

    Returns:
        The module now in place.
    """
    original = fused_module(block)
    weights = FusedExperts(original).weights()
    biases = {n: v.clone() for n, v in weights.items() if n.endswith("_bias")}
    projections = {}
    for name, entries in matrices.items():
        assignment: dict[int, str] = {}
        collected: dict[str, list[tuple[int, Stack, int]]] = {}
        for experts, stack in entries:
            for slot, expert in enumerate(experts):
                assignment[expert] = stack.encoding.name
                collected.setdefault(stack.encoding.name, []).append((expert, stack, slot))
        shape = getattr(weights, name).shape
        stacks = {encoding: _joined(sorted(parts, key=lambda p: p[0])) for encoding, parts in collected.items()}
        ordered = [assignment[e] for e in range(shape[0])]
        projections[name] = PackedProjection(stacks, ordered, shape[1], shape[2], low_rank.get(name))
    module = PackedExperts(original, projections, biases, rotations)
    block.replace_experts(module)
    return module


def _joined(parts: list[tuple[int, Stack, int]]) -> Stack:
    """One stack from slots of several, in the order given."""
    first = parts[0][1]
    if all(stack is first for _, stack, _ in parts) and [slot for _, _, slot in parts] == list(range(len(parts))):
        return first
    joined = Stack(first.encoding, 0, first.out_features, first.in_features)
    for name in first._parameters:
        pieces = [stack._parameters[name][slot] for _, stack, slot in parts]  # type: ignore[index]
        joined._parameters[name] = nn.Parameter(torch.stack(pieces), requires_grad=False)
    return joined


def fused_module(block: MoEBlock) -> nn.Module:
    """The fused experts that a block had or has: what other experts replace, and take the arithmetic from."""
    module = block.experts_module
    return module._original.module if isinstance(module, PackedExperts) else module  # type: ignore[no-any-return]
