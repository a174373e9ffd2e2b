"""Cells of a long comparison: one JSON file each, run once, so that what was stopped goes on where it was."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_cell(out: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cell's record, from its file or by running it; the file is written whole or not at all."""
    slug = name.replace(": ", "-").replace(", ", "-").replace(" ", "-")
    path = out / "cells" / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        print(f"{time.strftime('%H:%M')}  {name}", flush=True)
        record = make()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"cell": name, "torch": torch.__version__, **record}, indent=1) + "\n")
        partial.rename(path)
    return json.loads(path.read_text())
