"""What lies beside the routed experts and can be packed as they are: matrices of linear layers, embeddings and head.

Found by structure, in every family: linear layers inside the decoder layers, but never a router or a part of one, and
nothing whose arithmetic isn't a plain product. What is left out has its reason, by name (`MoEModel.kept`).

A packed matrix stands in the module tree where the dense one stood (`restructure`), and is plain tensors and JSON
elsewhere (`packed_state`), like a block's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import hf
from .above import PACKED_HEAD, PACKED_MATRIX, function_at
from .block import MoEBlock

Kind = Literal["attention", "shared_experts", "dense_mlp", "embeddings", "head"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# In place of a decoder layer's number: what lies outside the decoder layers.
OUTER = -1

# A linear layer with fewer outputs than one per so many inputs scores or gates something; it weighs next to nothing.
_GATE = 16


@dataclass(frozen=True)
class Matrix:
    """One matrix beside the experts.

    Attributes:
        path: of its module, relative to the decoder layer; of embeddings and head, in the model.
        kind: which part of the model it is in.
        rows, columns: output and input features; of embeddings, tokens and hidden size.
        bytes: what it takes on disk.
        together: path of the first of the matrices that read the same and that servers join to one.
        disk: path of the module in the checkpoint's files.
        head: path of the head that shares an embedding's weights, or "".
        bits: of its codes where it is packed; 0 where it is dense.
    """

    path: str
    kind: Kind
    rows: int
    columns: int
    bytes: int
    together: str
    disk: str
    head: str = ""
    bits: float = 0

    @property
    def weights(self) -> int:
        """How many weights."""
        return self.rows * self.columns

    def among(self, kinds: frozenset[str]) -> bool:
        """Whether it belongs to one of these kinds; weights that embeddings and head share belong to both."""
        return self.kind in kinds or (bool(self.head) and "head" in kinds)


@dataclass(frozen=True)
class Found:
    """A module with a plain matrix, before it is known how it is stored."""

    path: str
    kind: Kind
    module: nn.Linear | nn.Embedding
    together: str
    head: str = ""


def find_matrices(
    model: Any,
    stack: str,
    blocks: Mapping[int, MoEBlock],
    stored_as: Callable[[Mapping[str, Tensor]], dict[str, tuple[str, int]]],
    holds: Callable[[str], bool],
) -> tuple[dict[int, list[Matrix]], dict[str, str]]:
    """Matrices of every decoder layer and (OUTER) outside, and full path → why a linear layer isn't among them.

    Args:
        model: a transformers model.
        stack: module path of its decoder layers.
        blocks: routers and experts of those that have them.
        stored_as: see `stored_whole`.
        holds: whether the checkpoint's files hold the matrix of a module, by full path.
    """
    found: dict[int, list[Matrix]] = {}
    kept: dict[str, str] = {}
    hidden = model.config.get_text_config().hidden_size
    layers = model.get_submodule(stack)
    seen: set[int] = set()
    for index in (OUTER, *range(len(layers))):
        if index == OUTER:
            prefix, (parts, reasons) = "", outer_matrices(model)
        else:
            prefix, (parts, reasons) = f"{stack}.{index}.", layer_linears(layers[index], blocks.get(index), hidden)
        kept |= {prefix + path: reason for path, reason in reasons.items()}
        stored = stored_as({prefix + p.path: p.module.weight for p in parts})
        found[index] = []
        for part in parts:
            full = prefix + part.path
            if id(part.module) in seen:
                kept[full] = "several layers share it"
            elif full not in stored:
                kept[full] = "the checkpoint doesn't store it as a matrix of its own"
            elif part.head and holds(part.head):
                kept[full] = f"config.json ties {part.head} to it, and the checkpoint holds both"
            else:
                disk, size = stored[full]
                rows, columns = part.module.weight.shape
                found[index].append(Matrix(part.path, part.kind, rows, columns, size, part.together, disk, part.head))
            seen.add(id(part.module))
    return found, kept


def stored_whole(
    weights: Mapping[str, Tensor], to_disk: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> dict[str, tuple[str, int]]:
    """Full path of a module → path on disk and bytes of its matrix, where it is one tensor there, as it is here.

    Args:
        weights: full path of a module → its matrix.
        to_disk: runtime tensors → tensors as the checkpoint holds them.
    """
    # Small matrices, each with a number of its own, through the conversion: what comes out whole is stored as such.
    numbered = {f"{path}.weight": torch.full((2, 3), i, dtype=torch.float32) for i, path in enumerate(weights)}
    try:
        there = to_disk(numbered)
    except (RuntimeError, ValueError, KeyError, IndexError):
        return {}
    names = {int(t[0, 0]): n for n, t in there.items() if t.shape == (2, 3) and len(t.unique()) == 1}
    size = {path: w.numel() * w.element_size() for path, w in weights.items()}
    return {
        path: (names[i].removesuffix(".weight"), size[path])
        for i, path in enumerate(weights)
        if names.get(i, "").endswith(".weight")
    }


def layer_linears(layer: nn.Module, block: MoEBlock | None, hidden: int) -> tuple[list[Found], dict[str, str]]:
    """Linear layers of a decoder layer, and path → why it isn't among them.

    Args:
        layer: the decoder layer.
        block: its router and experts, if it has any.
        hidden: size of the hidden state.
    """
    linears = {path: m for path, m in layer.named_modules() if isinstance(m, nn.Linear)}
    own = (block.router_path + ".", block.path + ".") if block is not None else ()
    found, kept = [], {}
    joined = _joined(linears, hidden)
    for path, module in linears.items():
        if (path + ".").startswith(own):
            continue
        if reason := _reason(layer, path, module):
            kept[path] = reason
            continue
        if (kind := _kind(layer, path, block)) is None:
            kept[path] = "it belongs to neither attention nor an MLP"
        else:
            found.append(Found(path, kind, module, joined.get(path, path)))
    return found, kept


def outer_matrices(model: PreTrainedModel) -> tuple[list[Found], dict[str, str]]:
    """Embeddings and head, and path → why it isn't among them. Paths are those in the model."""
    found, kept = [], {}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(m): p for p, m in model.named_modules()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    here, there = paths[id(embeddings)], paths.get(id(head), "")
    sharing = {t for t, origin in tied.items() if origin == f"{here}.weight"}
    if type(embeddings) is not nn.Embedding or embeddings.max_norm is not None:
        kept[here] = f"{type(embeddings).__name__} does more than look rows up"
    elif sharing - {f"{there}.weight"}:
        kept[here] = f"its weights are those of {min(sharing)} too"
    else:
        found.append(Found(here, "embeddings", embeddings, here, there if sharing else ""))
    if head is None or here == there:
        return found, kept
    if type(head) is not nn.Linear:
        kept[there] = f"{type(head).__name__} is no plain linear layer"
    elif f"{there}.weight" in tied:
        if here in kept:
            kept[there] = f"its weights are those of {here}"
    else:
        found.append(Found(there, "head", head, there))
    return found, kept


