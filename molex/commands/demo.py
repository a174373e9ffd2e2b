"""molex demo: the workbench's tour through every method."""

from pathlib import Path
from typing import Annotated

import typer

from molex.commands.console import console


def demo(
    out: Annotated[Path, typer.Option(help="Where tables, curves, heat map and mixtures go.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the three compared methods.")] = 100,
) -> None:
    """Turn a small dense model into mixtures by every method: train, compare, save, reload, generate. Offline."""
    from molex.workbench.demo import run_demo

    run_demo(out, console, steps)
