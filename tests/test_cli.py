"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molex.presets import presets
from tests.models import mixture_of


def run(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "molex", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": str(columns)},
    )


def test_methods_lists_every_preset_with_paper_and_equation() -> None:
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["preset"] for row in rows] == list(presets)
    for row in rows:
        assert "arXiv" in row["method"] or "CVPR" in row["method"], row
        assert "=" in row["equation"] or "Poly" in row["equation"], row


def test_methods_prints_a_table() -> None:
    result = run("methods")
    assert result.returncode == 0
    assert "mixlora" in result.stdout


def test_inspect_of_nothing_is_one_sentence_and_exit_code_1(tmp_path) -> None:
    result = run("inspect", str(tmp_path))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert str(tmp_path.name) in result.stderr.replace("\n", "")


@pytest.mark.parametrize("path", ["[/x]", "[bold]x", "[red]"])
def test_errors_are_no_markup(path: str) -> None:
    result = run("inspect", path, columns=20)
    assert result.returncode == 1
    assert result.stderr == f"error: {path} is no folder; give one written by mixture.save, or a PEFT adapter\n"


def test_narrow_tables_fold_and_never_cut(tmp_path: Path) -> None:
    mixture_of(allocation=(2, 3)).save(tmp_path)
    for result in (run("methods", columns=60), run("inspect", str(tmp_path), columns=50)):
        assert result.returncode == 0
        assert "…" not in result.stdout
    wide = run("inspect", str(tmp_path), columns=160).stdout
    assert "2 to 3" in wide
    assert "0, 1, 2" in wide


def test_demo_refuses_a_file_and_no_steps(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    result = run("demo", "--out", str(taken), columns=300)
    assert result.returncode == 1
    assert result.stderr.endswith("taken is a file; give a folder to write to\n")
    assert run("demo", "--steps", "0").returncode == 2


def test_demo_refuses_a_place_it_cannot_write_to() -> None:
    result = run("demo", "--out", "/proc/demo", columns=300)
    assert result.returncode == 1
    assert "cannot be made a folder" in result.stderr


def test_importing_molex_stays_light() -> None:
    code = "import sys, molex; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
