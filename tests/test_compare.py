"""The comparison of methods: rows of one size, cells that are run once, a table of all of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from molex.errors import ConfigError
from recipes import compare_methods
from recipes.compare_methods import ROWS, at_budget, count, main

BUDGET = 600_000


@pytest.mark.parametrize("row", ROWS)
def test_rows_have_the_budgets_size(row: str) -> None:
    """Within the step of their dial; what routes over adapters trains less, but holds experts of that size."""
    config = at_budget(row, 4, BUDGET)
    stored = config.override({"train_experts": True})
    assert 0.75 * BUDGET < count(stored) < 1.25 * BUDGET
    if config.method in ("flylora", "moram"):
        assert config.scales(config.num_experts)[0] == pytest.approx(2.0)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, **arguments: Any) -> None:
    given = {"out": out, "skills": "upper,ends", "steps": 2, "check_every": 1, "test": 4, "seeds": 2, **arguments}
    given = {"learning_rates": "5e-3,1e-2", "budget": BUDGET, "rows": "lora,arrow,lora-mixer", **given}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *flags])
    main()


def test_cells_are_run_once_and_make_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, tmp_path)
    cells = {path.name: path.read_text() for path in (tmp_path / "cells").iterdir()}
    seeds = [name for name in cells if name.startswith("lora-lr-")]
    assert len(seeds) == 3, "two rates on the first seed, the better one on the second"
    assert {"oracle-upper.json", "oracle-ends.json", "averaged-lora.json", "averaged-flylora.json"} <= cells.keys()
    assert all({"validation", "test", "active", "trainable"} <= json.loads(cells[name]).keys() for name in seeds)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {row} |" in table or f"| {row} (" in table for row in ("lora", "arrow", "lora-mixer"))
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*_: object) -> None:
        raise AssertionError("a cell was run again")

    monkeypatch.setattr(compare_methods.Bench, "row", refuse)
    run(monkeypatch, tmp_path)
    assert (tmp_path / "table.md").read_text() == table
    with pytest.raises(ConfigError, match="choose another --out"):
        run(monkeypatch, tmp_path, steps=3)
