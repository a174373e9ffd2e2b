"""matplotlib, where it is installed (molex[viz]): figures that are files, without touching the caller's own plots."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from molex.errors import ConfigError
from molex.io.files import staged

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plots() -> None:
    """Raises ConfigError, which says what to install, where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'molex[viz]'")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches. Raises ConfigError as `check_plots` does."""
    check_plots()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: "Figure", path: Path) -> None:
    """As PNG, whole or not at all."""
    with staged(path.parent) as scratch:
        figure.savefig(scratch / path.name, dpi=120, format="png")
