"""The house rules that a machine can check: sizes, imports, and a README that tells the truth."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for part in ("molex", "serve", "recipes") for path in sorted((ROOT / part).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_files_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300, "a file has one idea; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
            assert not untyped, f"{node.name} does not type {untyped}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"


def test_core_does_not_import_upwards() -> None:
    for path in (ROOT / "molex").rglob("*.py"):
        for line in path.read_text().splitlines():
            lazily = line.startswith(" ") and path == ROOT / "molex" / "commands" / "serve.py"
            upwards = re.match(r"\s*(from|import) (recipes|benchmarks|molex_serve)\b", line)
            assert lazily or not upwards, f"{path}: {line}"


# what may be imported, from the ground up; a folder stands for its files
FLOORS = (
    ("errors", "checks", "registry", "exact", "entropy", "architectures", "distributed", "linears", "modes"),
    ("routing", "stats"),
    ("tokens", "losses", "routers", "kernels", "allocation"),
    ("state", "experts"),
    ("layer", "config"),
    ("ffn", "gated", "library", "presets", "model_scope", "hooks", "targets"),
    ("mixture", "building"),
    ("io",),
    ("surgery", "esft"),
    ("composing", "gate_init"),
    ("merging",),
    ("training",),
    ("evaluation",),
    ("workbench",),
    ("commands",),
    ("cli",),
)


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module in names)


def test_imports_point_down() -> None:
    """At the top of a file; `io.loading` converts and `mixture.save` writes, which are the two ways round."""
    for path in (ROOT / "molex").rglob("*.py"):
        parts = path.relative_to(ROOT / "molex").with_suffix("").parts
        if parts[0] in ("__init__", "__main__") or parts == ("io", "loading"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("molex."):
                used = str(node.module).split(".")[1]
                assert floor(used) <= floor(parts[0]), f"{path.relative_to(ROOT)} imports {node.module}"


def test_functions_are_short() -> None:
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert statistics.median(lengths) < 15


def test_nothing_unsafe_or_unfinished_is_in_the_sources() -> None:
    words = r"trust_remote_code\s*=\s*True|\bpickle\b|weights_only\s*=\s*False|\bTO" + r"DO\b|\bFIX" + r"ME\b"
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not re.search(words, line), f"{path}:{number}: {line}"


def test_readme_table_lists_the_presets() -> None:
    rows = json.loads(
        subprocess.run([sys.executable, "-m", "molex", "methods", "--json"], capture_output=True, text=True).stdout
    )
    table = (ROOT / "README.md").read_text().split("<!-- methods")[1].split("<!-- /methods")[0]
    expected = [f"| `{row['preset']}` | {row['method']} | {row['scope']} | {row['experts']} |" for row in rows]
    assert [line for line in table.splitlines() if line.startswith("| `")] == expected
