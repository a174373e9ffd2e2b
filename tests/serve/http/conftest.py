"""A real server on a loopback port, with a fake engine behind it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
from openai import OpenAI

from molex.workbench import load_tokenizer
from molex_serve.http.app import create_app
from molex_serve.http.server import Server
from molex_serve.settings import ServerSettings
from tests.serve.http.fakes import FakeAdapters, FakeEngine


@dataclass
class Running:
    engine: FakeEngine
    adapters: FakeAdapters
    server: Server
    thread: threading.Thread
    url: str
    http: httpx.Client
    client: OpenAI

    def completion(self, **body: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "base", "prompt": "hello", **body})

    def chat(self, **body: object) -> httpx.Response:
        messages = [{"role": "user", "content": "hello"}]
        return self.http.post("/v1/chat/completions", json={"model": "base", "messages": messages, **body})


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def serving(settings: ServerSettings | None = None, key: str = "none", longest: int = 512) -> Iterator[Running]:
    engine, adapters = FakeEngine(longest), FakeAdapters()
    settings = settings or ServerSettings(port=0, drain_seconds=2)
    server = Server(create_app(engine, adapters, load_tokenizer(), settings), settings, log_level="critical")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive())
    url = "http://{}:{}".format(*server.address)
    headers = {"Authorization": f"Bearer {key}"}
    try:
        with (
            httpx.Client(base_url=url, timeout=10, headers=headers) as http,
            OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=10) as client,
        ):
            yield Running(engine, adapters, server, thread, url, http, client)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture
def served(shared: Running) -> Iterator[Running]:
    """The module's server, as new; every lease that a test took must be back at its end."""
    fresh = FakeEngine()
    for name in ("say", "per_event", "steps_left", "lets_go", "queue", "fail_after", "scoring", "compiling", "longest"):
        setattr(shared.engine, name, getattr(fresh, name))
    shared.engine.cancelled, shared.engine.submitted = [], []
    shared.adapters.__dict__.update(FakeAdapters().__dict__)
    yield shared
    wait_for(lambda: sorted(shared.adapters.released) == sorted(shared.adapters.taken))
    wait_for(lambda: not shared.engine._running)
