"""A request through an application without a socket: what it gets, what it gives, and that it learns who hung up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from molex_serve.scale.exchange import Call, Head, exchange

app = FastAPI()


@app.post("/echo/{name}")
async def echo(request: Request, name: str) -> dict[str, object]:
    body = await request.body()
    return {"name": name, "body": body.decode(), "query": request.url.query, "x": request.headers["x"]}


@app.get("/broken")
async def broken() -> None:
    raise ValueError("it broke")


@app.get("/parts")
async def parts() -> StreamingResponse:
    async def three() -> AsyncIterator[bytes]:
        for part in (b"a", b"", b"b"):
            yield part

    return StreamingResponse(three())


def call(method: str, path: str, body: bytes = b"") -> Call:
    path, _, query = path.partition("?")
    headers = [(b"x", b"y"), (b"content-type", b"text/plain")]
    return Call({"method": method, "path": path, "query_string": query.encode(), "headers": headers}, body)


async def all_of(asked: Call, through: ASGIApp = app) -> list[Head | bytes]:
    return [part async for part in exchange(through, asked)]


def test_there_and_back() -> None:
    head, body = asyncio.run(all_of(call("POST", "/echo/law?a=b", b"hello")))
    assert isinstance(head, Head)
    assert head.status == 200
    assert dict(head.headers) == {b"content-length": b"51", b"content-type": b"application/json"}
    assert body == b'{"name":"law","body":"hello","query":"a=b","x":"y"}'


def test_parts_come_as_they_are_made() -> None:
    _, *got = asyncio.run(all_of(call("GET", "/parts")))
    assert got == [b"a", b"b"]


def test_a_failure_is_an_answer_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    head, body = asyncio.run(all_of(call("GET", "/broken")))
    assert isinstance(head, Head)
    assert (head.status, body) == (500, b"Internal Server Error")
    assert "it broke" in caplog.text


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_who_hangs_up_is_told_and_waited_for(how: str) -> None:
    heard: list[str] = []

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (message := await receive())["type"] != "http.disconnect":
            heard.append(message["type"])
        heard.append("disconnect")
        await asyncio.sleep(0.01)
        heard.append("end")

    async def hang_up() -> None:
        async with aclosing(exchange(waiting, call("GET", "/"))) as answer:
            assert await anext(answer) == Head(200, ())
            if how == "cancelled":
                await anext(answer)

    async def main() -> None:
        work = asyncio.ensure_future(hang_up())
        await asyncio.sleep(0.01)
        if how == "cancelled":
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
        await work if how == "closed" else None
        assert heard == ["http.request", "disconnect", "end"]

    asyncio.run(asyncio.wait_for(main(), 10))
