"""Starts processes that talk over loopback, waits for them, and shows what they said where they fail."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(HERE.parents[1]),
}


def run_ranks(script: Path, folder: Path, world_size: int, arguments: list[str], timeout: float) -> None:
    """`python script FOLDER RANK WORLD_SIZE arguments...` for each rank. Raises AssertionError where one fails."""
    ranks = []
    for rank in range(world_size):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        command = [sys.executable, str(script), str(folder), str(rank), str(world_size), *arguments]
        ranks.append(_start(command, folder / f"rank{rank}.log", environment))
    try:
        codes = [process.wait(timeout) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * world_size, f"exit codes {codes}\n{_tails(folder)}"


def run(command: list[str], folder: Path, timeout: float, **environment: str) -> str:
    """One command; returns what it printed. Raises AssertionError where it fails."""
    process = _start([sys.executable, *command], folder / "run.log", environment)
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    assert code == 0, f"exit code {code}\n{_tails(folder)}"
    return (folder / "run.log").read_text()


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT, **environment})


def _tails(folder: Path) -> str:
    logs = sorted(folder.glob("*.log"))
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
