"""Sizes of a model, layer by layer, as plain data: what passes forecast with, and what a report counts.

A shape says nothing about weights, only how many there are and what they take on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .beside import Matrix
from .model import MoEModel
from .reading import Lazily, Reads


@dataclass(frozen=True)
class LayerShape:
    """One layer's experts.

    Attributes:
        num_experts: experts.
        top_k: experts per token.
        groups: (routing groups, groups a token may use) or None.
        hidden, intermediate: sizes H and I of the experts' projections; I of the widest where they differ.
        matrices: projections per expert (3 with a gate, 2 without).
        biases: bias entries per expert.
        weight_bytes: bytes of one stored weight before quantization.
        bytes: what all experts of the layer take on disk.
        kind: "fused" (dense weights) or what holds them now.
        rules: kinds of the rules between router and experts.
        neurons: of all experts together, where they differ in width; 0: E · I.
        row_bytes: what lies beside the experts for each of them: router row, correction bias, scale.
    """

    num_experts: int
    top_k: int
    groups: tuple[int, int] | None
    hidden: int
    intermediate: int
    matrices: int
    biases: int
    weight_bytes: int
    bytes: int
    kind: str = "fused"
    rules: tuple[str, ...] = ()
    neurons: int = 0
    row_bytes: int = 0

    @property
    def routing_groups(self) -> int:
        """Runs of experts that the router treats apart, each of which must keep as many as the others; 1 if none."""
        return self.groups[0] if self.groups else 1

    @property
    def weights_per_expert(self) -> int:
        """Weights in one expert's projections."""
        return self.matrices * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Weights in all experts' projections."""
        if self.neurons:
            return self.neurons * self.matrices * self.hidden
        return self.num_experts * self.weights_per_expert

    @property
    def dense_bytes_per_expert(self) -> int:
        """Bytes of one expert unquantized, biases included."""
        return (self.weights_per_expert + self.biases) * self.weight_bytes

    def with_experts(self, count: int) -> LayerShape:
        """The same with another number of dense experts."""
        return replace(self, num_experts=count, bytes=count * self.dense_bytes_per_expert)

    def with_width(self, intermediate: int) -> LayerShape:
        """The same with another number of neurons in every (dense) expert."""
        biases = self.biases and self.biases - (self.matrices - 1) * (self.intermediate - intermediate)
        return replace(self, intermediate=intermediate, biases=biases).with_experts(self.num_experts)


@dataclass(frozen=True)
class ModelShape:
    """All layers with experts, and what everything else takes.

    Attributes:
        layers: decoder layer → its experts.
        other_bytes: bytes of all tensors that are not experts (attention, embeddings, routers, shared experts, …).
        others: their names on disk → shapes. Empty for a model in memory.
        config: of the model as transformers has it, defaults filled in.
        matrices: decoder layer, or OUTER → the matrices among them that can be packed, or are.
        kept: path → why a matrix is never packed.
        reads: decoder layer → what its experts read, or why that isn't known.
    """

    layers: dict[int, LayerShape]
    other_bytes: int
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    matrices: Mapping[int, list[Matrix]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[int, Reads | str] = field(default_factory=dict, compare=False)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(layer.bytes for layer in self.layers.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.expert_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits that an expert weight takes on disk, scales, zero points, padding and biases included."""
        return 8 * self.expert_bytes / max(1, sum(layer.weights for layer in self.layers.values()))

    def with_layers(self, layers: dict[int, LayerShape]) -> ModelShape:
        """The same with some layers replaced."""
        return replace(self, layers={**self.layers, **layers})

    def with_experts(self, counts: Mapping[int, int]) -> ModelShape:
        """The same with other numbers of dense experts in some layers, and as many router rows."""
        layers = {i: self.layers[i].with_experts(count) for i, count in counts.items()}
        rows = sum((count - self.layers[i].num_experts) * self.layers[i].row_bytes for i, count in counts.items())
        return replace(self.with_layers(layers), other_bytes=self.other_bytes + rows)

    @property
    def work_bytes(self) -> int:
        """Bytes of what passes have changed, or could have: all experts, and what is packed beside them."""
        return self.expert_bytes + sum(m.bytes for own in self.matrices.values() for m in own if m.bits)

    def with_matrices(self, matrices: Mapping[int, list[Matrix]]) -> ModelShape:
        """The same with some layers' matrices replaced, and what they take."""
        before = sum(m.bytes for i in matrices for m in self.matrices[i])
        after = sum(m.bytes for own in matrices.values() for m in own)
        return replace(self, matrices={**self.matrices, **matrices}, other_bytes=self.other_bytes + after - before)


def model_shape(model: MoEModel) -> ModelShape:
    """Shape of a model as its source holds it (a folder's own dtypes, or the parameters in memory)."""
    layers: dict[int, LayerShape] = {}
    of_experts: set[str] = set()
    for index in model.moe_layers:
        block = model.block(index)
        experts = block.experts
        one = experts.expert(0)
        dtypes = model.stored_dtypes(index)
        names = block.weight_names()
        tensors = block.module.state_dict()
        # Packed experts have one tensor in the folder for each here; a server's has more beside codes and scales.
        held: dict[str, int] = {}
        if model.weights is not None:
            own_names = {n: name for n, name in model.weights.layer_names(index).items() if name in names}
            of_experts |= own_names.keys()
            if block.kind != "fused":
                held = {name: model.source.tensors[n].nbytes for n, name in own_names.items()}
        layers[index] = LayerShape(
            num_experts=experts.num_experts,
            top_k=block.top_k,
            groups=block.groups,
            hidden=experts.hidden_size,
            intermediate=experts.intermediate_size,
            matrices=len(one.matrices()),
            biases=sum(v.numel() for n, v in one.items() if n.endswith("_bias")),
            weight_bytes=next(dtypes[n] for n in names if "down_proj" in n).itemsize,
            bytes=sum(held.get(n) or tensors[n].numel() * dtypes[n].itemsize for n in names),
            kind=block.kind,
            rules=tuple(rule.kind for rule in block.rules),
            neurons=sum(getattr(experts, "widths", ())),
            row_bytes=sum(
                tensors[n].numel() // tensors[n].shape[dim] * dtypes.get(n, tensors[n].dtype).itemsize
                for n, (dim, _) in block.axes.tensors.items()
                if n in tensors and not n.startswith(f"{block.path}.")
            ),
        )
    others: dict[str, tuple[int, ...]] = {}
    if model.weights is not None:
        total = model.source.nbytes
        others = {n: info.shape for n, info in model.source.tensors.items() if n not in of_experts}
    else:
        own = {id(t): t for t in model.module.state_dict(keep_vars=True).values()}  # tied ones once
        total = sum(t.numel() * t.element_size() for t in own.values())
    config = model.module.config.to_dict()
    other_bytes = total - sum(layer.bytes for layer in layers.values())
    reads = Lazily(lambda: model.reads)
    return ModelShape(layers, other_bytes, others, config, model.matrices, model.kept, reads)
