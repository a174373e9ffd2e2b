"""An ingress on a loopback port; its replicas are applications with fake engines in the same process."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from molex.workbench import load_tokenizer
from molex_serve.errors import Unavailable
from molex_serve.http.app import create_app
from molex_serve.scale.exchange import Call, Head, exchange
from molex_serve.scale.ingress import create_ingress
from molex_serve.scale.ports import Figures, Full
from molex_serve.scale.table import Outcome, Report
from molex_serve.settings import ServerSettings
from tests.serve.http.conftest import wait_for
from tests.serve.http.fakes import FakeAdapters, FakeEngine


class FakeAnswer:
    """As Ray gives it: the replica works on, whether somebody takes its parts or not, until it is cancelled.
    parts: after so many the replica is lost, -1 = all are full."""

    def __init__(self, app: ASGIApp, call: Call, parts: float):
        self._items: asyncio.Queue[Head | bytes | Exception] = asyncio.Queue()
        self._work = asyncio.ensure_future(self._run(app, call, parts))
        self.cancelled = 0

    async def _run(self, app: ASGIApp, call: Call, parts: float) -> None:
        sent = 0
        async with aclosing(exchange(app, call)) as answer:
            async for part in answer:
                if sent >= parts:
                    self._items.put_nowait(Unavailable("the replica was lost") if parts >= 0 else Full("full"))
                    return
                self._items.put_nowait(part)
                sent += 1
        self._items.put_nowait(StopAsyncIteration())

    async def __anext__(self) -> Head | bytes:
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled += 1
        self._work.cancel()


@dataclass
class FakeEngines:
    """apps: a replica each. keys: that were asked with. parts: after so many parts an answer's replica is lost,
    -1 = all are full."""

    apps: Sequence[ASGIApp]
    keys: list[str] = field(default_factory=list)
    answers: list[FakeAnswer] = field(default_factory=list)
    parts: float = float("inf")

    def ask(self, call: Call, key: str) -> FakeAnswer:
        self.keys.append(key)
        self.answers.append(FakeAnswer(self.apps[len(self.keys) % len(self.apps)], call, self.parts))
        return self.answers[-1]

    async def reports(self, method: str, *args: object) -> Sequence[Report]:
        raise NotImplementedError

    async def figures(self) -> Sequence[Figures]:
        text = 'molex_steps_total{adapter="law"} 7.0\n# TYPE molex_x gauge\nmolex_x '
        return [Figures(f"r{place}", f"{text}{place}\n") for place in range(len(self.apps))]

    async def running(self) -> int:
        return len(self.apps)


class NoDirectory:
    """It only knows names. asked: how often."""

    def __init__(self, names: Sequence[str]):
        self.names, self.asked, self.answers = frozenset(names), 0, True

    async def load(self, alias: str, path: str, expected_generation: str | None, pin: bool) -> Outcome:
        raise NotImplementedError

    async def unload(self, alias: str, expected_generation: str | None) -> Outcome:
        raise NotImplementedError

    async def aliases(self) -> frozenset[str]:
        self.asked += 1
        if not self.answers:
            raise Unavailable("the directory does not answer")
        return self.names


@dataclass
class Fronted:
    """backs: the engines behind the replicas, adapters: what each has."""

    engines: FakeEngines
    directory: NoDirectory
    backs: list[FakeEngine]
    adapters: list[FakeAdapters]
    address: tuple[str, int]
    http: httpx.Client

    def completion(self, **body: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "base", "prompt": "hello", **body})


@contextmanager
def fronted(settings: ServerSettings, size: int = 2, key: str = "none") -> Iterator[Fronted]:
    backs, adapters = [FakeEngine() for _ in range(size)], [FakeAdapters() for _ in range(size)]
    apps = [create_app(*pair, load_tokenizer(), settings) for pair in zip(backs, adapters, strict=True)]
    engines, directory = FakeEngines(apps), NoDirectory(["law"])
    with listening(alive(create_ingress(engines, directory, settings), apps)) as address:
        url, headers = "http://{}:{}".format(*address), {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, timeout=10, headers=headers) as http:
            yield Fronted(engines, directory, backs, adapters, address, http)


def alive(ingress: FastAPI, apps: Sequence[FastAPI]) -> FastAPI:
    """It lives as long as they do."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for one in apps:
                await stack.enter_async_context(one.router.lifespan_context(one))
            yield

    ingress.router.lifespan_context = life
    return ingress


@contextmanager
def listening(app: FastAPI) -> Iterator[tuple[str, int]]:
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="critical", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive(), 30)
        yield server.servers[0].sockets[0].getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
