"""The command line, run as a user runs it."""

import json
import subprocess
import sys

from molex.presets import presets


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "molex", *arguments], capture_output=True, text=True, timeout=120)


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


def test_importing_molex_stays_light() -> None:
    code = "import sys, molex; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
