"""Changing a model's layers by one pass's plan: a layer's matrices and block, rounded to what is stored and committed.

With inputs, all calibration batches wait before the layer and go on through the change. How matrices beside the experts
are packed, in a layer and outside all of them, is in changing.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.linear_inputs import LinearMoments
from moe_compress.calib.routing import RoutingChange
from moe_compress.changing import change_linears, change_outer
from moe_compress.errors import RunError
from moe_compress.model import Layer, MoEBlock, MoEModel
from moe_compress.model.beside import OUTER, packed_state
from moe_compress.model.sweep import Step
from moe_compress.passes import Pass, Plan
from moe_compress.storage import Commits


@dataclass
class Applying:
    """One pass on its way through a model, a call per layer; `outside` comes first.

    Attributes:
        model: what is changed.
        step, plan: the pass, and what it decided.
        commits: where changed layers go.
        earlier: those of the passes before, which drop what is replaced.
    """

    model: MoEModel
    step: Pass
    plan: Plan
    commits: Commits
    earlier: list[Commits]

    def outside(self) -> None:
        """Change what lies outside the decoder layers. First of all: what the layers read comes from there."""
        tensors, description, report = change_outer(self.model, self.step, self.plan.beside[OUTER]["first"])
        self.commits.commit(OUTER, {n: t.cpu() for n, t in tensors.items()}, description, {"beside": report})
        self.model.refresh_outer()
        for before in self.earlier:
            before.drop(OUTER)

    def alone(self, index: int) -> None:
        """Change a layer that needn't run."""
        linears = self.plan.beside.get(index, {})
        with self.model.layer(index, stored=True) as layer, self.model.editing(layer) as block:
            report: dict[str, Any] = {}
            if block is not None:
                report = self._block(layer, block, None)
            for part in linears.values():
                report.setdefault("beside", {}).update(change_linears(self.model, self.step, layer, part, None))
            self._commit(layer, report)

    def with_inputs(self, at: Step, other: Step | None = None) -> None:
        """Change a layer with all calibration batches waiting before it, and let them go on through the change.

        `other`: the original's, with its own batches waiting before it.
        """
        layer: Layer = at.layer
        linears = self.plan.beside.get(at.index, {})
        if (layer.block is None and not linears) or self.commits.has(at.index):
            at.advance()
            return
        report: dict[str, Any] = {}
        if layer.block is not None and self.step.prepares():
            report |= self._prepared(at, layer, layer.block)
        # What comes before the block is changed first: the block's inputs are then those that it will really read.
        first, then = linears.get("first", {}), linears.get("then", {})
        if first:
            with LinearMoments(layer.module, first, at.token_weights) as moments:
                at.run()
            with self.model.editing(layer):
                report["beside"] = change_linears(self.model, self.step, layer, first, moments)
        inputs = BlockInputs()
        if then or layer.block is not None:
            with LinearMoments(layer.module, then, at.token_weights) as moments:
                at.run(inputs.observe, inputs_only=not then)  # `then` may read what the experts put out
            inputs.stored = self.model.stored_dtypes(at.index)
            if other is not None and layer.block is not None:
                inputs.original_TH = self._original_outputs(at, other)
            with self.model.editing(layer):
                if layer.block is not None:
                    report |= self._block(layer, layer.block, inputs)
                if then:
                    done = change_linears(self.model, self.step, layer, then, moments)
                    report["beside"] = report.get("beside", {}) | done
        if layer.block is None:
            at.advance()
        else:
            change = RoutingChange(inputs, report.get("slots"))
            at.advance(change.observe)
            report["routing"] = change.result()
        with self.model.editing(layer):
            self._commit(layer, report)

    def _prepared(self, at: Step, layer: Layer, block: MoEBlock) -> dict[str, Any]:
        inputs = BlockInputs()
        at.run(inputs.observe, inputs_only=True)
        inputs.stored = self.model.stored_dtypes(at.index)
        with self.model.editing(layer):
            return self.step.prepare(block, self.plan.layers[layer.index], inputs)

    def _original_outputs(self, at: Step, other: Step) -> Tensor:
        found: list[Tensor] = []
        if self.step.beside_original() == "same":
            at.through(other.layer).run(lambda tap: found.append(tap.output_TH))
        else:
            other.advance(lambda tap: found.append(tap.output_TH))
        return torch.cat(found)

    def _block(self, layer: Layer, block: MoEBlock, inputs: BlockInputs | None) -> dict[str, Any]:
        beside, experts = self._beside(layer, block), block.num_experts
        report = self.step.apply(block, self.plan.layers[layer.index], inputs)
        if not isinstance(report, dict):
            raise RunError(f"{self.step.name}: `apply` returned {type(report).__name__}, not a report (a dict)")
        slots = report.get("slots", range(experts) if block.num_experts == experts else None)
        if slots is None or len(slots) != experts or not all(-1 <= slot < block.num_experts for slot in slots):
            raise RunError(
                f"{self.step.name}: layer {layer.index} has {block.num_experts} of {experts} experts left, and `apply` "
                f"returned {'no' if slots is None else 'other'} `slots` (old expert → new slot, −1 if gone), by which "
                "the report follows them"
            )
        report["other_bytes_change"] = self._beside(layer, block) - beside
        if inputs is not None:
            self.model.round_block(layer)
        return report

    def _beside(self, layer: Layer, block: MoEBlock) -> int:
        """Bytes that the block's router and rules take where they are stored."""
        stored = self.model.stored_dtypes(layer.index)
        experts, rules = block.path + ".", block.rule_prefix
        state = block.module.state_dict()
        own = (n for n in block.own_names() if not n.startswith(experts) or n.startswith(rules))
        tensors = {n: state[n] for n in own}
        return sum(t.numel() * stored.get(n, t.dtype).itemsize for n, t in tensors.items())

    def _commit(self, layer: Layer, report: dict[str, Any]) -> None:
        stored = self.model.stored_dtypes(layer.index)
        tensors: dict[str, Tensor] = {}
        description: dict[str, Any] = {}
        if layer.block is not None:
            tensors, description = self._block_state(layer.block, stored, report)
        linears, matrices = packed_state(layer.module)
        if matrices:
            tensors, description = tensors | linears, {**description, "matrices": matrices}
        self.commits.commit(layer.index, {n: t.cpu() for n, t in tensors.items()}, description, report)
        for before in self.earlier:
            before.drop(layer.index)

    def _block_state(
        self, block: MoEBlock, stored: dict[str, torch.dtype], report: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if block.kind != "fused":
            # Packed weights are what they are. Biases have names of their own there, and the dtype that they came with.
            biases = [n for n in block.weight_names() if n.endswith("_bias")]
            came = next((d for n, d in stored.items() if n.startswith(block.path) and n.endswith("_bias")), None)
            state = block.module.state_dict()
            block.assign({n: state[n].to(came) for n in biases})
        tensors, description = block.state()
        tensors = {n: t.to(stored.get(n, t.dtype)) for n, t in tensors.items()}
        report["num_experts"] = block.num_experts
        report["kind"] = description["kind"]
        if block.rules:
            report["rules"] = [rule.kind for rule in block.rules]
        report["neurons"] = block.experts.intermediate_size
        stored_bytes = sum(tensors[n].numel() * tensors[n].element_size() for n in block.weight_names())
        beside = self.step.target.beside_layer(description["layout"]) if "layout" in description else 0
        report["expert_bytes"] = stored_bytes + beside
        return tensors, description