def _reason(layer: nn.Module, path: str, module: nn.Linear) -> str:
    """Why a linear layer isn't packed, or ""."""
    above = list(_above(layer, path))
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is no plain linear layer"
    if not above:
        return "it belongs to the decoder layer itself"
    if any(isinstance(child, nn.Conv1d) for _, parent in above for child in parent.children()):
        return "it feeds a convolution or state-space model"
    if any("norm" in type(parent).__name__.lower() for _, parent in above):
        return "it belongs to a norm"
    if any("Indexer" in type(parent).__name__ for _, parent in above):
        return "it chooses what is attended to"
    if module.out_features * _GATE < module.in_features:
        return "it gates or scores"
    return ""


def _kind(layer: nn.Module, path: str, block: MoEBlock | None) -> Kind | None:
    above = list(_above(layer, path))
    if any("attention" in type(parent).__name__.lower() or name.endswith("attn") for name, parent in above):
        return "attention"
    beside = block is not None and block.parent_path != "" and path.startswith(f"{block.parent_path}.")
    if beside or any("mlp" in type(parent).__name__.lower() for _, parent in above):
        return "dense_mlp" if block is None else "shared_experts"
    return None


def _above(layer: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Last part of the path, and module, of everything between the layer and what is at `path`."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        yield parts[end - 1], layer.get_submodule(".".join(parts[:end]))


def _joined(linears: Mapping[str, nn.Linear], hidden: int) -> dict[str, str]:
    """Path → first of those in the same module that read the hidden state (q, k and v; gate and up; …).

    What gives the hidden state back and was defined last is the way out, whatever its sizes.
    """
    siblings: dict[str, list[str]] = {}
    for path in linears:
        siblings.setdefault(path.rpartition(".")[0], []).append(path)
    joined = {}
    for paths in siblings.values():
        inward = [p for p in paths if linears[p].in_features == hidden]
        if len(inward) > 1 and inward[-1] == paths[-1] and linears[inward[-1]].out_features == hidden:
            inward.pop()
        joined.update(dict.fromkeys(inward, inward[0] if inward else ""))
    return joined


# --- packed ones, in the module tree and as plain data ------------------------------------------------------------


def restructure(root: nn.Module, matrices: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> None:
    """Put packed modules, tensors on the meta device, where dense or packed ones are.

    Args:
        root: a decoder layer, or a whole model.
        matrices: path → encoding as in config.json, with `head`: path of what shares an embedding's weights.
        dtype: in which the model computes.
    """
    for path, values in matrices.items():
        own = dict(values)
        head = own.pop("head", "")
        replace(root, path, function_at(PACKED_MATRIX)(root.get_submodule(path), own, dtype))
        if head and _has(root, head):
            share(root, path, head)


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a packed module in place of what is at `path`."""
    parent, _, name = path.rpartition(".")
    module.train(root.training)
    setattr(root.get_submodule(parent), name, module)


def share(model: Any, embeddings: str, head: str) -> None:
    """Make the head use the packed embeddings' weights; transformers no longer ties what isn't there."""
    replace(model, head, function_at(PACKED_HEAD)(model.get_submodule(embeddings), model.get_submodule(head)))
    hf.untie(model, head)


def is_packed(module: nn.Module) -> bool:
    """Whether a module holds a packed matrix of its own."""
    return getattr(module, "kind", "") == "packed_matrix"


def packed_state(
    root: nn.Module, only: frozenset[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors and descriptions of the packed matrices in `root` (of those at the paths in `only`); see `restructure`.

    A bias is not among them: it stays what and where it was.
    """
    tensors: dict[str, Tensor] = {}
    matrices = {}
    for path, module in root.named_modules():
        if is_packed(module) and (only is None or path in only):
            matrices[path] = module.describe()  # type: ignore[operator]
            tensors |= {f"{path}.{name}": tensor for name, tensor in module.packed_tensors().items()}  # type: ignore[operator]
    heads = {id(m.embeddings): p for p, m in root.named_modules() if getattr(m, "kind", "") == "packed_head"}
    for path, values in matrices.items():
        if head := heads.get(id(root.get_submodule(path))):
            values["head"] = head
    return tensors, matrices


def is_bias(name: str) -> bool:
    """Whether the tensor of a packed matrix's module stays as the family stores it."""
    return name.endswith(".bias")


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True
