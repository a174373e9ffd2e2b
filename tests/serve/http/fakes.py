"""An engine and adapters that do nothing but what the HTTP face relies on: fixed answers, one token a step, in a thread
of its own; leases that are counted."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from molex.workbench.tokenizer import EOS
from molex_serve.engine.base import Deliver, Engine, EngineStats, Event, ExpertShare, Request, TokenLogprob
from molex_serve.errors import BadAdapter, Conflict, LoadBusy, Overloaded, UnknownAdapter
from molex_serve.http.ports import Residency


def spoken(request: Request) -> bytes:
    """What the fake model says: who it is, what it was asked, and by which seed."""
    question = bytes(token for token in request.prompt_ids if token < 256)
    seed = b"" if request.sampling.seed is None else f"#{request.sampling.seed}".encode()
    return b"[" + (request.generation or "base").encode() + b"]" + question + seed


@dataclass
class Running:
    request: Request
    deliver: Deliver
    script: list[int]
    said: int = 0
    cancelled: bool = False


class FakeEngine(Engine):
    """say: the answer's bytes. per_event: tokens that come at once. steps_left: after so many it waits, and only lets
    cancelled requests go, where lets_go. queue: how many requests it takes. scoring, compiling: cleared,
    scores and submissions wait for them."""

    def __init__(self, longest: int = 512):
        self.longest = longest
        self.say: Callable[[Request], bytes] = spoken
        self.per_event = 1
        self.steps_left = math.inf
        self.lets_go = True
        self.queue = 64
        self.fail_after: int | None = None
        self.cancelled: list[str] = []
        self.submitted: list[Request] = []
        self.stopped = 0
        self.scoring, self.compiling = threading.Event(), threading.Event()
        self.scoring.set()
        self.compiling.set()
        self._running: dict[str, Running] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        self.stopped += 1
        deadline = time.monotonic() + drain_seconds
        while self._running and time.monotonic() < deadline:
            time.sleep(0.01)
        self._end.set()
        self._wake.set()
        self._thread.join(5)

    def alive(self) -> bool:
        return self._thread.is_alive()

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._lock:
            yield

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=0,
            cache_free=100,
            cache_total=128,
            steps=7,
            step_adapters=2,
            prefix_hits=5,
        )

    def submit(self, request: Request, deliver: Deliver) -> None:
        assert self.compiling.wait(10)
        with self._lock:
            if len(self._running) >= self.queue:
                raise Overloaded(f"{self.queue} requests wait")
            self.submitted.append(request)
            script = [*self.say(request), EOS]
            self._running[request.id] = Running(request, deliver, script)
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._running:
                self._running[request_id].cancelled = True
                self.cancelled.append(request_id)

    def score(self, prompt_ids: Sequence[int], handle: int, task: int | None, num_top: int) -> list[TokenLogprob]:
        assert self.scoring.wait(10)
        return [logprob(token, num_top) for token in prompt_ids[1:]]

    def _loop(self) -> None:
        while not self._end.is_set():
            self._wake.wait(0.5)
            self._wake.clear()
            while self._running and not self._end.is_set():
                self._step()
                time.sleep(0 if self.steps_left > 0 else 0.002)
        for running in list(self._running.values()):
            self._finish(running, Event(finish_reason="cancelled"))

    def _step(self) -> None:
        with self._lock:
            now = list(self._running.values())
        for running in now:
            if running.cancelled and self.lets_go:
                self._finish(running, Event(finish_reason="cancelled"))
            elif self.steps_left > 0:
                self._advance(running)
        self.steps_left -= 1

    def _advance(self, running: Running) -> None:
        sampling = running.request.sampling
        if self.fail_after is not None and running.said >= self.fail_after:
            return self._finish(running, Event(finish_reason="error", error="a step failed"))
        if not running.said:
            running.deliver(Event())
        stop = min(running.said + self.per_event, sampling.max_tokens, len(running.script))
        ids = tuple(running.script[running.said : stop])
        running.said = stop
        tops = tuple(logprob(token, sampling.logprobs) for token in ids) if sampling.logprobs is not None else ()
        experts = tuple(ExpertShare("law", 0.75) if running.request.handle else None for _ in ids)
        event = Event(ids, tops, experts)
        if stop == len(running.script):
            return self._finish(running, replace(event, finish_reason="stop"))
        if stop == sampling.max_tokens:
            return self._finish(running, replace(event, finish_reason="length"))
        running.deliver(event)

    def _finish(self, running: Running, event: Event) -> None:
        with self._lock:
            del self._running[running.request.id]
        running.deliver(event)


def logprob(token: int, num_top: int) -> TokenLogprob:
    """Of a token and its alternatives, the next ones, each half as likely as the one before."""
    return TokenLogprob(token, -0.5 - token / 1000, tuple(((token + i) % 256, -0.5 - i) for i in range(num_top)))


@dataclass
class FakeLease:
    alias: str
    generation: str
    handle: int
    released: list[str]

    def release(self) -> None:
        self.released.append(self.alias)


@dataclass(frozen=True)
class FakeListed:
    alias: str
    kind: str = "lora"
    generation: str = "aaaaaaaaaaaa"
    residency: Residency = "device"
    pinned: bool = False
    num_bytes: int = 1000


@dataclass
class FakeAdapters:
    """ready: cleared, adapters take until it is set to be there."""

    known: dict[str, FakeListed] = field(default_factory=lambda: {"law": FakeListed("law")})
    taken: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)
    busy: bool = False
    handles: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.ready.set()

    def resolve(self, name: str) -> FakeLease:
        if name not in self.known:
            raise UnknownAdapter(f"there is no adapter {name!r}")
        if self.busy:
            raise LoadBusy("every slot is in use")
        self.taken.append(name)
        assert self.ready.wait(10)
        return FakeLease(name, self.known[name].generation, next(self.handles), self.released)

    def listing(self) -> list[FakeListed]:
        return [self.known[name] for name in sorted(self.known)]

    def load(self, alias: str, path: str, expected_generation: str | None, pin: bool) -> FakeListed:
        self._check(alias, expected_generation)
        if path.endswith("bad"):
            raise BadAdapter(f"{path} is damaged")
        generation = f"{len(self.known):012x}"
        self.known[alias] = FakeListed(alias, generation=generation, pinned=pin)
        return self.known[alias]

    def unload(self, alias: str, expected_generation: str | None) -> None:
        if alias not in self.known:
            raise UnknownAdapter(f"there is no adapter {alias!r}")
        self._check(alias, expected_generation)
        del self.known[alias]

    def _check(self, alias: str, expected_generation: str | None) -> None:
        present = self.known[alias].generation if alias in self.known else ""
        if expected_generation not in (None, present):
            raise Conflict(f"{alias} has generation {present!r}, expected {expected_generation!r}")
