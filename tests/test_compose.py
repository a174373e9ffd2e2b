"""Composing adapters: cells are run once, by PEFT's adapters, and the table says what they hold."""

import json
import shlex
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
from peft import PeftModel
from safetensors.torch import load_file

import molex
from molex import workbench
from molex.errors import ConfigError
from recipes import compose_adapters as recipe
from tests.io.mixtures import same

SMALL = "--skills upper,ends --adapter_steps 2 --router_steps 1 --test 4 --start_prompts 2"


def run(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compose_adapters.py", *shlex.split(flags)])
    recipe.main()


def test_every_row_runs_once_and_makes_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, f"{SMALL} --out {tmp_path}")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(recipe.ROWS)
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(cells) == len(recipe.ROWS)
    capsys.readouterr()
    run(monkeypatch, f"{SMALL} --out {tmp_path}")
    assert cells == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert "| meteora |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="choose another --out"):
        run(monkeypatch, f"{SMALL.replace('--test 4', '--test 5')} --out {tmp_path}")
    mixture = molex.load(workbench.load_base(), tmp_path / "mixtures" / "0" / "meteora")
    assert mixture.experts == ["upper", "ends"]
    folder = tmp_path / "adapters" / "0" / "upper"
    adapter = PeftModel.from_pretrained(workbench.load_base(), folder)
    assert adapter.peft_config["default"].layers_to_transform == [2, 3, 4, 5, 6, 7]
    (back, _) = mixture.export_peft(tmp_path / "back")
    given, written = (load_file(path / "adapter_model.safetensors") for path in (folder, back))
    assert same(given, written)
    record = json.loads(next(iter(cells)).read_text())
    assert record["scores"].keys() == {"upper", "ends"}


def test_the_table_has_means_over_skills_and_their_spread_over_seeds() -> None:
    text = recipe.table({"a": [{"x": 0.5, "y": 1.0}, {"x": 0.7, "y": 1.0}]}, ["x", "y"])
    assert text.splitlines()[2] == "| a | 0.60 | 1.00 | 0.800 ± 0.071 | 2 |"


def test_every_token_of_a_numbered_prompt_has_its_questions_task() -> None:
    row = {"prompt": "1. upper: ab\n2. ends: xyz\n= ", "completion": "1. AB\n2. xz"}
    tasks = recipe.token_tasks(row, [7, 3])
    texts = recipe.TOKENIZER(row["prompt"] + row["completion"] + recipe.TOKENIZER.eos_token)["input_ids"]
    assert len(tasks) == len(texts)
    assert tasks == [-1, *[7] * len("1. upper: ab\n"), *[3] * len("2. ends: xyz\n"), *[7] * len("= 1. AB\n"), *[3] * 6]


def test_the_published_table_is_that_of_its_cells() -> None:
    folder = Path("docs/composing")
    found: dict[str, dict[int, dict[str, float]]] = {row: {} for row in recipe.ROWS}
    for path in (folder / "cells").iterdir():
        record = json.loads(path.read_text())
        found[record["row"]][record["seed"]] = record["scores"]
    assert all(seeds.keys() == {0, 1, 2} for seeds in found.values())
    names = recipe.Arguments().skills.split(",")
    table = recipe.table({row: [seeds[seed] for seed in range(3)] for row, seeds in found.items()}, names)
    assert (folder / "table.md").read_text() == f"{table}\n"
    assert table in Path("docs/adapters.md").read_text()


@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_published_composite_scores_are_those_of_the_files(count: int) -> None:
    files = [Path(f"docs/composing/composite/seed-{seed}-composite-{count}.json") for seed in range(3)]
    scores = [json.loads(path.read_text()) for path in files]
    cells = [f"composite-{count}"]
    for line in ("base", "mixture", "merged"):
        values = [score["lines"][line]["correct"]["value"] for score in scores]
        cells.append(f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if line != "base" else ""))
    assert f"| {' | '.join(cells)} |" in Path("docs/composite.md").read_text()


def test_unknown_rows_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no row 'metorea'"):
        run(monkeypatch, f"{SMALL} --out {tmp_path} --rows metorea")
    assert not list(tmp_path.iterdir())
