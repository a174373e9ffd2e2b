"""Bodies that are too long, damaged, foreign or made up; routes that are not there; and what is counted of them."""

import json
import random
from collections.abc import Iterator

import httpx
import pytest

from molex_serve.settings import ServerSettings
from tests.serve.http.conftest import Running, serving

JSON = {"Content-Type": "application/json"}
DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b'{"model": "base", "prompt": "\\ud800"}',
    b'{"model": "base", "prompt": "x", "temperature": NaN}',
    b'{"model": "base", "prompt": "x", "temperature": 1e999}',
    b"[" * 100_000,
    b'{"model": "base", "prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    b'{"model": "base", "prompt": "x", "max_tokens": ' + b"9" * 5_000 + b"}",
    b'{"model": "base"}',
    b'{"prompt": {"$ref": "x"}, "model": "base"}',
]


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with serving(ServerSettings(port=0, body_bytes=1000, drain_seconds=1)) as running:
        yield running


@pytest.mark.parametrize("body", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/adapters", "/v1/load_lora_adapter"])
def test_damaged_bodies_are_400_and_say_so(served: Running, path: str, body: bytes) -> None:
    answer = served.http.post(path, content=body, headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500
    assert not served.engine.submitted


def test_bodies_that_are_cut_and_changed_never_break_the_server(served: Running) -> None:
    whole = json.dumps(
        {"model": "law", "prompt": "Grüße", "messages": [{"role": "user", "content": "x"}], "n": 2, "stop": ["a"]}
        | {"logprobs": None, "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"1": 2}}
    ).encode()
    rng = random.Random(3)
    for _ in range(100):
        body = bytearray(whole[: rng.randint(1, len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randint(0, 3)):
            body[rng.randrange(len(body))] = rng.choice(b'{}[]",:0e-n\\\xff\x00')
        path = rng.choice(("/v1/completions", "/v1/chat/completions"))
        answer = served.http.post(path, content=bytes(body), headers=JSON)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
    assert served.completion().status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_content_types_are_415(served: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = served.http.post("/v1/completions", content=b'{"model": "base", "prompt": "x"}', headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    fine = {"Content-Type": "application/JSON; charset=utf-8"}
    assert served.http.post("/v1/completions", content=b'{"model": "base", "prompt": "x"}', headers=fine).is_success


def test_long_bodies_are_413_whether_announced_or_not(small: Running) -> None:
    body = json.dumps({"model": "base", "prompt": "x" * 2000}).encode()
    announced = small.http.post("/v1/completions", content=body, headers=JSON)
    in_parts = small.http.post("/v1/completions", content=iter([body[:900], body[900:]]), headers=JSON)
    for answer in (announced, in_parts):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    exact = json.dumps({"model": "base", "prompt": "x"}).encode()
    assert small.http.post("/v1/completions", content=exact.ljust(1000), headers=JSON).status_code == 200
    assert small.http.post("/v1/completions", content=exact.ljust(1001), headers=JSON).status_code == 413


def test_a_body_without_end_is_refused_while_it_comes(small: Running) -> None:
    """The response is there before the client has sent all."""
    sent = []

    def endless() -> Iterator[bytes]:
        for part in range(200):
            sent.append(part)
            yield b"x" * 100_000

    try:
        answer = small.http.post("/v1/completions", content=endless(), headers=JSON)
        assert answer.status_code == 413
    except httpx.WriteError:  # the connection may be closed under a client that goes on
        assert len(sent) < 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/health/live", 405),
        ("DELETE", "/v1/adapters/", 404),
    ],
)
def test_wrong_routes_have_errors_of_the_same_shape(served: Running, method: str, path: str, status: int) -> None:
    answer = served.http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_fault_of_our_own_is_500_without_its_details(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.adapters, "listing", broken)
    answer = served.http.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text


def test_metrics_say_who_waited_for_what(served: Running) -> None:
    assert served.completion(model="law", max_tokens=5).status_code == 200
    assert served.completion(stream=True).status_code == 200
    assert served.http.get("/v1/made-up-by-a-client").status_code == 404
    text = served.http.get("/metrics").text
    for line in (
        'molex_time_to_first_token_seconds_count{adapter="law"}',
        'molex_time_per_output_token_seconds_count{adapter="law"}',
        'molex_queue_seconds_count{adapter="law"}',
        'molex_adapter_wait_seconds_count{adapter="base"}',
        'molex_responses_total{route="/v1/completions",status="200"}',
        'molex_responses_total{route="none",status="404"}',
        'molex_new_tokens_total{adapter="law"}',
        'molex_prompt_tokens_total{adapter="law"}',
        'molex_adapter_bytes{adapter="law",kind="lora",pinned="false",residency="device"} 1000.0',
        "molex_engine_alive 1.0",
        "molex_steps_total 7.0",
        "molex_prefix_hit_tokens_total 5.0",
        "molex_cache_tokens_free 100.0",
        "molex_step_adapters 2.0",
    ):
        assert line in text, line
    assert "made-up" not in text


def test_an_adapter_that_is_gone_leaves_no_series(served: Running) -> None:
    served.completion(model="law")
    served.http.post("/v1/unload_lora_adapter", json={"lora_name": "law"})
    assert 'adapter="law"' not in served.http.get("/metrics").text
