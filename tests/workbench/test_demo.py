"""The demo, shortened to a few steps: every preset is converted, trained, saved, reloaded and generated with."""

import json

import pytest
from rich.console import Console

from molex.presets import presets
from molex.workbench.demo import COMPARED, run_demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    run_demo(out, Console(quiet=True), steps=4)
    return out


def test_every_preset_came_back_from_disk_bit_for_bit(folder) -> None:
    record = json.loads((folder / "results.json").read_text())
    assert sorted(row["preset"] for row in record["presets"]) == sorted(presets)
    assert all(row["reloaded"] for row in record["presets"])
    assert all(len(row["losses"]) > 1 for row in record["presets"] if row["preset"] != "arrow")


def test_only_the_compared_presets_claim_scores(folder) -> None:
    record = json.loads((folder / "results.json").read_text())
    assert tuple(row["preset"] for row in record["presets"] if row["exact"]) == COMPARED


@pytest.mark.parametrize("name", ["results.txt", "losses.png", "routing.png"])
def test_it_writes_what_it_says(folder, name: str) -> None:
    assert (folder / name).stat().st_size > 500
