"""The two pictures that go with a trained mixture: loss curves and where tokens went. Needs matplotlib (molex[viz])."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molex.errors import ConfigError

Loads = Mapping[str, Tensor]  # layer name -> share of the slots each expert served (E,)


def loss_curves(losses: Mapping[str, Sequence[float]], path: Path, window: int = 10) -> None:
    """One line for each run, averaged over `window` steps, on a logarithmic axis; written to path as PNG."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in losses.items():
        smooth = torch.tensor(values).unfold(0, min(window, len(values)), 1).mean(1)
        axes.plot(range(len(values) - len(smooth), len(values)), smooth.tolist(), label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def routing_heat_map(panels: Mapping[str, Loads], path: Path, title: str = "") -> None:
    """Layers by experts, one panel for each name (a skill, say); white where a layer has fewer experts."""
    plt = _pyplot()
    figure, grid = plt.subplots(
        1, len(panels), figsize=(2.2 * len(panels) + 2.5, 5), sharey=True, squeeze=False, layout="constrained"
    )
    image = None
    for axes, (name, loads) in zip(grid[0], panels.items(), strict=True):
        image = axes.imshow(_padded(loads).numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set(title=name, xlabel="expert")
        axes.set_yticks(range(len(loads)), [_short(layer) for layer in loads], fontsize=6)
    if image is not None:
        figure.colorbar(image, ax=grid[0], label="share of slots")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(scores: Mapping[str, Sequence[float]], path: Path, reference: float) -> None:
    """Mean and spread of each row's scores, best first, against a dashed reference."""
    plt = _pyplot()
    ordered = sorted(scores, key=lambda name: sum(scores[name]) / len(scores[name]))
    means = [sum(scores[name]) / len(scores[name]) for name in ordered]
    spreads = [float(torch.tensor(scores[name]).std(correction=0)) for name in ordered]
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(ordered) + 1), layout="constrained")
    axes.barh(ordered, means, xerr=spreads)
    axes.axvline(reference, linestyle="--", color="black")
    axes.set(xlabel="exact match", xlim=(0, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _padded(loads: Loads) -> Tensor:
    """(layers, most experts), NaN where a layer has fewer."""
    width = max(len(load) for load in loads.values())
    rows = torch.full((len(loads), width), float("nan"))
    for row, load in zip(rows, loads.values(), strict=True):
        row[: len(load)] = load
    return rows


def _short(layer: str) -> str:
    """model.layers.3.mlp.gate_proj -> 3.gate_proj."""
    parts = layer.split(".")
    return ".".join([next((part for part in parts if part.isdigit()), ""), parts[-1]]).strip(".")


def check_plots() -> None:
    """Raises ConfigError, which says what to install, where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'molex[viz]'")


def _pyplot() -> Any:
    """matplotlib on its file backend."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
