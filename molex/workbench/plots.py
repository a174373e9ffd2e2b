"""The pictures that go with training runs: loss curves, and scores of many. They need matplotlib (molex[viz])."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from molex.evaluation.figures import new_figure, write_figure


def loss_curves(losses: Mapping[str, Sequence[float]], path: Path, window: int = 10) -> None:
    """One line for each run, averaged over `window` steps, on a logarithmic axis; written to path as PNG."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, values in losses.items():
        smooth = torch.tensor(values).unfold(0, min(window, len(values)), 1).mean(1)
        axes.plot(range(len(values) - len(smooth), len(values)), smooth.tolist(), label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    write_figure(figure, path)


def bars(scores: Mapping[str, Sequence[float]], path: Path, reference: float) -> None:
    """Mean and spread of each row's scores, best first, against a dashed reference."""
    ordered = sorted(scores, key=lambda name: sum(scores[name]) / len(scores[name]))
    means = [sum(scores[name]) / len(scores[name]) for name in ordered]
    spreads = [float(torch.tensor(scores[name]).std(correction=0)) for name in ordered]
    figure = new_figure(7, 0.3 * len(ordered) + 1)
    axes = figure.subplots()
    axes.barh(ordered, means, xerr=spreads)
    axes.axvline(reference, linestyle="--", color="black")
    axes.set(xlabel="exact match", xlim=(0, 1))
    write_figure(figure, path)
