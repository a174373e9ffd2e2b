"""Every kernel at every tile it is launched with, compiled for Ampere and Hopper: tensor cores, memory, no spills."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from molex.kernels.triton.expand import expand_kernel, expand_tile
from molex.kernels.triton.gate_backward import gate_backward_kernel
from molex.kernels.triton.shrink import gate_planes_kernel, shrink_kernel, shrink_tile
from molex.kernels.triton.tiles import INTERPRETED, block, block_depth
from molex.kernels.triton.wgrad import wgrad_kernel, wgrad_tile
from tests.kernels.triton.ahead import Compiled, compile_for

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block can have
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [1, 32, 8192]  # decode, a few, training
COLUMNS = [8, 64, 128]

pytestmark = pytest.mark.parametrize("capability", SHARED_MEMORY)


def check(compiled: Compiled, capability: int, dtype: torch.dtype, rows: int) -> None:
    """rows: of the tile's left factor; warp-group products begin at 64."""
    assert compiled.shared <= SHARED_MEMORY[capability]
    assert compiled.local <= 16, f"{compiled.local} bytes spilled"  # ptxas gives up a word or two for occupancy
    if dtype == torch.float32:
        assert not re.search(r"\bw?g?mma\.", compiled.ptx), "float32 is to stay float32"
    elif capability >= 90 and rows >= 64:
        assert compiled.has("wgmma.mma_async")
    else:
        assert compiled.has("mma.sync")


@pytest.mark.parametrize("num_columns", COLUMNS)
@pytest.mark.parametrize("num_tokens", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["plain", "rows", "copy", "split"])
def test_shrink(
    mode: str, dtype: torch.dtype, num_tokens: int, num_columns: int, capability: int, tmp_path: Path
) -> None:
    BLOCK_T, BLOCK_C = shrink_tile(num_tokens, num_columns, dtype)
    constants: dict[str, Any] = {"HAS_ROWS": mode == "rows", "COPY": mode == "copy", "SPLIT": mode == "split"}
    constants |= {"UP": INTERPRETED, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "BLOCK_D": block_depth(dtype)}
    compiled = compile_for(shrink_kernel, capability, dtype, constants, tmp_path, num_warps=4, num_stages=4)
    check(compiled, capability, dtype, BLOCK_T)


@pytest.mark.parametrize("num_columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wgrad(dtype: torch.dtype, num_columns: int, capability: int, tmp_path: Path) -> None:
    BLOCK_C, BLOCK_N = wgrad_tile(num_columns, 4096)
    constants = {"UP": INTERPRETED, "BLOCK_T": block_depth(dtype), "BLOCK_C": BLOCK_C, "BLOCK_N": BLOCK_N}
    compiled = compile_for(wgrad_kernel, capability, dtype, constants, tmp_path, num_warps=4, num_stages=4)
    check(compiled, capability, dtype, BLOCK_C)


@pytest.mark.parametrize("num_columns", COLUMNS)
@pytest.mark.parametrize("num_tokens", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand(dtype: torch.dtype, num_tokens: int, num_columns: int, capability: int, tmp_path: Path) -> None:
    BLOCK_T, BLOCK_O = expand_tile(num_tokens, 4096, dtype)
    BLOCK_C = block(num_columns, block_depth(dtype))
    constants = {"UP": INTERPRETED, "BLOCK_T": BLOCK_T, "BLOCK_O": BLOCK_O, "BLOCK_C": BLOCK_C}
    compiled = compile_for(expand_kernel, capability, dtype, constants, tmp_path, num_warps=8, num_stages=3)
    check(compiled, capability, dtype, BLOCK_T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_small_ones_fit(dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    """They multiply in float32 or not at all."""
    for constants in ({"BLOCK_T": 32, "BLOCK_C": 64, "BLOCK_E": 16}, {"BLOCK_T": 32, "BLOCK_C": 64, "BLOCK_E": 64}):
        check(compile_for(gate_backward_kernel, capability, dtype, constants, tmp_path), capability, torch.float32, 32)
    constants = {"BLOCK_T": 16, "BLOCK_C": 64}
    check(compile_for(gate_planes_kernel, capability, dtype, constants, tmp_path), capability, torch.float32, 16)
