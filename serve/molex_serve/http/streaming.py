"""Answers on their way out: whole, or as server-sent events. A client that leaves ends the work for it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from molex_serve.errors import ServeError
from molex_serve.http.generation import Generation
from molex_serve.http.problems import ClientGone, problem
from molex_serve.http.schemas import Answer, ChatChoice, CompletionChoice, Usage
from molex_serve.http.text import Piece, joined
from molex_serve.http.wording import Wording

R = TypeVar("R")
DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Answering:
    """One HTTP request's answer. model: the name it was asked by. usage: whether a stream ends in it."""

    def __init__(self, generation: Generation, wording: Wording[Any], model: str, usage: bool):
        self.generation, self.wording, self.model, self.usage = generation, wording, model, usage
        self.created = int(time.time())

    async def respond(self, request: Request, stream: bool) -> Response:
        """What goes wrong before the first event is a status of its own, also for a stream."""
        try:
            await unless_gone(request, self.generation.start())
            if stream:
                return EventStream(self)
            answer = await unless_gone(request, self.whole())
        except BaseException:
            self.generation.close()
            raise
        self.generation.close()
        return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")

    async def whole(self) -> Answer:
        pieces: dict[int, list[Piece]] = {}
        async for index, piece in self.generation.pieces():
            pieces.setdefault(index, []).append(piece)
        choices = [self.wording.whole(index, joined(pieces[index])) for index in sorted(pieces)]
        answer = self._answer(self.wording.whole_object, choices)
        answer.usage = self._usage()
        return answer

    async def chunks(self) -> AsyncIterator[Answer]:
        for index in range(len(self.generation.job.prompts) * self.generation.job.n):
            opening = self.wording.opening(index)
            if opening is not None:
                yield self._chunk([opening])
        async for index, piece in self.generation.pieces():
            yield self._chunk([self.wording.chunk(index, piece)])
        if self.usage:
            last = self._chunk([])
            last.usage = self._usage()
            yield last

    def _chunk(self, choices: list[CompletionChoice] | list[ChatChoice]) -> Answer:
        chunk = self._answer(self.wording.chunk_object, choices)
        if self.usage:
            chunk.usage = None
        return chunk

    def _answer(self, kind: Any, choices: list[CompletionChoice] | list[ChatChoice]) -> Answer:
        generation = self.generation
        return Answer(
            id=generation.job.id,
            object=kind,
            created=self.created,
            model=self.model,
            adapter_generation=generation.generation,
            choices=choices,
        )

    def _usage(self) -> Usage:
        prompt, new = self.generation.num_prompt_tokens, self.generation.new_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


class EventStream(StreamingResponse):
    """The chunks as events. However it ends, the generation ends with it."""

    def __init__(self, answering: Answering):
        super().__init__(_events(answering.chunks()), media_type="text/event-stream", headers=HEADERS)
        self.generation = answering.generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.close()


async def _events(chunks: AsyncIterator[Answer]) -> AsyncIterator[str]:
    """The status is sent by now, so an error is an event too; clients raise it."""
    try:
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
    except ServeError as error:
        yield f"data: {json.dumps(problem(error))}\n\n"
    yield DONE


async def unless_gone(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """The result of the work, unless the client leaves first: then the work is cancelled, and ClientGone raised."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client left before its answer was complete")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
