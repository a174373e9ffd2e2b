"""The GPU check: correctness first, then the benchmarks, within nine minutes of one GPU.

    make gpu          (python -m benchmarks.gpu, in an environment that has torch for CUDA, triton, peft and pytest; and
                       what `molex[serve]` brings, or there are no tables of serving)

Kernels and backends are compared with float64 on the GPU itself, every file of tests in a process of its own, all at
once, since most of that time is compiling; where one fails nothing is timed. Then come the tables, the ones that say
most first. Each is a process of its own, is stopped at the end of its time, and appends what it has finished to
results/. Every table checks again what it times, in its own shapes. At last the docs' tables are written.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "serve"), os.environ.get("PYTHONPATH", "")])}
PROOFS = ROOT / "tests" / "kernels" / "triton" / "numerics"
MINUTES = 8.7
PROOF_SECONDS = 200.0
LEAST_SECONDS = 5.0
HALF = ("--device", "cuda", "--dtype", "bfloat16")
LARGE = ("--shapes", "8192x4096x14336,8192x4096x4096", "--experts", "8x16x2")
BLOCK = ("--hidden", "4096", "--inner", "11008", "--rank", "16")


class Table(NamedTuple):
    seconds: float
    module: str
    arguments: tuple[str, ...]


TABLES = (
    Table(60, "benchmarks.layer", (*HALF, *LARGE, "--compiled")),
    Table(80, "benchmarks.stack", (*HALF, "--seconds", "15")),
    Table(25, "benchmarks.mixture_ffn", (*HALF, *BLOCK, "--num_tokens", "4096", "--seconds", "5")),
    Table(35, "benchmarks.training_step", (*HALF, *BLOCK, "--layers", "2", "--tokens", "4096", "--seconds", "8")),
    Table(
        45,
        "benchmarks.serving_load",
        (*HALF, "--hidden", "2048", "--layers", "4", "--new", "32", "--adapters", "0,20", "--load", "0"),
    ),
    Table(25, "benchmarks.serving_mixed", (*HALF, "--hidden", "2048", "--seconds", "2")),
    Table(
        30,
        "benchmarks.memory",
        (*HALF, "--layers", "2", "--presets", "mola,mixlora,smora", "--backends", "dense,preload,triton"),
    ),
    Table(15, "benchmarks.launches", HALF),
    Table(200, "benchmarks.layer", (*HALF, "--seconds", "1")),
)


def prove(seconds: float) -> bool:
    """Whether every test of the kernels passes here in that time. Prints the end of what failed."""
    flags = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    runs = {
        path: subprocess.Popen([sys.executable, *flags, str(path)], cwd=ROOT, **pipes)
        for path in sorted(PROOFS.glob("test_*.py"))
    }
    end = time.monotonic() + seconds
    passed = bool(runs)
    for path, run in runs.items():
        try:
            said, _ = run.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            run.kill()
            said, _ = run.communicate()
            said += "\nout of time"
        passed &= run.returncode == 0
        print(f"== {path.name}: {said.strip() if run.returncode else said.strip().splitlines()[-1]}", flush=True)
    return passed


def measure(table: Table, seconds: float) -> int | None:
    """A table's exit status; None where its time was over, which leaves the rows it has written."""
    command = [table.module, *table.arguments]
    print(f"== {' '.join(command)}", flush=True)
    try:
        return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=PATHS, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print("out of time", flush=True)
        return None


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: `make test` proves the kernels in Triton's interpreter and by compiling them")
    end = time.monotonic() + 60 * MINUTES
    if not prove(PROOF_SECONDS):
        raise SystemExit("the kernels are wrong on this GPU, or the check took too long: nothing was timed")
    failed = []
    for table in TABLES:
        left = min(table.seconds, end - time.monotonic())
        if left > LEAST_SECONDS and measure(table, left) not in (0, None):
            failed.append(table.module)
    subprocess.run([sys.executable, "-m", "benchmarks.tables"], cwd=ROOT, check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
