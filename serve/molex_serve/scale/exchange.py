"""A request that goes through an application in the same process: what came in on another machine, what goes back."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message

logger = logging.getLogger("molex")

TRAVELS = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client")
VERSIONS = {"version": "3.0", "spec_version": "2.3"}  # as uvicorn has them: applications are told who hangs up


@dataclass(frozen=True)
class Call:
    """An HTTP request, read to its end. scope: ASGI's, what of it can travel."""

    scope: Mapping[str, Any]
    body: bytes = b""

    @classmethod
    def of(cls, request: Request, body: bytes = b"") -> "Call":
        return cls({key: request.scope[key] for key in TRAVELS if key in request.scope}, body)


@dataclass(frozen=True)
class Head:
    """Of an answer; its body follows in parts."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]


async def exchange(app: ASGIApp, call: Call) -> AsyncGenerator[Head | bytes, None]:
    """The head and then parts, as they come. Closed or cancelled before the end, it tells the application that its
    client is gone, and waits for it to end."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    unread = [call.body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    scope = {"type": "http", "asgi": VERSIONS, "server": None, "extensions": {}, **call.scope}
    running = asyncio.ensure_future(app(scope, receive, send))
    running.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            part = _part(message)
            if part:
                yield part
    finally:
        gone.set()
        await asyncio.wait({running})
        if not running.cancelled() and running.exception() is not None:
            logger.error("%s %s", scope["method"], scope["path"], exc_info=running.exception())


def _part(message: Message) -> Head | bytes:
    if message["type"] == "http.response.start":
        return Head(message["status"], tuple(message["headers"]))
    return message.get("body", b"")
