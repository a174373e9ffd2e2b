"""Clients that leave, engines that die, servers that are told to stop: nothing runs on, every lease comes back."""

import asyncio
import json
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from molex.workbench import load_tokenizer
from molex_serve.http import face, generation
from molex_serve.http.app import create_app
from molex_serve.settings import ServerSettings
from tests.serve.http.conftest import Running, serving, wait_for
from tests.serve.http.fakes import FakeAdapters, FakeEngine


@contextmanager
def asking(served: Running, path: str, **body: object) -> Iterator[socket.socket]:
    """A client that has sent its request, and hangs up at the end. It is gone for the server then, too."""
    text = json.dumps({"model": "law", "prompt": "x", "messages": [{"role": "user", "content": "x"}], **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    with socket.create_connection(served.server.address, timeout=10) as connection:
        connection.sendall(head.encode() + text)
        yield connection
    wait_for(lambda: served.server.face.gate.inside == 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_requests(served: Running, path: str, stream: bool) -> None:
    served.engine.steps_left = 3
    with asking(served, path, stream=stream, n=2) as connection:
        wait_for(lambda: len(served.engine.submitted) == 2)
        assert not stream or connection.recv(1000)
        assert served.adapters.released == []
    wait_for(lambda: len(served.engine.cancelled) == 2)
    wait_for(lambda: served.adapters.released == ["law"])
    metrics = served.http.get("/metrics").text
    assert 'molex_cancelled_total{adapter="law"}' in metrics
    assert stream or f'molex_responses_total{{route="{path}",status="499"}}' in metrics


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_adapter_loads_gives_it_back(served: Running, stream: bool) -> None:
    served.adapters.ready.clear()
    with asking(served, "/v1/completions", stream=stream):
        wait_for(lambda: served.adapters.taken == ["law"])
    assert served.adapters.released == []
    served.adapters.ready.set()
    wait_for(lambda: served.adapters.released == ["law"])
    assert not served.engine.submitted


def test_a_client_that_leaves_while_its_prompt_is_scored_gives_the_adapter_back_after_it(served: Running) -> None:
    served.engine.scoring.clear()
    with asking(served, "/v1/completions", echo=True, logprobs=1):
        wait_for(lambda: served.adapters.taken == ["law"])
        time.sleep(0.05)
    time.sleep(0.05)
    assert served.adapters.released == []  # it is still being used
    served.engine.scoring.set()
    wait_for(lambda: served.adapters.released == ["law"])
    assert not served.engine.submitted


def test_a_client_that_leaves_while_its_requests_are_submitted_ends_them(served: Running) -> None:
    served.engine.compiling.clear()
    served.engine.steps_left = 0
    with asking(served, "/v1/completions", n=2):
        wait_for(lambda: served.adapters.taken == ["law"])
        time.sleep(0.05)
    served.engine.compiling.set()
    wait_for(lambda: len(served.engine.cancelled) == 2)


def test_a_lease_outlives_the_response_until_the_engine_is_done(served: Running) -> None:
    """A stop string ends the answer; the handle is in use until the engine says that it is not."""
    served.engine.say = lambda request: b"a.bcd"
    served.engine.per_event, served.engine.steps_left, served.engine.lets_go = 2, 1, False
    assert served.completion(model="law", stop=".").json()["choices"][0]["text"] == "a"
    assert len(served.engine.cancelled) == 1
    time.sleep(0.05)
    assert served.adapters.released == []
    served.engine.lets_go = True
    wait_for(lambda: served.adapters.released == ["law"])


def test_others_are_answered_while_an_adapter_loads(served: Running) -> None:
    served.adapters.ready.clear()
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(served.completion, model="law")
        wait_for(lambda: served.adapters.taken)
        assert served.completion().status_code == 200
        assert served.http.get("/health/ready").status_code == 200
        assert not slow.done()
        served.adapters.ready.set()
        assert slow.result(10).status_code == 200


def test_who_waits_for_a_place_keeps_nobody_who_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who have one need a thread to go on, or they would never give it back."""
    for name in ("LEASING_THREADS", "WAITING_THREADS"):
        monkeypatch.setattr(face, name, 2)
    with serving() as served, ThreadPoolExecutor() as pool:
        served.adapters.ready.clear()
        slow = [pool.submit(served.completion, model="law") for _ in range(4)]
        wait_for(lambda: served.server.face.gate.inside == 4)
        assert served.completion().status_code == 200
        assert served.http.get("/metrics").status_code == 200
        served.adapters.ready.set()
        assert [job.result(10).status_code for job in slow] == [200] * 4


def test_many_at_once_get_their_own_answers(served: Running) -> None:
    def ask(place: int) -> str:
        name = "law" if place % 2 else "base"
        return served.completion(model=name, prompt=str(place)).json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(24)))
    assert texts == [f"[{'aaaaaaaaaaaa' if place % 2 else 'base'}]{place}" for place in range(24)]


STREAM = {"model": "law", "prompt": "x", "stream": True}


def test_a_stopping_server_finishes_streams_and_refuses_the_rest() -> None:
    with serving(ServerSettings(port=0, drain_seconds=10)) as served:
        served.engine.steps_left = 1
        with served.http.stream("POST", "/v1/completions", json=STREAM) as got:
            lines = got.iter_lines()
            next(lines)
            served.server.handle_exit(signal.SIGTERM, None)
            ready = served.http.get("/health/ready")
            assert (ready.status_code, ready.json()["error"]["code"]) == (503, "unavailable")
            assert served.http.get("/health/live").status_code == 200
            refused = served.completion()
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            time.sleep(0.3)  # longer than uvicorn takes to begin
            assert served.engine.stopped == 0
            served.engine.steps_left = math.inf
            *_, last, done = [line for line in lines if line]
        assert '"finish_reason":"stop"' in last
        assert done == "data: [DONE]"
        wait_for(lambda: not served.engine.alive())
        assert served.adapters.released == ["law"]
        wait_for(lambda: not served.thread.is_alive())
        with pytest.raises(httpx.ConnectError):
            served.http.get("/health/live")
    assert served.engine.stopped == 1


def test_what_is_not_done_in_time_ends_with_an_error() -> None:
    with serving(ServerSettings(port=0, drain_seconds=0.1)) as served:
        served.engine.steps_left = 1
        with served.http.stream("POST", "/v1/completions", json=STREAM) as got:
            lines = got.iter_lines()
            next(lines)
            served.server.should_exit = True
            *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert done == "data: [DONE]"
        wait_for(lambda: served.adapters.released == ["law"])


def test_a_dead_engine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "WATCH_SECONDS", 0.1)
    with serving() as served:
        served.engine._end.set()
        served.engine._wake.set()
        wait_for(lambda: not served.engine.alive())
        for path in ("/health/live", "/health/ready"):
            assert served.http.get(path).status_code == 503
        answer = served.completion()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")


def test_another_server_can_run_the_application() -> None:
    engine = FakeEngine()
    app = create_app(engine, FakeAdapters(), load_tokenizer(), ServerSettings(drain_seconds=0))

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            async with app.router.lifespan_context(app):
                during = [await client.post("/v1/completions", json={"model": "base", "prompt": "x"})]
            after = [await client.get(path) for path in ("/health/ready", "/v1/models")]
        return [answer.status_code for answer in during + after]

    assert asyncio.run(ask()) == [200, 503, 503]
    assert engine.stopped == 1


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())
    with serving() as served:
        assert served.completion(model="law").status_code == 200
    wait_for(lambda: not {t for t in set(threading.enumerate()) - before if t.name.startswith(("waiting", "token"))})
