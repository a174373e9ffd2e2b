"""At most so many adapters in a step, no adapter waits for ever, and nobody keeps the base waiting."""

import random
from collections import deque
from dataclasses import dataclass, replace

import pytest

from molex_serve.engine.base import Event
from molex_serve.engine.scheduler import Places
from tests.serve.engine.serving import ROOMY, Adapted, Listener, greedy, mixed, running, serve

LIMIT, PATIENCE, LONGEST, ADAPTERS = 3, 10, 6, 9


@dataclass
class Job:
    handle: int
    arrived: int
    length: int


def simulate(seed: int, patience: int = PATIENCE, favourites: tuple[int, ...] = ()) -> dict[int, list[int]]:
    """Random arrivals for 300 steps, then until all are done; how long each handle's requests waited."""
    chance = random.Random(seed)
    places, waiting, busy = Places(LIMIT, patience), deque[Job](), list[Job]()
    waits: dict[int, list[int]] = {handle: [] for handle in range(ADAPTERS + 1)}
    step = 0
    while step < 300 or waiting or busy:
        if step < 300:
            anybody = [chance.randrange(ADAPTERS + 1) for _ in range(chance.choice((0, 0, 1, 3)))]
            waiting += [Job(handle, step, chance.randint(2, LONGEST)) for handle in favourites or anybody]
            if favourites and step == 50:
                waiting.append(Job(ADAPTERS, step, 1))
        places.begin_step()
        may = places.may_start([job.handle for job in busy], [job.handle for job in waiting])
        starting = [job for job, start in zip(waiting, may, strict=True) if start]
        assert all(start for job, start in zip(waiting, may, strict=True) if job.handle == 0)
        for job in starting:
            waits[job.handle].append(step - job.arrived)
        waiting = deque(job for job, start in zip(waiting, may, strict=True) if not start)
        busy += starting
        assert len({job.handle for job in busy} - {0}) <= LIMIT
        assert busy or not waiting, "nobody runs and somebody waits"
        for job in busy:
            job.length -= 1
        busy = [job for job in busy if job.length > 0]
        step += 1
        assert step < 5000, "somebody waits for ever"
    return waits


@pytest.mark.parametrize("seed", range(10))
def test_random_arrivals(seed: int) -> None:
    waits = simulate(seed)
    assert max(waits[0]) == 0
    rounds = -(-ADAPTERS // LIMIT)  # all others may have been there before
    assert max(max(own, default=0) for own in waits.values()) <= PATIENCE + (rounds + 1) * (LONGEST + 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_rare_adapter_gets_a_place_among_busy_ones(seed: int) -> None:
    busy = tuple(range(1, LIMIT + 1))
    assert simulate(seed, favourites=busy)[ADAPTERS][0] <= PATIENCE + LONGEST + 1
    assert simulate(seed, patience=10_000, favourites=busy)[ADAPTERS][0] > 100, "they are not busy enough"


def test_the_first_to_come_gets_the_place_that_is_free() -> None:
    places = Places(2, 5)
    places.begin_step()
    assert places.may_start([1, 0], [2, 3, 0, 1, 2, 3]) == [True, False, True, True, True, False]


def test_engine_keeps_to_the_number_of_adapters() -> None:
    adapted, requests = Adapted(), mixed(16, new=6)
    with running(adapted.engine(replace(ROOMY, step_adapters=2, drain_steps=3))) as engine:
        found = serve(engine, requests)
        assert engine.stats().step_adapters <= 2
    assert max(len(step.present) for step in adapted.steps) == 2
    assert found == [adapted.generate(request) for request in requests]


def waited(patience: int) -> tuple[int, int]:
    """Steps that a third adapter waited while two others always have a next request; and that the base waited."""
    adapted, left, flow = Adapted(), [60], [0]
    engine = adapted.engine(replace(ROOMY, step_adapters=2, drain_steps=patience))

    def again(handle: int, event: Event) -> None:
        if event.finish_reason == "length" and left[0] > 0:
            left[0] -= 1
            flow[0] += 1
            engine.submit(greedy(f"{handle}.{flow[0]}", 4, handle, new=5), lambda event: again(handle, event))

    with running(engine):
        with engine.paused():
            for number in range(4):
                handle = 1 + number % 2
                request = greedy(f"first{number}", 4, handle, new=3 + number)
                engine.submit(request, lambda event, handle=handle: again(handle, event))
        third, base = Listener(), Listener()
        with engine.paused():
            arrived = len(adapted.steps)
            engine.submit(greedy("third", 4, 3, new=1), third)
            engine.submit(greedy("base", 4, 0, new=1), base)
        third.wait()
        base.wait()
    first = {
        handle: next(i for i, step in enumerate(adapted.steps) if handle in {span.handle for span in step.spans})
        for handle in (0, 3)
    }
    assert max(len(step.present) for step in adapted.steps) <= 2
    return first[3] - arrived, first[0] - arrived


def test_engine_lets_no_adapter_starve() -> None:
    third, base = waited(patience=8)
    assert third <= 8 + 6
    assert base <= 1
    assert waited(patience=10_000)[0] > 30, "the others are not busy enough"
