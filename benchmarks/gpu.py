"""The GPU check: correctness first, then the benchmarks, within nine minutes of one GPU.

    make gpu          (python -m benchmarks.gpu, in an environment that has torch for CUDA, triton, peft and pytest)

Kernels and backends are compared with float64 on the GPU itself; where that fails nothing is timed. Each table is a
process of its own, is stopped at the end of its time, and appends what it has finished to results/.
"""

import subprocess
import sys
import time
from collections.abc import Sequence

import torch

MINUTES = 8.5
HALF = ("--device", "cuda", "--dtype", "bfloat16")
CHECK = ("pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels/triton/numerics")
TABLES: tuple[tuple[str, ...], ...] = (
    ("benchmarks.layer", *HALF, "--shapes", "8192x4096x14336,8192x4096x4096", "--experts", "8x16x2", "--compiled"),
    ("benchmarks.stack", *HALF),
    ("benchmarks.layer", *HALF, "--rounds", "50"),
)


def run(module: Sequence[str], seconds: float) -> int | None:
    """A module's exit status; None where its time was over."""
    print(f"== {' '.join(module)}", flush=True)
    try:
        return subprocess.run([sys.executable, "-m", *module], timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: `make test` proves the kernels in Triton's interpreter and by compiling them")
    end = time.monotonic() + 60 * MINUTES
    if run(CHECK, end - time.monotonic()) != 0:
        raise SystemExit("the kernels are wrong on this GPU, or the check took too long: nothing was timed")
    failed = [
        table[0] for table in TABLES if (left := end - time.monotonic()) > 5 and run(table, left) not in (0, None)
    ]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
