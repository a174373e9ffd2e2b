"""The whole soak: contents, what they answer alone, a server, its clients, and what is left when they are gone."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.soak.asking import BASE, Asking, ask_stream
from benchmarks.soak.contents import NAMES, TASK, Content, damaged, write_contents
from benchmarks.soak.knowledge import Answers, Knowledge
from benchmarks.soak.questions import Question, answers, questions
from benchmarks.soak.server import ALIASES, DRAIN_SECONDS, at_first
from benchmarks.soak.traffic import Administrator, Client
from benchmarks.soak.watch import Watcher, empty, figures, idle, more_files, open_files, settled
from molex.workbench import load_base

STARTING_SECONDS = 120.0
CLOSING_SECONDS = 15.0  # beyond the drain, for the process to be gone
REPORTED = ("adapter_loads", "adapter_reads", "adapter_evictions", "prefix_hit_tokens", "steps")
SHOWN = 10  # faults
PAUSES = (0.2, 0.8)  # seconds between what an administrator does, of each on average
STREAMS, LONG = 4, 200  # that run when the server is told to stop


class SoakFailed(AssertionError):
    """Something was wrong: the first lines say what."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """growth: of the resident memory from the end of the warm-up to the end; a share, as warm_up is of the time."""

    seconds: float
    seed: int
    clients: int = 12
    questions: int = 16
    contents: tuple[str, ...] = NAMES
    warm_up: float = 1 / 3
    growth: float = 0.02


@dataclass(frozen=True)
class Prepared:
    """Adapters on disk below root, and every one's answers."""

    root: Path
    contents: dict[str, Content]
    answers: dict[str, Answers]

    def knowledge(self) -> Knowledge:
        """Of a server that starts with these."""
        generations = {content.generation_in(content.folder): content for content in self.contents.values()}
        known = Knowledge(self.answers, generations)
        of_name = {content.name: generation for generation, content in generations.items()}
        for alias, name in at_first([*self.contents]).items():
            known.names.becomes(alias, of_name[name])
        return known


def prepare(root: Path, plan: Plan) -> Prepared:
    """Raises SoakFailed where the adapters could not be told apart."""
    contents = write_contents(root, plan.contents)
    damaged(root)
    asked = questions(plan.questions, plan.seed)
    found = {name: answers(content.alone(), asked) for name, content in contents.items()}
    found[BASE] = answers(load_base().eval(), asked)
    prepared = Prepared(root, contents, found)
    certain = prepared.knowledge().questions
    if 2 * len(certain) < plan.questions:
        raise SoakFailed(f"only {len(certain)} of {plan.questions} questions have answers that are certain")
    for one, other in combinations(found, 2):
        differ = sum(found[one][question] != found[other][question] for question in certain)
        if 2 * differ < len(certain):
            raise SoakFailed(f"{one} and {other} say the same to most questions: nobody would notice a mix-up")
    return prepared


@contextmanager
def server(prepared: Prepared) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process, and where it listens. It does not outlive this."""
    command = [sys.executable, "-m", "benchmarks.soak.server", str(prepared.root), *prepared.contents]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise SoakFailed("the server did not start")
            yield process, url
        finally:
            process.kill()


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None))


async def traffic(url: str, known: Knowledge, prepared: Prepared, plan: Plan, pid: int) -> Watcher:
    """Until the time is over or something is wrong, which is in known.faults then."""
    until = time.monotonic() + plan.seconds
    contents, locks = [*prepared.contents.values()], {alias: asyncio.Lock() for alias in ALIASES}
    async with client_of(url) as http:
        watcher = Watcher(http, known, pid)
        clients = [Client(http, known, f"{plan.seed} client {number}") for number in range(plan.clients)]
        administrators = [
            Administrator(http, known, contents, prepared.root, locks, f"seed{plan.seed}-admin{number}", pause)
            for number, pause in enumerate(PAUSES)
        ]
        await asyncio.gather(*(each.run(until) for each in (watcher, *clients, *administrators)))
    return watcher


async def leftovers(url: str, known: Knowledge) -> None:
    """Of requests, then of adapters, when all are unloaded."""
    async with client_of(url) as http:
        for broken in await settled(http, idle):
            known.fault(f"after the last request, not so: {broken}")
        listed = (await http.get("/v1/adapters")).json()["data"]
        for adapter in listed:
            response = await http.delete(f"/v1/adapters/{adapter['alias']}")
            known.expect("unloading everything", response.status_code, 200)
        for broken in await settled(http, empty):
            known.fault(f"after all was unloaded, not so: {broken}")


async def stopped(process: subprocess.Popen[str], url: str, known: Knowledge) -> float:
    """Told to stop under load, the server finishes what runs, refuses what comes, and is gone in time."""
    question = Question("count: one two three\n= ")
    asking = Asking(alias=BASE, question=question, num_tokens=LONG, n=1, task=TASK, ends=False)
    async with client_of(url) as http:
        running = [asyncio.ensure_future(ask_stream(http, asking)) for _ in range(STREAMS)]
        while (await figures(http))["requests_running"] < STREAMS:
            await asyncio.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        known.expect("a request to a stopping server", await _status(http), 503, 0)
        for found in await asyncio.gather(*running):
            if found.error or found.choices[0].finish != "length":
                known.fault(f"a stream did not finish when the server stopped: {found}")
    try:
        process.wait(DRAIN_SECONDS + CLOSING_SECONDS)
    except subprocess.TimeoutExpired:
        known.fault("the server did not stop")
    return time.monotonic() - start


async def _status(http: httpx.AsyncClient) -> int:
    """0 where nobody listens any more."""
    try:
        return (await http.post("/v1/completions", json={"model": BASE, "prompt": "x"})).status_code
    except httpx.TransportError:
        return 0


async def soak(prepared: Prepared, plan: Plan) -> dict[str, float]:
    """The summary. Raises SoakFailed."""
    known = prepared.knowledge()
    with server(prepared) as (process, url):
        files = open_files(process.pid)
        watcher = await traffic(url, known, prepared, plan, process.pid)
        raise_faults(known)
        async with client_of(url) as http:
            found = await figures(http)
        before, after = watcher.size(plan.warm_up, plan.warm_up + 1 / 6), watcher.size(5 / 6, 1.0)
        if after > (1 + plan.growth) * before:
            known.fault(f"the server grew from {before / 2**20:.1f} to {after / 2**20:.1f} MiB")
        await leftovers(url, known)
        for name in await more_files(process.pid, files):
            known.fault(f"the server has {name} open, and had not at the beginning")
        seconds = await stopped(process, url, known)
    raise_faults(known)
    counts = {name: float(number) for name, number in sorted(known.counts.items())}
    server_figures = {name: found[f"{name}_total"] for name in REPORTED}
    sizes = {"MiB after the warm-up": round(before / 2**20, 1), "MiB at the end": round(after / 2**20, 1)}
    return counts | server_figures | sizes | {"seconds to stop": round(seconds, 1)}


def raise_faults(known: Knowledge) -> None:
    if known.faults:
        raise SoakFailed("\n".join(known.faults[:SHOWN]))


def run(plan: Plan) -> dict[str, float]:
    with TemporaryDirectory() as root:
        return asyncio.run(soak(prepare(Path(root), plan), plan))
