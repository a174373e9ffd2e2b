"""A trace of requests: Poisson arrivals, adapters by a power law, prompts and answers of fixed lengths.

    adapter = ⌊N u^(1/α)⌋,  u uniform      the first of N has the share N^-α: 1/N at α = 1, nearly all near 0

as S-LoRA and ExpertWeave (arXiv 2508.17624, section 5) draw them. The same trace is replayed with every adapter's
handle or, for the base alone, with none.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean, median

from molex_serve.engine.base import Engine, Event, Request, Sampling
from molex_serve.model.step import BASE

REPLAY_SECONDS = 120.0


@dataclass(frozen=True)
class Arrival:
    """seconds: from the beginning. adapter: its place, None = the base."""

    seconds: float
    adapter: int | None
    prompt: tuple[int, ...]
    new: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of every request."""

    prompt: int
    new: int
    vocabulary: int


def poisson(number: int, rate: float, adapters: int, alpha: float, shape: Shape, seed: int) -> list[Arrival]:
    """rate: requests a second."""
    dice, now, found = Random(seed), 0.0, []
    for _ in range(number):
        now += dice.expovariate(rate)
        adapter = int(adapters * dice.random() ** (1 / alpha)) if adapters else None
        found.append(Arrival(now, adapter, _prompt(dice, shape), shape.new))
    return found


def at_once(number: int, adapters: int, shape: Shape, seed: int) -> list[Arrival]:
    """A batch in which the adapters take turns."""
    dice = Random(seed)
    return [Arrival(0.0, i % adapters if adapters else None, _prompt(dice, shape), shape.new) for i in range(number)]


def _prompt(dice: Random, shape: Shape) -> tuple[int, ...]:
    return tuple(dice.randrange(shape.vocabulary) for _ in range(shape.prompt))


@dataclass(frozen=True)
class Replayed:
    """first: seconds until a request's first token, the median. next: between its tokens, the mean. whole: until the
    last token of all."""

    first: float
    next: float
    whole: float
    tokens: list[list[int]]


class Listener:
    """When a request's tokens came."""

    def __init__(self, over: threading.Semaphore):
        self.over = over
        self.tokens: list[int] = []
        self.first = self.last = 0.0
        self.reason: str | None = None

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if event.token_ids:
            self.first, self.last = self.first or now, now
            self.tokens += event.token_ids
        if event.finish_reason is not None:
            self.reason = event.finish_reason
            self.over.release()


def replay(engine: Engine, trace: Sequence[Arrival], handles: Sequence[int], name: str) -> Replayed:
    """handles: of the adapters, by their places; none = all are the base's. name: a new one for each replay."""
    over, listeners = threading.Semaphore(0), []
    start = time.perf_counter()
    for index, arrival in enumerate(trace):
        time.sleep(max(0.0, start + arrival.seconds - time.perf_counter()))
        listeners.append(Listener(over))
        engine.submit(_request(f"{name}-{index}", arrival, handles), listeners[-1])
    for _ in listeners:
        assert over.acquire(timeout=REPLAY_SECONDS), f"{name}: a request hung"
    assert all(listener.reason == "length" for listener in listeners), [listener.reason for listener in listeners]
    pairs = [*zip(listeners, trace, strict=True)]
    return Replayed(
        median(listener.first - start - arrival.seconds for listener, arrival in pairs),
        mean((listener.last - listener.first) / max(1, arrival.new - 1) for listener, arrival in pairs),
        max(listener.last for listener in listeners) - start,
        [listener.tokens for listener in listeners],
    )


def _request(name: str, arrival: Arrival, handles: Sequence[int]) -> Request:
    handle = BASE if arrival.adapter is None or not handles else handles[arrival.adapter]
    sampling = Sampling(max_tokens=arrival.new, temperature=0, ignore_eos=True)
    generation = f"adapter {handle}" if handle else ""
    return Request(id=name, prompt_ids=arrival.prompt, sampling=sampling, handle=handle, generation=generation)
