"""What `analyse` found, as PNG files. matplotlib is imported here and nowhere else, and draws without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_compress.checkpoint.atomic import whole_file
from moe_compress.errors import InputError

if TYPE_CHECKING:
    from moe_compress.analysis import Analysis


def plot_analysis(found: Analysis, folder: Path) -> list[Path]:
    """Write load.png, maxima.png, routing.png, and co_activation-LAYER.png for every layer. Returns their paths.

    Raises InputError where matplotlib isn't installed.
    """
    figure = _figure()
    folder.mkdir(parents=True, exist_ok=True)
    layers = list(found.layers)
    written = []

    def save(name: str, drawn: Any) -> None:
        with whole_file(folder / name) as partial:
            drawn.savefig(partial, format="png", dpi=110, metadata={"Software": None})
        written.append(folder / name)

    drawn = figure(figsize=(7, 0.35 * len(layers) + 2), layout="constrained")
    _map(drawn, drawn.subplots(), [found.load[i] / found.load[i].mean().clamp_min(1e-300) for i in layers], layers)
    drawn.suptitle("tokens of each expert, in means of its layer")
    save("load.png", drawn)

    drawn = figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    for place, index in enumerate(layers):
        largest = found.maxima[index]
        supers = found.layers[index]["super_experts"]
        axes.scatter([place] * len(largest), largest, s=8, color="tab:blue")
        axes.scatter([place] * len(supers), largest[supers], s=30, color="tab:red")
    axes.set(xlabel="layer", ylabel="max |f|", yscale="log", title="largest output of each expert; super experts red")
    axes.set_xticks(range(len(layers)), [str(i) for i in layers])
    save("maxima.png", drawn)

    drawn = figure(figsize=(9, 7), layout="constrained")
    for axes, (title, keys) in zip(drawn.subplots(3, sharex=True), _CURVES.items(), strict=True):
        for key in keys:
            curve = [found.layers[i].get(key) for i in layers]
            if all(value is not None for value in curve):
                axes.plot(range(len(layers)), curve, marker="o", label=key)
        if title == "a cache's hit rate":
            for name in ("sch", "lru"):
                for ratio in found.summary[name]:
                    rates = [found.layers[i][name].get(ratio, float("nan")) for i in layers]
                    label = f"{name}, {ratio} · top-k"
                    axes.plot(range(len(layers)), rates, marker="o", label=label, ls="-" if name == "sch" else ":")
        axes.set(title=title, ylim=(0, 1.1 * max(1e-9, axes.dataLim.y1)))
        if axes.lines:
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_xticks(range(len(layers)), [str(i) for i in layers])
    save("routing.png", drawn)

    for index in layers:
        drawn = figure(figsize=(5, 4.2), layout="constrained")
        axes = drawn.subplots()
        experts = len(found.together[index])
        off_diagonal = found.together[index].clone().masked_fill(torch.eye(experts, dtype=torch.bool), float("nan"))
        drawn.colorbar(axes.imshow(off_diagonal, cmap="viridis", vmin=0))
        axes.set(title=f"layer {index}: chosen together, n_ij/√(n_i·n_j)", xlabel="expert", ylabel="expert")
        save(f"co_activation-{index}.png", drawn)
    return written


_CURVES: dict[str, list[str]] = {
    "load and certainty": ["load_cv", "load_gini", "top1_share", "router_entropy_share"],
    "local consistency": ["srp"],
    "a cache's hit rate": [],
}


def _map(drawn: Any, axes: Any, rows: list[torch.Tensor], layers: list[int]) -> None:
    """One row of colours per layer; layers may have different numbers of experts."""
    table = torch.full((len(rows), max(map(len, rows))), float("nan"), dtype=torch.float64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    drawn.colorbar(axes.imshow(table, aspect="auto", cmap="viridis", vmin=0))
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_yticks(range(len(layers)), [str(i) for i in layers])


def check() -> None:
    """Raise InputError where matplotlib isn't installed."""
    _figure()


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'moe-compress[report]'") from error
    return Figure
