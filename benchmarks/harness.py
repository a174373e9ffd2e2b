"""Side by side in one process: interleaved timing, and a JSON line that says on what it ran."""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("triton", "transformers", "peft", "scattermoe")
MEASURED = ("molex", "serve", "benchmarks/*.py")  # what a row depends on: all that is timed, not other rows
FEWEST_ROUNDS, FEWEST_WARMUPS = 10, 3


class Prepared:
    """A step of which only the second part is timed; it takes what the first has made."""

    def __init__(self, first: Callable[[], Any], timed: Callable[[Any], object]):
        self.first, self.timed = first, timed

    def ready(self) -> Callable[[], object]:
        made = self.first()
        return lambda: self.timed(made)


Step = Callable[[], object] | Prepared


def ready(step: Step) -> Callable[[], object]:
    """What is left to time."""
    return step.ready() if isinstance(step, Prepared) else step


def rotating(sets: Sequence[Mapping[str, Step]]) -> dict[str, Step]:
    """The same steps on several sets of tensors. Each call takes the next set, whoever calls, so that nobody finds in a
    cache what was just used."""
    turn = itertools.cycle(sets)
    return {name: Prepared(lambda name=name: ready(next(turn)[name]), lambda step: step()) for name in sets[0]}


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    warmup: int = 5,
    device: str = "cpu",
    seconds: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of every step in every round; each round runs all steps, in a random order.

    On a GPU by its own events. On a CPU by the clock on the wall; with one thread by the process' own, which other
    processes do not disturb. After `seconds` of wall time no round is begun, once there are FEWEST_ROUNDS; half as
    long, and a few rounds, for the warm-up.
    """
    names, times = [*steps], {name: [] for name in steps}
    shuffle, timed = random.Random(0).shuffle, _timed_by_events if device == "cuda" else _timed_by_clock
    for kept, most, fewest, limit in ((False, warmup, FEWEST_WARMUPS, 0.5), (True, rounds, FEWEST_ROUNDS, 1.0)):
        start = time.perf_counter()
        for number in range(most):
            if seconds and number >= fewest and time.perf_counter() - start > limit * seconds:
                break
            shuffle(names)
            for name in names:
                taken = timed(ready(steps[name]))
                if kept:
                    times[name].append(taken)
    return times


def _timed_by_clock(step: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def _timed_by_events(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a step. Raises RuntimeError where something in it cannot be captured."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def in_graphs(steps: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """CUDA graphs of the steps that can be captured; of the others the reason is printed."""
    graphs: dict[str, Callable[[], object]] = {}
    for name, step in steps.items():
        try:
            graphs[name] = captured(step)
        except RuntimeError as error:
            print(f"no CUDA graph of {name}: {str(error).splitlines()[0]}", flush=True)
    return graphs


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
    changed = "+changes" if _git("status", "--porcelain", *MEASURED) else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + changed,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **_versions(),
        **(_gpu() if torch.cuda.is_available() else {}),
    }


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _gpu() -> dict[str, Any]:
    memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    found = {"gpu": torch.cuda.get_device_name(0), "gpu_gib": memory, "cuda": torch.version.cuda}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    return found


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
