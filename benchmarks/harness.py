"""Side by side in one process: interleaved timing, and a JSON line that says on what it ran."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 5, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every step in every round; each round runs all steps, in a random order.

    On a GPU by its own events. On a CPU by the clock on the wall; with one thread by the process' own, which other
    processes do not disturb.
    """
    names, times = [*steps], {name: [] for name in steps}
    shuffle, timed = random.Random(0).shuffle, _timed_by_events if device == "cuda" else _timed_by_clock
    for round_number in range(-warmup, rounds):
        shuffle(names)
        for name in names:
            seconds = timed(steps[name])
            if round_number >= 0:
                times[name].append(seconds)
    return times


def _timed_by_clock(step: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def _timed_by_events(step: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summary(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile and minimum, to four digits."""
    deciles = statistics.quantiles(values, n=10)
    found = {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1], "min": min(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def ratios(over: list[float], under: list[float]) -> dict[str, float]:
    """over / under, round by round: what disturbs the machine disturbs both."""
    return summary([a / b for a, b in zip(over, under, strict=True)])


def machine() -> dict[str, Any]:
    """Hardware, versions, commit; the load says how quiet the machine was."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "molex") else ""),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **(_gpu() if torch.cuda.is_available() else {}),
    }


def _gpu() -> dict[str, Any]:
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "gpu_gib": memory,
        "cuda": torch.version.cuda,
        "triton": triton,
    }


def write(table: str, row: Mapping[str, Any]) -> None:
    """Appends a row to results/<table>.jsonl and prints it."""
    line = json.dumps({**row, **machine()})
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{table}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line)


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root).stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
