"""What a server's process and its /metrics say: how large it is, and whether anything of a request is left in it."""

import asyncio
import re
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

from benchmarks.soak.knowledge import Knowledge
from benchmarks.soak.server import ENGINE, LIMITS

PAGE = 4096
SECONDS = 0.5  # between two looks
SETTLED_SECONDS = 30.0
Figures = dict[str, float]


async def figures(http: httpx.AsyncClient) -> Figures:
    """Those without labels."""
    text = (await http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^molex_(\w+) (\S+)$", text, re.M)}


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def open_files(pid: int) -> list[str]:
    """What they lead to."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(path.readlink()))
    return sorted(found)


class Watcher:
    """Looks at the server while it works: what may never be too many, and how large it is when."""

    def __init__(self, http: httpx.AsyncClient, known: Knowledge, pid: int):
        self.http, self.known, self.pid = http, known, pid
        self.sizes: list[tuple[float, int]] = []

    async def run(self, until: float) -> None:
        while time.monotonic() < until and not self.known.faults:
            self.sizes.append((time.monotonic(), resident(self.pid)))
            found = await figures(self.http)
            for name, most in BOUNDS.items():
                if found[name] > most:
                    self.known.fault(f"{name} is {found[name]}, and at most {most} are allowed")
            await asyncio.sleep(SECONDS)

    def size(self, start: float, stop: float) -> float:
        """The median of bytes from one part of the time to another, from 0 to 1."""
        first, last = self.sizes[0][0], self.sizes[-1][0]
        parts = [((when - first) / (last - first), size) for when, size in self.sizes]
        return statistics.median(size for part, size in parts if start <= part <= stop)


BOUNDS = {
    "adapters_resident": LIMITS.resident,
    "step_adapters": ENGINE.step_adapters,
    "adapter_host_bytes": LIMITS.host_bytes,
    "requests_waiting": ENGINE.queue,
}


def idle(found: Figures) -> dict[str, bool]:
    """When nobody asks for anything."""
    return {
        "no request": found["requests_running"] == found["requests_waiting"] == 0,
        "no page of the cache in use": found["cache_tokens_free"] == found["cache_tokens_total"],
        "nobody waits for an adapter": found["adapters_waiting"] == 0,
        "no adapter without a name": found["adapters_draining"] == 0,
        "the engine is alive": found["engine_alive"] == 1,
    }


def empty(found: Figures) -> dict[str, bool]:
    """When every adapter was unloaded, which takes that no lease is open."""
    return idle(found) | {
        "no adapter on the device": found["adapters_resident"] == found["low_rank_bytes"] == 0,
        "no adapter in the host's memory": found["adapter_host_bytes"] == 0,
        "all columns free": found["adapter_columns_free"] == found["adapter_columns_total"],
    }


async def settled(http: httpx.AsyncClient, rules: Callable[[Figures], dict[str, bool]]) -> list[str]:
    """The rules that are broken still, some time after the last request."""
    deadline = time.monotonic() + SETTLED_SECONDS
    while broken := [name for name, kept in rules(await figures(http)).items() if not kept]:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    return broken


async def more_files(pid: int, before: list[str]) -> list[str]:
    """Those that are open still, some time after the last connection was closed, beside as many as there were."""
    deadline = time.monotonic() + SETTLED_SECONDS
    while len(found := open_files(pid)) > len(before) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return [name for name in found if name not in before] if len(found) > len(before) else []
