"""The requests in the engine behind one HTTP request: begun together, read as they come, ended together.

All of it runs on the event loop; the engine's thread only hands events over. The adapter's lease goes back once
nothing in the engine needs it: after the last event of the last request, which a client that leaves brings about.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from molex_serve.engine.base import Event, Request, Sampling, TokenLogprob
from molex_serve.errors import Unavailable
from molex_serve.http.face import Face
from molex_serve.http.ports import Lease
from molex_serve.http.problems import EngineFailed
from molex_serve.http.prompts import Prompt
from molex_serve.http.schemas import SEEDS
from molex_serve.http.text import ChoiceText, Piece, echo
from molex_serve.http.timing import Timing

R = TypeVar("R")
WATCH_SECONDS = 5.0  # how often to ask whether the engine is alive


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of the engine. sampling: None = nothing is generated, the prompts are only echoed. n: choices of
    each prompt. alias: None = the base. experts: each token's dominant expert. scored: how many alternatives of the
    prompts' own tokens, None = no scores."""

    id: str
    prompts: Sequence[Prompt]
    sampling: Sampling | None
    n: int = 1
    stops: tuple[str, ...] = ()
    alias: str | None = None
    task: int | None = None
    echo: bool = False
    experts: bool = False
    scored: int | None = None


class Generation:
    """`start`, then read `pieces`, then `close`, whatever happened. generation: the adapter's, once started."""

    def __init__(self, face: Face, job: Job):
        self.face, self.job = face, job
        self.generation: str | None = None
        self.new_tokens = 0
        self.timing = Timing(face.metrics, job.alias or face.settings.model_name)
        self._lease: Lease | None = None
        self._scores: list[list[TokenLogprob]] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._pending: set[str] = set()  # what in threads and in the engine still needs the lease
        self._stopped: set[int] = set()  # choices that ended at a stop string, before their request did
        self._submitted = False
        self._closed = False

    async def start(self) -> None:
        """Gets the adapter, scores the prompts, hands all requests to the engine. Raises what these raise."""
        job, engine = self.job, self.face.engine
        if job.alias is not None:
            await self._needed("lease", self.face.leasing(job.alias), self._got_lease)
        self.timing.ready()
        handle = 0 if self._lease is None else self._lease.handle
        for place, prompt in enumerate(job.prompts if job.scored is not None else ()):
            score = partial(engine.score, prompt.ids, handle, job.task, job.scored or 0)
            await self._needed(f"score-{place}", self.face.waiting(score), self._scores.append)
        self.timing.submitted()
        await self._submit([self._request(index, handle) for index in range(self._num_choices)])
        self._submitted = True
        self._release_if_over()

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.job.prompts)

    @property
    def _num_choices(self) -> int:
        return len(self.job.prompts) * self.job.n if self.job.sampling is not None else 0

    async def _needed(self, key: str, future: "asyncio.Future[R]", then: Callable[[R], object] | None = None) -> None:
        """Waits for a thread that needs the lease. A client that leaves stops the waiting, not the thread: what came of
        it is still taken note of."""

        def done(future: "asyncio.Future[R]") -> None:
            if not future.cancelled() and future.exception() is None and then is not None:
                then(future.result())
            if self._closed:
                self._cancel()
            self._over(key)

        self._pending.add(key)
        future.add_done_callback(done)
        await asyncio.shield(future)

    def _got_lease(self, lease: Lease) -> None:
        self._lease, self.generation = lease, lease.generation

    def _request(self, index: int, handle: int) -> Request:
        """Choice j of each prompt draws with seed + j, so that the choices differ and are the same each time."""
        job, sampling = self.job, self.job.sampling
        assert sampling is not None
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + index % job.n) % SEEDS)
        return Request(
            id=self._request_id(index),
            prompt_ids=job.prompts[index // job.n].ids,
            sampling=sampling,
            handle=handle,
            generation=self.generation or "",
            task=job.task,
            experts=job.experts,
        )

    async def _submit(self, requests: list[Request]) -> None:
        """On a thread, since a grammar may have to be compiled. One that is refused ends those before it."""
        engine, mail = self.face.engine, self.face.mail
        self._pending.update(request.id for request in requests)

        def submit() -> None:
            for index, request in enumerate(requests):
                try:
                    engine.submit(request, partial(self._deliver, index))
                except BaseException:
                    mail.put(partial(self._never_ran, requests[index:]))
                    raise

        await self._needed("submit", self.face.waiting(submit))

    def _never_ran(self, requests: list[Request]) -> None:
        for request in requests:
            self._over(request.id)

    def _request_id(self, index: int) -> str:
        return f"{self.job.id}-{index}"

    def _deliver(self, index: int, event: Event) -> None:
        """On the engine's thread."""
        self.face.mail.put(partial(self._arrived, index, event))

    def _arrived(self, index: int, event: Event) -> None:
        self.timing.arrived(index, event)
        self._events.put_nowait((index, event))
        if event.finish_reason is not None:
            self._over(self._request_id(index))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each choice's pieces in order, the choices as they come; the last of each has a finish_reason. Raises
        EngineFailed, and Unavailable where the server stops."""
        if self.job.echo:
            for index in range(len(self.job.prompts) * self.job.n):
                yield index, self._echo(index // self.job.n)
        choices = {index: self._choice(index) for index in range(self._num_choices)}
        self._watch()
        while choices:
            index, event = await self._events.get()
            if index not in choices:  # it ended at a stop string; the engine did not know yet
                continue
            _check(event)
            piece = choices[index].take(event)
            self.new_tokens += len(piece.tokens)
            if piece.finish_reason is not None:
                del choices[index]
            if piece.finish_reason is not None and event.finish_reason is None:
                self._stopped.add(index)
                self.face.engine.cancel(self._request_id(index))
            if piece.tokens or piece.finish_reason:
                yield index, piece

    def _echo(self, place: int) -> Piece:
        prompt = self.job.prompts[place]
        piece = echo(self.face.vocabulary, prompt.ids, prompt.text, self._scores[place] if self._scores else [])
        return piece if self.job.sampling is not None else replace(piece, finish_reason="length")

    def _choice(self, index: int) -> ChoiceText:
        sampling = self.job.sampling
        assert sampling is not None
        offset = len(self.job.prompts[index // self.job.n].text) if self.job.echo else 0
        return ChoiceText(self.face.vocabulary, self.job.stops, frozenset(sampling.stop_token_ids), offset)

    def _watch(self) -> None:
        """Every request gets a last event; an engine that is dead all the same leaves nobody waiting for it."""
        if self._closed:
            return
        if not self.face.engine.alive():
            for index in range(self._num_choices):
                self._arrived(index, Event(finish_reason="error", error="the engine has stopped"))
        else:
            asyncio.get_running_loop().call_later(WATCH_SECONDS, self._watch)

    def close(self) -> None:
        """Cancels what still runs. May be called at any time and more than once."""
        if not self._closed:
            self._closed = True
            self.timing.closed(self.num_prompt_tokens if self._submitted else 0, self.new_tokens, self._cancel())
        self._release_if_over()

    def _cancel(self) -> bool:
        """Whether anything was running still, other than what ended at a stop string."""
        choices = set(range(self._num_choices)) - self._stopped
        running = [self._request_id(index) for index in choices if self._request_id(index) in self._pending]
        for request_id in running:
            self.face.engine.cancel(request_id)
        return bool(running)

    def _over(self, key: str) -> None:
        self._pending.discard(key)
        self._release_if_over()

    def _release_if_over(self) -> None:
        if self._lease is not None and not self._pending and (self._submitted or self._closed):
            lease, self._lease = self._lease, None
            self.face.release(lease)


def _check(event: Event) -> None:
    if event.finish_reason == "error":
        raise EngineFailed(event.error or "the engine failed at this request")
    if event.finish_reason == "cancelled":
        raise Unavailable("the server is stopping; the answer is not complete")
