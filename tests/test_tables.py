"""The tables of the docs are those of the results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

MACHINE = {"cpu": "Some CPU", "threads": 1, "load_1min": 2.4, "torch": "2.13.0", "commit": "abc"}


def ratio(median: float) -> dict[str, float]:
    return {"median": median, "p10": median - 0.1, "p90": median + 0.1, "min": median - 0.2}


def layer_row(date: str, times: dict[str, float], **changes: Any) -> dict[str, Any]:
    row = {"timed": "forward", "TxDxO": "64x32x48", "ExRxK": "8x16x2", "dtype": "float32", "date": f"{date}T00:00:00"}
    times_base = {name: ratio(time) for name, time in times.items()}
    return {**row, "base_microseconds": ratio(1200.0), "times_base": times_base, **MACHINE, **changes}


def page_of(folder: Path, name: str, *rows: dict[str, Any]) -> str:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = f"before 1.23\n<!-- table: {name} -->\nold\n<!-- /table -->\nafter"
    made = tables.render(page, folder)
    assert made.startswith(f"before 1.23\n<!-- table: {name} -->\n")
    assert made.endswith("<!-- /table -->\nafter")
    assert tables.render(made, folder) == made
    return made


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_a_page_is_current(path: Path) -> None:
    page = path.read_text()
    assert tables.render(page, tables.RESULTS) == page, "run `python -m benchmarks.tables`"


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_a_page_has_all_its_tables(path: Path) -> None:
    assert {match[2] for match in tables.MARKED.finditer(path.read_text())} == tables.PAGES[path].keys()


def test_every_result_has_its_place() -> None:
    assert {path.stem for path in tables.RESULTS.glob("*.jsonl")} <= tables.TABLES.keys()


def test_the_newest_row_of_a_configuration_counts(tmp_path: Path) -> None:
    new, old = layer_row("2026-02-02", {"dense": 1.5, "loop": 3.0}), layer_row("2026-01-01", {"dense": 9.0})
    other = layer_row("2026-01-01", {"dense": 1.25}, TxDxO="8x32x48")
    made = page_of(tmp_path, "layer", new, old, other)
    assert "| `dense` | 1.50 (1.40 to 1.60) | 1.25 (1.15 to 1.35) |" in made
    assert "| `loop` | 3.00 (2.90 to 3.10) |  |" in made
    assert "9.00" not in made
    assert "| `base, ms` | 1.2 | 1.2 |" in made


def test_what_loses_is_shown_too(tmp_path: Path) -> None:
    assert "| `dense` | 7.00 (6.90 to 7.10) |" in page_of(tmp_path, "layer", layer_row("2026-01-01", {"dense": 7.0}))


def test_a_gpus_rows_are_tables_of_their_own(tmp_path: Path) -> None:
    gpu = {"device": "cuda", "gpu": "Some GPU", "cuda": "12.8", "driver": "570"}
    beside = layer_row("2026-01-01", {"dense": 2.0}, gpu="Some GPU", device="cpu")
    made = page_of(tmp_path, "layer", layer_row("2026-01-01", {"triton": 1.1}, **gpu), beside)
    assert "Some GPU, torch 2.13.0, cuda 12.8, driver 570, commit abc, 2026-01-01." in made
    assert "Some CPU, 1 thread, process time, torch 2.13.0, commit abc, 2026-01-01, load 2." in made
    assert made.count("| `triton` |") == made.count("| `dense` |") == 1
    assert "float32, Some GPU, over the base:" in made
    assert "float32, Some CPU, over the base:" in made


def test_peaks_over_lora(tmp_path: Path) -> None:
    sizes = {"hidden": 64, "inner": 96, "layers": 2, "tokens": 8, "dtype": "bfloat16", "dropout": 0.0}
    row = {"preset": "mola", **sizes, "checkpointing": False, "date": "2026-01-01T00:00:00", **MACHINE}
    row |= {
        "times_lora": {"lora, C": 1.0, "molex, dense": 0.9},
        "step_times_lora": {"lora, C": 1.0, "molex, dense": 0.8},
    }
    assert "| `mola` | 0.900 (0.800) |" in page_of(tmp_path, "memory", row)


def test_serving_with_adapters_over_the_base(tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden": 64, "rank": 16, "prompt": 8, "new": 4, "batch": 32, "requests": 12}
    row = {"kind": "esft", "loop": "closed", "dtype": "float32", **sizes, "date": "2026-01-01T00:00:00", **MACHINE}
    row |= {"served_over_base": {measure: ratio(1.5) for measure in ("ttft", "tpot", "whole", "cpu")}}
    row |= {"tokens_per_second": {"base": 100.0, "served": 66.6}, "step_adapters": 4.2}
    few = {**row, "adapters": 1, "step_experts": {"base": 8.0, "served": 9.25}}
    many = {**few, "adapters": 20, "served_over_base": {m: ratio(2.5) for m in row["served_over_base"]}}
    made = page_of(tmp_path, "serving_load", many, few)
    four = " | ".join(["2.50 (2.40 to 2.60)"] * 4)
    assert f"| 20 | 4.2 | 8.0 | 9.2 | {four} | 100 | 66.6 |" in made
    assert made.index("| 1 | 4.2") < made.index("| 20 | 4.2")
    assert "Some CPU, wall time, torch 2.13.0, commit abc, 2026-01-01, load 2." in made


@pytest.mark.parametrize("name", [*tables.TABLES])
def test_nothing_measured(tmp_path: Path, name: str) -> None:
    assert "Nothing measured yet." in tables.render(f"<!-- table: {name} -->\n<!-- /table -->", tmp_path)
