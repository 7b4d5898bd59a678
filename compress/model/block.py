"""One layer's router and experts, seen alike in every family, live or on the meta device.

A block can be looked at (`experts`, `router`), reduced (`keep`), regrouped (`regroup`, or `remap` behind a router that
stays as it is), given other experts (`replace_experts`), and turned into plain tensors (`state`) and back
(`restructure`, then `assign`). It knows nothing of methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_compress.errors import UnsupportedModelError

from . import families, hf
from .attention import Attention, unwatch, watch, watching
from .axes import ExpertAxes
from .experts import Experts, FusedExperts
from .router import Routing, ask_router, read_routing, route_through
from .routes import CHILD, Routes, install, routes_of, rule_prefix
from .rules import Remap, RouteRule, make_rule
from .saved import build_experts, check_classes
from .tensors import get_tensor, set_tensor

if TYPE_CHECKING:
    from .reading import Reads

# Attribute of a fused experts module whose number of neurons isn't the one that its config says.
_NARROWED = "moe_compress_neurons"
# Attribute of a decoder layer: names of tensors beside router and experts that were changed with them.
_BESIDE = "moe_compress_beside"


class MoEBlock:
    """Router and experts of one decoder layer.

    Attributes:
        layer: number of the decoder layer.
        module: the decoder layer.
        path: path of the experts module relative to it ("mlp.experts").
        axes: which of its tensors and attributes count experts.

    `reads`: finds what the experts read, when it is first asked for.
    """

    def __init__(
        self,
        layer: int,
        module: nn.Module,
        path: str,
        axes: ExpertAxes,
        reads: Callable[[], Reads | str] = lambda: "it wasn't looked for",
    ):
        self.layer = layer
        self.module = module
        self.path = path
        self.axes = axes
        self._reads = reads
        self.parent_path, _, self.experts_name = path.rpartition(".")
        self.router_path = self._find_router()

    # --- looking -----------------------------------------------------------------------------------------------

    @property
    def parent(self) -> nn.Module:
        """The module that holds router and experts."""
        return self.module.get_submodule(self.parent_path)

    @property
    def experts_module(self) -> nn.Module:
        """The experts module as the model calls it."""
        return self.module.get_submodule(self.path)

    @property
    def experts(self) -> Experts:
        """View of the experts."""
        module = self.experts_module
        return FusedExperts(module) if hf.is_fused_experts(module) else module  # type: ignore[return-value]

    @property
    def router(self) -> nn.Module:
        """The family's own router module."""
        return self.module.get_submodule(self.router_path)

    @property
    def kind(self) -> str:
        """What holds the experts: "fused" for the family's own dense module, else the kind of what replaced it."""
        module = self.experts_module
        return "fused" if hf.is_fused_experts(module) else module.kind  # type: ignore[return-value]

    @property
    def reads(self) -> Reads | str:
        """The norm and the matrices that what the experts read has to do with, or why that isn't known."""
        return self._reads()

    @property
    def num_experts(self) -> int:
        """Experts that the block has now."""
        return self.experts.num_experts

    @property
    def router_experts(self) -> int:
        """Experts that the router scores: more than there are where several of its classes lead to one (`remap`)."""
        name = next(n for n in self.axes.tensors if not self._holds(n))
        dim, extra = self.axes.tensors[name]
        return get_tensor(self.module, name).shape[dim] - extra

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return families.top_k(self.router, self.parent)

    @property
    def groups(self) -> tuple[int, int] | None:
        """(routing groups, groups a token may use), or None where routing isn't group-limited."""
        return families.routing_groups(self.router)

    def route(self, hidden_TH: Tensor, **context: Any) -> Routing:
        """Run the family's own router.

        Args:
            hidden_TH: what the router reads [T, H].
            context: what else the family's router reads (`input_ids` for hash routing, …).
        """
        output = ask_router(self.router, self.parent, f"layer {self.layer}", hidden_TH, context)
        return read_routing(output, len(hidden_TH)) or route_through(
            self.parent, self.experts_module, hidden_TH, output
        )

    @property
    def rules(self) -> list[RouteRule]:
        """Rules between router and experts, in the order in which they apply (rules.py)."""
        routes = routes_of(self.experts_module)
        return [] if routes is None else routes.rules

    def watching_attention(self) -> AbstractContextManager[Attention]:
        """Within the context, taps say what attention the layer's tokens receive (attention.py)."""
        return watching(self.module, self.layer, [self.experts_module, self.router])

    def infeasible(self, count: int) -> str | None:
        """Why the block can't work with that many experts, or None."""
        return families.infeasible(self.top_k, self.groups, count)

    # --- changing ----------------------------------------------------------------------------------------------

    def keep(self, indices: list[int]) -> None:
        """Remove all experts but these, router rows with them; order is kept.

        Raises UnsupportedModelError when the routing can't work with what is left, and where rules stand between router
        and experts, which were made for those that were there.
        """
        count = self.num_experts
        self._refuse_rules()
        if sorted(set(indices)) != list(indices) or not indices or indices[0] < 0 or indices[-1] >= count:
            raise ValueError(f"layer {self.layer}: experts to keep must be ascending, distinct and below {count}")
        reason = self.infeasible(len(indices))
        if reason:
            raise UnsupportedModelError(f"layer {self.layer} {reason}")
        if self.groups is not None:
            groups, _ = self.groups
            per_group = torch.bincount(torch.tensor(indices) // (count // groups), minlength=groups)
            if len(set(per_group.tolist())) > 1:
                raise UnsupportedModelError(
                    f"layer {self.layer} routes in {groups} groups, which must stay equal: "
                    f"{per_group.tolist()} would be left"
                )
        for name, (dim, extra) in self.axes.tensors.items():
            tensor = get_tensor(self.module, name)
            rows = torch.tensor([*indices, *range(count, count + extra)], device=tensor.device)
            set_tensor(self.module, name, tensor.index_select(dim, rows))
        table = getattr(self.router, "tid2eid", None)
        if table is not None:
            kept = torch.tensor(indices, device=table.device)
            set_tensor(self.module, f"{self.router_path}.tid2eid", families.remap_hash_table(table, kept, count))
        self._set_count(len(indices))

    def regroup(self, representatives: list[int], mixing_NE: Tensor, slots: list[int] | None = None) -> None:
        """Reduce to N groups: slot j gets expert `representatives[j]`'s weights and a mixture of router rows.

        The caller then writes merged weights into `experts.weights()`.

        Args:
            representatives: one expert of each group, ascending.
            mixing_NE: row j holds the coefficients over the E old router rows (and correction biases, and per-expert
                scales) that make slot j's.
            slots: slot of each old expert, which hash routing follows; without, tokens of experts that aren't among
                `representatives` go to those in turn.
        """
        mixed = {}
        for name, (dim, extra) in self.axes.tensors.items():
            if self._holds(name):
                continue
            tensor = get_tensor(self.module, name)
            rows = tensor.movedim(dim, 0)
            count = rows.shape[0] - extra
            old = rows[:count].reshape(count, -1).double()
            new = (mixing_NE.to(old) @ old).to(tensor.dtype).view(-1, *rows.shape[1:])
            new = torch.cat([new, rows[count:]])
            mixed[name] = new.movedim(0, dim).contiguous()
        table = getattr(self.router, "tid2eid", None)
        before = self.num_experts
        self.keep(representatives)
        for name, tensor in mixed.items():
            set_tensor(self.module, name, tensor)
        if table is not None and slots is not None:
            kept, slots_E = (torch.tensor(v, device=table.device) for v in (representatives, slots))
            set_tensor(
                self.module, f"{self.router_path}.tid2eid", families.remap_hash_table(table, kept, before, slots_E)
            )

    def remap(self, representatives: list[int], slots: list[int]) -> None:
        """Reduce the experts alone: slot j gets `representatives[j]`'s weights, the router's class e means `slots[e]`.

        The router stays as it is, bit for bit, so nothing about its groups or its top-k limits how many experts are
        left. Raises UnsupportedModelError where rules stand between router and experts already.
        """
        self._refuse_rules()
        scored = self.router_experts
        for name, (dim, _) in self.axes.tensors.items():
            if self._holds(name):
                tensor = get_tensor(self.module, name)
                rows = torch.tensor(representatives, device=tensor.device)
                set_tensor(self.module, name, tensor.index_select(dim, rows))
        self._set_count(len(representatives), scored)
        self.add_rule(Remap(slots))

    def narrow(self, kept_EI: Tensor) -> None:
        """Keep these neurons of each expert, [E, I'] numbers, ascending; the experts must be fused."""
        experts = FusedExperts(self.experts_module)
        weights = experts.weights()
        kept = kept_EI.to(weights.down.device)
        wide = kept.unsqueeze(2).expand(-1, -1, experts.hidden_size)

        def chosen(name: str, value: Tensor) -> Tensor:
            if name == "down_bias":
                return value
            if name == "down":
                return value.gather(2, wide.transpose(1, 2))
            return value.gather(1, wide if value.dim() == 3 else kept)

        narrowed = {name: chosen(name, value) for name, value in weights.items()}
        self._resize(kept.shape[1], weights.down.device)
        for name, value in experts.weights().items():
            value.copy_(narrowed[name])

    def replace_experts(self, module: nn.Module) -> None:
        """Put another experts module in place (same forward signature); rules stay in front of it."""
        routes = routes_of(self.experts_module)
        setattr(self.parent, self.experts_name, module)
        if routes is not None:
            self._put(routes)

    def add_rule(self, rule: RouteRule) -> None:
        """Put a rule between what comes out of the router, or of the rules before it, and the experts."""
        self._put(Routes([*self.rules, rule]))

    # --- as plain data -----------------------------------------------------------------------------------------

    def own_names(self) -> list[str]:
        """Names, relative to the layer, of the tensors that belong to router and experts as they are now."""
        prefixes = (self.path + ".", self.router_path + ".")
        state = self.module.state_dict()
        return [n for n in state if n.startswith(prefixes) or n in self.axes.tensors]

    def weight_names(self) -> list[str]:
        """Those of `own_names` that hold the experts' matrices and biases, however they are stored."""
        experts, others = self.path + ".", (f"{self.path}.post_expert_norm.", self.rule_prefix)
        return [n for n in self.own_names() if n.startswith(experts) and not n.startswith(others)]

    @property
    def changed_beside(self) -> list[str]:
        """Names, relative to the layer, of tensors beside router and experts that were changed with them and are dense
        still: they are kept, and written, with the block."""
        there = self.module.state_dict().keys()
        return sorted(n for n in getattr(self.module, _BESIDE, ()) if n in there)

    def also_changed(self, names: Iterable[str]) -> None:
        """From now on these tensors (relative to the layer) belong to `state`; what is the block's own does anyway."""
        others = set(names) - set(self.own_names())
        setattr(self.module, _BESIDE, frozenset(getattr(self.module, _BESIDE, frozenset())) | others)

    @property
    def rule_prefix(self) -> str:
        """What the names of rules' parameters begin with, relative to the layer."""
        return rule_prefix(self.path)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (names relative to the layer) and a JSON description from which `restructure` rebuilds the block."""
        description: dict[str, Any] = {"kind": self.kind, "num_experts": self.num_experts, "experts": self.path}
        if (scored := self.router_experts) != self.num_experts:
            description["router_experts"] = scored
        if self.kind != "fused":
            description["layout"] = self.experts_module.describe()  # type: ignore[operator]
        elif hasattr(self.experts_module, _NARROWED):
            description["neurons"] = self.experts.intermediate_size
        if self.rules:
            description[CHILD] = [rule.describe() for rule in self.rules]
        whole, beside = self.module.state_dict(), self.changed_beside
        if beside:
            description["beside"] = beside
        return {name: whole[name] for name in [*self.own_names(), *beside]}, description

    def restructure(self, description: dict[str, Any]) -> None:
        """Give the block the structure that `state` described, tensors on the meta device where shapes change.

        Raises CheckpointError where the router scores other experts than there are, and no rule says what that means.
        """
        count = int(description["num_experts"])
        scored = int(description.get("router_experts", count))
        check_classes(self.layer, description.get(CHILD, []), count, scored)
        if (count, scored) != (self.num_experts, self.router_experts):
            for name, (dim, extra) in self.axes.tensors.items():
                tensor = get_tensor(self.module, name)
                shape = list(tensor.shape)
                shape[dim] = (count if self._holds(name) else scored) + extra
                if shape != list(tensor.shape):
                    set_tensor(self.module, name, torch.empty(shape, dtype=tensor.dtype, device="meta"))
            self._set_count(count, scored)
        if "neurons" in description and description["neurons"] != self.experts.intermediate_size:
            self._resize(int(description["neurons"]), "meta")
        if description["kind"] != "fused":
            self.replace_experts(build_experts(self, description["kind"], description["layout"]))
        if rules := description.get(CHILD):
            self._put(Routes(make_rule(rule) for rule in rules))
        if beside := description.get("beside"):
            self.also_changed(beside)

    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Set the block's tensors by name (relative to the layer)."""
        for name, tensor in tensors.items():
            set_tensor(self.module, name, tensor)

    # --- inside ------------------------------------------------------------------------------------------------

    def _holds(self, name: str) -> bool:
        """Whether what has this name, relative to the layer, is the experts module's own, not the router's."""
        return name.startswith(self.path + ".")

    def _refuse_rules(self) -> None:
        if self.rules:
            kinds = ", ".join(rule.kind for rule in self.rules)
            raise UnsupportedModelError(
                f"layer {self.layer} has routing rules ({kinds}): change its experts before them"
            )

    def _put(self, routes: Routes) -> None:
        if routes.reads_attention:
            routes.attention = watch(self.module, self.layer, [self.experts_module, self.router])
        else:
            unwatch(self.module)
        install(self.experts_module, self.router, routes, read_routing)

    def _find_router(self) -> str:
        prefix = self.parent_path + "." if self.parent_path else ""
        beside = {
            name.removeprefix(prefix).split(".")[0]
            for name in self.axes.tensors
            if name.startswith(prefix) and not name.startswith(self.path + ".")
        }
        routers = [name for name in beside if isinstance(getattr(self.parent, name, None), nn.Module)]
        if len(routers) != 1:
            raise UnsupportedModelError(
                f"layer {self.layer}: expected one module beside {self.path!r} that scores experts, "
                f"found {sorted(routers)}"
            )
        return prefix + routers[0]

    def _resize(self, neurons: int, device: str | torch.device) -> None:
        FusedExperts(self.experts_module).resize(neurons, device)
        setattr(self.experts_module, _NARROWED, neurons)

    def _set_count(self, count: int, scored: int | None = None) -> None:
        """Integers that follow the number of experts: the experts module's own that of `count`, others of `scored`."""
        scored = count if scored is None else scored
        for attribute in self.axes.attributes:
            own = count if self._holds(attribute.module + ".") else scored
            setattr(self.module.get_submodule(attribute.module), attribute.name, attribute.value(own))
        router = self.router
        key = families.ROUTERS_READING_CONFIG.get(type(router).__name__)
        if key:
            router.config = copy.copy(router.config)  # type: ignore[assignment]
            setattr(router.config, key, scored)
