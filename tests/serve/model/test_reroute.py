"""Rerouting against a loop; its kernel in Triton's interpreter (a process of its own) and compiled for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molex_serve.model.reroute import reroute

INTERPRETED = Path(__file__).parent / "interpreted" / "test_reroute_kernel.py"


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_each_token_has_its_row(index: torch.dtype) -> None:
    table = torch.tensor([[0, 1, 2, 3], [0, 7, 2, 4], [6, 1, 5, 3]], dtype=torch.int32)
    handles, ids = torch.tensor([2, 0, 1, 1]), torch.tensor([[0, 2], [3, 0], [1, 3], [2, 1]], dtype=index)
    slots, counts = reroute(table, handles, ids, 9)
    assert slots.tolist() == [[6, 5], [3, 0], [7, 4], [2, 7]]
    assert counts.tolist() == [1, 0, 1, 1, 1, 1, 1, 2, 0]
    assert slots.dtype == counts.dtype == torch.int32


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is collected as it is")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
def test_the_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", str(INTERPRETED)]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled")
@pytest.mark.parametrize("num_tokens", [1, 8192])
def test_the_kernel_compiles_for_a_gpu(num_tokens: int) -> None:
    pytest.importorskip("triton")
    from molex_serve.model.reroute_triton import fused_reroute
    from tests.kernels.triton.ahead import launches

    table, handles = torch.zeros(33, 64, dtype=torch.int32), torch.zeros(num_tokens, dtype=torch.int64)
    ids = torch.zeros(num_tokens, 6, dtype=torch.int64)
    with launches(90) as launched:
        fused_reroute(table, handles, ids, 320)
    assert [launch.name for launch in launched] == ["reroute_kernel"]
    assert launched[0].grid == (-(-num_tokens * 6 // 256),)
    assert launched[0].spilled == 0
    assert "atom" in launched[0].ptx or "red." in launched[0].ptx
