"""The contract of a pass, and the registry that finds passes by name.

A pass plans before it changes. `forecast` predicts sizes from shapes alone (no weights, no data) and refuses what can't
work. `plan` looks at all layers' statistics and decides, as plain data. `apply` changes one layer's block by its
decision and knows nothing of the others. The method itself is a function on tensors beside the pass.

To add one: a file in quant/, prune/, merge/ or compress/heal/ (or anywhere, named under `plugins:` in a recipe) with a
subclass of `Pass` under `@register`. Nothing else has to know about it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from moe_compress.calib.batches import TokenBatches
from moe_compress.calib.collect import Profile
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import Result, Statistic
from moe_compress.errors import RecipeError
from moe_compress.export.targets import Target
from moe_compress.model import MoEBlock, MoEModel
from moe_compress.model.shape import ModelShape
from moe_compress.progress import Progress
from moe_compress.registry import Registry

# Folders whose modules are searched for passes.
_HOMES = ("moe_compress.quant", "moe_compress.prune", "moe_compress.merge", "moe_compress.heal")


class PassOptions(BaseModel):
    """Base of a pass's options: unknown keys are errors, every field has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PresetOptions(PassOptions):
    """Options with a field `preset`, which replaces the defaults of those that are not given.

    Attributes:
        presets: name → options of a paper's setting.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(name := values.get("preset"), str):
            return {**cls.presets.get(name, {}), **values}
        return values

    @classmethod
    def told_presets(cls) -> dict[str, str]:
        """Name → the options that it sets, as text."""
        return {name: ", ".join(f"{k}: {v}" for k, v in values.items()) for name, values in cls.presets.items()}


@dataclass
class Plan:
    """What a pass decided, as plain data: saved as JSON, printable, comparable.

    Attributes:
        name: of the pass.
        layers: every decoder layer with experts → its decision (JSON values only).
        beside: decoder layer, or OUTER → what happens to matrices beside the experts: module path → decision, those
            under "first" before the block's inputs are read, those under "then" with the block.
        summary: what is worth reading at a glance.
        notes: what the user should know (protected experts, fall-backs, limits that were hit).
    """

    name: str
    layers: dict[int, dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    beside: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        keyed = {name: {str(i): d for i, d in getattr(self, name).items()} for name in ("layers", "beside")}
        return {**asdict(self), **keyed}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Back from `to_json`."""
        keyed = {name: {int(i): d for i, d in values[name].items()} for name in ("layers", "beside")}
        return cls(**{**values, **keyed})


@dataclass
class Lesson:
    """What a pass that learns has at hand.

    Attributes:
        model: as the passes before have left it; as it was when `learn` returns.
        source: the original; the model itself for a pass that doesn't need the original.
        shape: of the model.
        text: calibration text.
        batch_size: sequences of one forward.
        slots: layer → the place in `model` of each expert of the original, −1 if it is gone.
        hold, hold_all: folders for hidden states of a sweep, and of one that goes back; None for memory.
        progress: told about every layer of every sweep.
    """

    model: MoEModel
    source: MoEModel
    shape: ModelShape
    text: TokenBatches
    batch_size: int
    slots: dict[int, list[int]]
    hold: Path | None
    hold_all: Path | None
    progress: Progress


