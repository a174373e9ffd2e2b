"""Requests on their way to a replica and answers on their way back, untouched.

The head of an answer is waited for before anything is sent: a full cluster is then a status of its own, and no stream
that breaks off.
"""

import json
from collections.abc import AsyncIterator

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from molex_serve.errors import ServeError
from molex_serve.http.problems import problem
from molex_serve.scale.exchange import Head
from molex_serve.scale.ports import Answer

EVENTS = b"text/event-stream"


async def forwarded(answer: Answer) -> Response:
    """Raises what keeps an answer from beginning."""
    try:
        head = await anext(answer)
    except BaseException:
        answer.cancel()
        raise
    assert isinstance(head, Head)
    return Forwarded(head, answer)


class Forwarded(StreamingResponse):
    """However it ends, the answer's work ends with it."""

    def __init__(self, head: Head, answer: Answer):
        super().__init__(_events(answer) if _is_stream(head) else _body(answer), head.status)
        self.raw_headers = list(head.headers)
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()


def _is_stream(head: Head) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(EVENTS) for name, value in head.headers)


async def _body(answer: Answer) -> AsyncIterator[bytes]:
    try:
        while True:
            part = await anext(answer)
            assert isinstance(part, bytes)
            yield part
    except StopAsyncIteration:
        return


async def _events(answer: Answer) -> AsyncIterator[bytes]:
    """A replica that is lost in the middle is an event too, as the engine's own errors are."""
    try:
        async for part in _body(answer):
            yield part
    except ServeError as error:
        yield f"data: {json.dumps(problem(error))}\n\ndata: [DONE]\n\n".encode()
