"""What clients see through an ingress is what they see of a single server; full, lost and unknown are told apart."""

import json
import re
import socket

import httpx
import pytest

from molex_serve.scale.ingress import alias_in
from molex_serve.settings import ServerSettings
from tests.serve.http.conftest import serving, wait_for
from tests.serve.scale.ingress_of import fronted

OPEN = ServerSettings(port=0, drain_seconds=2)
MESSAGES = [{"role": "user", "content": "hello"}]
REQUESTS: dict[str, tuple[str, str, object]] = {
    "completion": ("POST", "/v1/completions", {"model": "law", "prompt": "x", "seed": 3}),
    "stream": ("POST", "/v1/completions", {"model": "law", "prompt": "x", "stream": True, "n": 2, "seed": 1}),
    "chat": ("POST", "/v1/chat/completions", {"model": "base", "messages": MESSAGES, "logprobs": True}),
    "nobody": ("POST", "/v1/completions", {"model": "nobody", "prompt": "x"}),
    "no model": ("POST", "/v1/completions", {"prompt": "x"}),
    "wrong kind": ("POST", "/v1/completions", {"model": 3, "prompt": "x"}),
    "no json": ("POST", "/v1/completions", b"{"),
    "models": ("GET", "/v1/models", None),
    "one model": ("GET", "/v1/models/law", None),
    "nowhere": ("GET", "/v1/nowhere", None),
    "page": ("GET", "/", None),
    "page's head": ("HEAD", "/", None),
}


def told(http: httpx.Client, method: str, path: str, body: object) -> tuple[int, dict[str, str], str]:
    """Without what differs from answer to answer."""
    if isinstance(body, bytes):
        answer = http.request(method, path, content=body, headers={"Content-Type": "application/json"})
    else:
        answer = http.request(method, path, json=body)
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "server")}
    return answer.status_code, headers, re.sub(r'"(id":"(chat)?cmpl-\w+|created":\d+)', "", answer.text)


@pytest.mark.parametrize("name", REQUESTS)
def test_it_answers_as_a_single_server(name: str) -> None:
    with serving() as single, fronted(OPEN) as many:
        assert told(many.http, *REQUESTS[name]) == told(single.http, *REQUESTS[name])


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"model": "law"}, "law"),
        ({"model": "base:law"}, "law"),
        ({"adapter": "law"}, "law"),
        ({"model": "base", "adapter": "law"}, "law"),
        ({"model": "base"}, ""),
        ({"model": "nobody"}, ""),
        ({}, ""),
        ({"model": ["law"]}, ""),
    ],
)
def test_the_adapter_is_the_key(body: dict[str, object], key: str) -> None:
    with fronted(OPEN) as many:
        many.http.post("/v1/completions", json={"prompt": "x", **body})
        assert many.engines.keys == [key]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"law"', b"\xff", b'{"model": "a", "model": "law"}'])
def test_no_body_is_too_odd_for_a_key(body: bytes) -> None:
    assert alias_in(body, "base") in ("", "law")


def test_names_are_heard_of_once_and_unknown_ones_seldom() -> None:
    with fronted(OPEN) as many:
        for name in ("base", "law", "law", "law"):
            assert many.completion(model=name).status_code == 200
        assert many.directory.asked == 1
        for name in ("x1", "x2", "x3"):
            assert many.completion(model=name).status_code == 404
        assert many.directory.asked <= 2, "each unknown name asks the directory"


def test_a_silent_directory_costs_the_preference_alone() -> None:
    with fronted(OPEN) as many:
        many.directory.answers = False
        assert many.completion(model="law").status_code == 200
        assert many.engines.keys == [""]


def test_keys_are_asked_for_before_a_replica_is() -> None:
    settings = ServerSettings(port=0, drain_seconds=2, api_key="sesame", admin_key="open")
    with fronted(settings, key="wrong") as many:
        for method, path in (
            *(("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")),
            *(("GET", "/v1/adapters"), ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/law")),
            *(("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")),
        ):
            answer = many.http.request(method, path, json=None if method != "POST" else {})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert many.engines.keys == []
        many.http.headers["Authorization"] = "Bearer sesame"
        assert many.completion().status_code == 200
        assert many.http.get("/v1/adapters").status_code == 401


def test_a_large_body_reaches_no_replica() -> None:
    with fronted(ServerSettings(port=0, drain_seconds=2, body_bytes=100)) as many:
        assert many.completion(prompt="x" * 200).status_code == 413
        assert many.engines.keys == []


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_cluster_says_so_before_anything_else(stream: bool) -> None:
    with fronted(OPEN) as many:
        many.engines.parts = -1
        answer = many.completion(stream=stream)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "overloaded"


def test_a_replica_that_is_lost() -> None:
    with fronted(OPEN) as many:
        many.engines.parts = 0
        answer = many.completion(stream=True)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        many.engines.parts = 3
        *_, error, done = [line for line in many.completion(stream=True).text.split("\n\n") if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert done == "data: [DONE]"
        many.engines.parts = 1
        with pytest.raises(httpx.RemoteProtocolError):
            many.completion()


def test_a_client_that_leaves_ends_its_stream() -> None:
    text = json.dumps({"model": "law", "prompt": "x", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    with fronted(OPEN, size=1) as many:
        (back,) = many.backs
        back.steps_left = 3
        with socket.create_connection(many.address, timeout=10) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + text)
            wait_for(lambda: back.submitted)
            assert connection.recv(1000)
            assert not back.cancelled
        wait_for(lambda: len(back.cancelled) == 1)
        wait_for(lambda: many.adapters[0].released == ["law"])


def test_metrics_of_all_replicas() -> None:
    with fronted(OPEN) as many:
        answer = many.http.get("/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = [line for line in answer.text.splitlines() if not line.startswith("# HELP")]
        assert lines == [
            "# TYPE molex_steps_total untyped",
            'molex_steps_total{adapter="law",replica="r0"} 7.0',
            'molex_steps_total{adapter="law",replica="r1"} 7.0',
            "# TYPE molex_x gauge",
            'molex_x{replica="r0"} 0.0',
            'molex_x{replica="r1"} 1.0',
        ]


def test_health() -> None:
    with fronted(OPEN) as many:
        assert many.http.get("/health/ready").json() == {"status": "ready", "replicas": 2}
        many.engines.apps = []
        assert many.http.get("/health/ready").status_code == 503
        assert many.http.get("/health/live").status_code == 200
