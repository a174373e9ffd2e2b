"""Runs numerics/ in Triton's interpreter, in processes of their own.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/numerics
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = sorted((Path(__file__).parent / "numerics").glob("test_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they are collected as they are")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no", str(path)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