class Pass(ABC):
    """One step of a recipe.

    Class attributes:
        name: how recipes call it, "family.method".
        summary: what it does, one line.
        paper: where the method is from.
        Options: its options; by default it has none.
        accepts: kinds of experts that it can change (see LayerShape.kind).
        leaves: kinds that the experts may be of behind it; empty: as they were.

    Attributes:
        learned: of a pass that learns, layer → what `learn` found, there before `plan` and `apply` are called.
        profile: what `plan` was given, for `apply` to look up tensors that are too large for a plan.
        round, start: which round it is of a pass that goes in several (rounds.py), and the model's shape before the
            first, there before `forecast` and `plan` are called; None where nobody has said.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    Options: ClassVar[type[PassOptions]] = PassOptions
    accepts: ClassVar[frozenset[str]] = frozenset({"fused"})
    leaves: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: PassOptions, target: Target):
        self.options = options
        self.target = target
        self.learned: dict[int, Result] = {}
        self.profile: Profile | None = None
        self.round = 0
        self.start: ModelShape | None = None

    def statistics(self) -> Sequence[Statistic]:
        """What `plan` needs to have been measured."""
        return ()

    def domains(self) -> Sequence[str] | None:
        """Tags of the calibration text that `statistics` are measured on; None for all of it."""
        return None

    def needs_inputs(self) -> bool:
        """Whether `apply` reads what the block read (collected with all earlier layers already changed)."""
        return False

    def learns(self) -> bool:
        """Whether `learn` is to be called before `plan`, with the original beside the model."""
        return False

    def learn(self, lesson: Lesson) -> dict[int, Result]:
        """What only the whole model can teach, as tensors per layer; kept like a statistic, and as pure as one."""
        return {}

    def beside_original(self) -> Literal["own", "same"] | None:
        """Whether `apply` also gets what the original's experts put out on the text (`BlockInputs.original_TH`).

        "own": reading what the original's layers before it hand on; "same": reading what the changed layers do.
        """
        return None

    def needs_original(self) -> bool:
        """Whether the original must be at hand, for `learn` or for `apply`."""
        return self.learns() or self.beside_original() is not None

    def goes_back(self) -> bool:
        """Whether anything that it measures or learns takes a backward sweep."""
        return any(statistic.gradients for statistic in self.statistics())

    def needs_text(self) -> bool:
        """Whether anything that it does takes calibration text."""
        return self.needs_inputs() or self.learns() or any(statistic.reads_text for statistic in self.statistics())

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """Option → registered name → where it is from, of options that name something others may add to."""
        return {}

    @abstractmethod
    def forecast(self, shape: ModelShape) -> ModelShape:
        """Sizes after this pass. Raises RecipeError or BudgetError when it can't be done, with the numbers."""

    def settle(self, shape: ModelShape) -> ModelShape:
        """Sizes of the changed model, where the pass also decides how tensors outside the experts are stored."""
        return shape

    @abstractmethod
    def plan(self, profile: Profile) -> Plan:
        """Decide for all layers. Pure: the same profile gives the same plan."""

    def prepares(self) -> bool:
        """Whether `prepare` is to be called in each layer before anything of it changes; such a pass needs inputs."""
        return False

    def prepare(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs) -> dict[str, Any]:
        """Change a block and what feeds it in a way that leaves what its layer computes as it was.

        What changes beside router and experts is told to the block (`MoEBlock.also_changed`). `inputs` is what the
        block read before; `apply` gets what it reads afterwards. Returns what was done, as JSON values.
        """
        return {}

    @abstractmethod
    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Change one block. Returns what was done and why, per layer and expert, as JSON values."""

    def apply_beside(
        self, weights: Mapping[str, Tensor], decision: dict[str, Any], moments: Mapping[str, Tensor] | None
    ) -> dict[str, Changed]:
        """Pack matrices beside the experts, where `plan` says something of them (`Plan.beside`).

        Args:
            weights: module path → dense matrix [O, K].
            decision: module path → what was decided of it.
            moments: module path → Σ x xᵀ [K, K] over what the module reads, float32, the same tensor for those that
                read the same; None where inputs aren't read, and outside the decoder layers.

        Returns module path → what takes the matrix's place.
        """
        raise RuntimeError(f"{self.name} plans for matrices beside the experts and doesn't say how they change")


@dataclass
class Changed:
    """A matrix beside the experts, packed.

    Attributes:
        bits: of its codes.
        module: what takes the dense module's place, given that module and the dtype that its weights compute in.
        report: what was done and why, as JSON values.
    """

    bits: float
    module: Callable[[nn.Module, torch.dtype], nn.Module]
    report: dict[str, Any]


_REGISTRY = Registry[type[Pass]]("pass", "passes")
_discovered = False
register = _REGISTRY.adding(lambda cls: cls)  # a decorator of passes


def all_passes() -> dict[str, type[Pass]]:
    """Every known pass by name."""
    global _discovered
    if not _discovered:
        _discovered = True
        for home in _HOMES:
            package = importlib.import_module(home)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{home}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def find_pass(name: str) -> type[Pass]:
    """The pass of that name. Raises RecipeError with the nearest name there is."""
    all_passes()
    return _REGISTRY.find(name)


def load_plugin(path: Path) -> None:
    """Import a file of the user's that registers passes. Raises RecipeError when it can't be imported."""
    if not path.is_file():
        raise RecipeError(f"plugin {path} doesn't exist")
    all_passes()  # first: of two that have one name, the file is the one that is refused
    name = f"moe_compress_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is the user's to read
        raise RecipeError(f"plugin {path} can't be imported: {type(error).__name__}: {error}") from error
