"""Compiles what a launch would, for a GPU that is not there, and reads what came out.

`launches` stands in for the driver: kernels are called as ever, with their real arguments, and Triton specialises and
compiles them; they only are not run.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from molex.kernels.triton import tiles

PROCESSORS = {80: 108, 90: 132}  # of an A100, an H100


@dataclass(frozen=True)
class Launch:
    name: str
    grid: tuple[int, ...]
    ptx: str
    shared: int  # bytes a block
    registers: int  # a thread
    spilled: int  # bytes a thread


@dataclass
class NoGpu:
    """What Triton asks a driver before it compiles. The device's number is its capability: caches are by device."""

    capability: int
    launches: list[Launch] = field(default_factory=list)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def launches(capability: int) -> Iterator[list[Launch]]:
    """Every kernel launched inside, in order."""
    gpu, run = NoGpu(capability), JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        usage = _resources(compiled.asm["cubin"])
        spilled = usage["LOCAL"] + usage["STACK"]
        found = Launch(self.fn.__name__, grid, compiled.asm["ptx"], compiled.metadata.shared, usage["REG"], spilled)
        gpu.launches.append(found)

    processors = patch.object(tiles, "_num_processors", lambda device: PROCESSORS[capability])
    with patch.object(JITFunction, "run", compile_only), processors, patch.object(driver, "_active", gpu):
        yield gpu.launches


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        dump = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
