"""Every command of docs/merging.md, one after the other, in the folder that its first block makes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from molex.cli import app
from molex.merging import rules
from recipes import merge_checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "merging.md").read_text()


def test_commands_run_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.S)[0], {})
    commands = re.findall(r"^molex (merge .*)$", PAGE, re.M)
    assert len(commands) == 7
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, f"{command}: {result.exception}"
    assert {path.name for path in (tmp_path / "again").iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "molex_merge.yaml",
    }
    assert (tmp_path / "dense" / "tokenizer.json").is_file()


def test_every_rule_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", PAGE, re.M)
    assert sorted(name for name, _ in rows) == sorted(rules)
    for name, weight in rows:
        assert rules[name]().default_weights(4) == ((1 / 4,) * 4 if weight == "1/n" else (1.0,) * 4)
    for name, settings in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|[^|]*\|$", PAGE, re.M):
        assert set(re.findall(r"`(\w+)`", settings)) == set(vars(rules[name]()))


def test_recipe_trains_merges_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--train_steps", "1", "--test_rows", "2", "--soup_steps", "1", "--weights", "0.5", "1.0"]
    merge_checkpoint.main(["--skills", "upper", "sort", "--rules", "cat", "--out", str(tmp_path), *short])
    told = capsys.readouterr().out
    assert all(name in told for name in ("base", "upper alone", "sort alone", "cat", "soup"))
    named = [f"{skill}={tmp_path / skill / '0'}" for skill in ("upper", "sort")]
    merge_checkpoint.main(["--adapters", *named, "--rules", "lego", *short])
    assert "lego" in capsys.readouterr().out
