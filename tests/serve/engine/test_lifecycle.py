"""Every request gets exactly one last event, whatever happens; and what it held is free again."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from molex_serve.engine.base import Engine, Event, Request, Sampling
from molex_serve.engine.static import StaticEngine
from molex_serve.errors import BadRequest, Overloaded, Unavailable
from molex_serve.settings import EngineSettings
from tests.serve.engine.serving import (
    CHUNKED,
    CRAMPED,
    ROOMY,
    SECONDS,
    Adapted,
    Listener,
    greedy,
    mixed,
    prompt,
    running,
    serve,
    submit,
    tokenizer,
)

MakeEngine = Callable[[Adapted, EngineSettings], Engine]


def static(adapted: Adapted, settings: EngineSettings) -> StaticEngine:
    return StaticEngine(adapted, tokenizer(), settings)


@pytest.fixture(params=[Adapted.engine, static], ids=["continuous", "static"])
def make(request: pytest.FixtureRequest) -> MakeEngine:
    return request.param


def asking(sampling: Sampling, length: int = 5) -> Request:
    return Request(id="a", prompt_ids=prompt(length), sampling=sampling)


def test_cancel_mid_stream(make: MakeEngine) -> None:
    adapted = Adapted()
    requests = [greedy("gone", 9, 1, new=50), greedy("stays", 9, 2, new=30)]
    with running(make(adapted, ROOMY)) as engine:
        gone, stays = submit(engine, requests)
        assert gone.started.wait(SECONDS)
        engine.cancel("gone")
        engine.cancel("gone")
        engine.cancel("nobody")
        assert gone.wait().reason == "cancelled"
        assert stays.wait().reason == "length"
        assert gone.tokens == adapted.generate(requests[0])[: len(gone.tokens)]
        assert len(gone.tokens) < 50
        again = serve(engine, [requests[0]])  # its name is free
        stats = engine.stats()
    assert stays.tokens == adapted.generate(requests[1])
    assert again == [adapted.generate(requests[0])]
    assert (stats.running, stats.waiting, stats.cache_free) == (0, 0, stats.cache_total)


def test_cancelled_before_it_started_is_never_computed(make: MakeEngine) -> None:
    adapted = Adapted()
    with running(make(adapted, ROOMY)) as engine:
        with engine.paused():
            (listener,) = submit(engine, [greedy("a", 9, 4)])
            engine.cancel("a")
        assert listener.wait().reason == "cancelled"
    assert not adapted.steps


def test_cancel_comes_within_a_step(make: MakeEngine) -> None:
    adapted = Adapted()
    with running(make(adapted, ROOMY)) as engine:
        (listener,) = submit(engine, [greedy("a", 5, 1, new=50)])
        assert listener.started.wait(SECONDS)
        with engine.paused():
            engine.cancel("a")
            before = len(adapted.steps)
        listener.wait()
        assert len(adapted.steps) <= before + 1


def test_ends(make: MakeEngine) -> None:
    adapted = Adapted()
    plain = asking(Sampling(max_tokens=12, temperature=0))
    tokens = adapted.generate(plain)
    stop, place = tokens[6], tokens.index(tokens[6])
    adapted.model.generation_config.eos_token_id = stop
    with running(make(adapted, ROOMY)) as engine:
        by_end = submit(engine, [plain])[0].wait()
        ignoring = submit(engine, [asking(replace(plain.sampling, ignore_eos=True))])[0].wait()
        listed = replace(plain.sampling, ignore_eos=True, stop_token_ids=(tokens[3],))
        by_list = submit(engine, [asking(listed)])[0].wait()
    assert (by_end.tokens, by_end.reason) == (tokens[: place + 1], "stop")
    assert (ignoring.tokens, ignoring.reason) == (tokens, "length")
    assert (by_list.tokens, by_list.reason) == (tokens[: tokens.index(tokens[3]) + 1], "stop")


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (asking(Sampling(max_tokens=60)), "at most 64 together"),
        (asking(Sampling(max_tokens=1), 64), "at most 64 together"),
        (asking(Sampling(max_tokens=1), 0), "no token"),
        (Request(id="a", prompt_ids=(64,), sampling=Sampling(max_tokens=1)), "0 to 63"),
        (Request(id="a", prompt_ids=(-1,), sampling=Sampling(max_tokens=1)), "0 to 63"),
        (asking(Sampling(max_tokens=1, stop_token_ids=(99,))), "stop_token_ids has token 99"),
        (asking(Sampling(max_tokens=1, logit_bias={64: 1.0})), "logit_bias has token 64"),
        (asking(Sampling(max_tokens=1, logit_bias={3: float("nan")})), "finite"),
        (asking(Sampling(max_tokens=1, json_schema="{}")), "end-of-sequence token"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(make: MakeEngine, request_: Request, match: str) -> None:
    adapted = Adapted()
    if "end-of-sequence" in match:
        adapted.model.generation_config.eos_token_id = []
    with running(make(adapted, ROOMY)) as engine:
        with pytest.raises(BadRequest, match=match):
            engine.submit(request_, Listener())
        assert serve(engine, [greedy("b", 5, 1)]) == [adapted.generate(greedy("b", 5, 1))]


def test_longest_request_that_is_let_in_is_served(make: MakeEngine) -> None:
    """To the last token of the cache, alone and beside another that must give way."""
    adapted = Adapted()
    settings = replace(CRAMPED, cache_tokens=32)
    requests = [greedy(str(i), length, i, new=32 - length) for i, length in enumerate((1, 31, 16))]
    with running(make(adapted, settings)) as engine:
        assert engine.longest == 32
        assert [serve(engine, [request])[0] for request in requests] == [adapted.generate(r) for r in requests]
        assert serve(engine, requests) == [adapted.generate(request) for request in requests]


def test_full_queue(make: MakeEngine) -> None:
    adapted = Adapted()
    with running(make(adapted, replace(ROOMY, queue=2))) as engine:
        with engine.paused():
            listeners = submit(engine, mixed(2))
            with pytest.raises(Overloaded, match="2 requests are waiting"):
                engine.submit(greedy("c", 3), Listener())
        for listener in listeners:
            listener.wait()
        serve(engine, [greedy("c", 3)])


def test_name_in_use(make: MakeEngine) -> None:
    with running(make(Adapted(), ROOMY)) as engine, engine.paused():
        submit(engine, [greedy("a", 3)])
        with pytest.raises(BadRequest, match="'a' is running"):
            engine.submit(greedy("a", 3), Listener())


def test_broken_step_ends_everything_and_says_so(make: MakeEngine) -> None:
    adapted = Adapted()
    engine = make(adapted, replace(ROOMY, step_requests=2))
    with running(engine):
        with engine.paused():
            listeners = submit(engine, mixed(4))
            adapted.handle_vectors = adapted.handle_vectors[:, :3]  # from now on no forward succeeds
        for listener in listeners:
            assert listener.wait().reason == "error"
            assert "3" in str(listener.events[-1].error)
        deadline = time.monotonic() + SECONDS
        while engine.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not engine.alive()
        with pytest.raises(Unavailable):
            engine.submit(greedy("late", 3), Listener())
        assert engine.stats().running == 0


def test_listener_that_fails_takes_nobody_with_it(make: MakeEngine) -> None:
    adapted = Adapted()
    calls = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("the loop is closed")

    with running(make(adapted, ROOMY)) as engine:
        engine.submit(greedy("broken", 5, 1, new=30), broken)
        assert serve(engine, [greedy("b", 9, 2)]) == [adapted.generate(greedy("b", 9, 2))]
        serve(engine, [greedy("c", 9, 2)])
        assert engine.stats().running == 0
    assert len(calls) == 1


def test_nothing_runs_while_paused(make: MakeEngine) -> None:
    adapted = Adapted()
    with running(make(adapted, ROOMY)) as engine:
        (listener,) = submit(engine, [greedy("a", 5, 1, new=50)])
        assert listener.started.wait(SECONDS)
        with engine.paused():
            before = len(adapted.steps)
            scores = engine.score(prompt(5), 2, None, 0)  # the same caller may
            time.sleep(0.05)
            assert len(adapted.steps) == before + 1
        assert listener.wait().tokens == adapted.generate(greedy("a", 5, 1, new=50))
    assert len(scores) == 4


def test_one_caller_pauses_at_a_time(make: MakeEngine) -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def pause() -> None:
        for _ in range(5):
            with engine.paused():
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                with lock:
                    inside[0] -= 1

    with running(make(Adapted(), ROOMY)) as engine:
        (listener,) = submit(engine, [greedy("a", 5, 1, new=50)])
        threads = [threading.Thread(target=pause) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        listener.wait()
    assert most == [1]


def test_pauses_before_it_starts_and_after_it_ended(make: MakeEngine) -> None:
    engine = make(Adapted(), ROOMY)
    with pytest.raises(Unavailable, match="not started"):
        engine.submit(greedy("a", 3), Listener())
    with engine.paused():
        pass
    assert not engine.alive()
    engine.start()
    assert engine.alive()
    engine.stop(0)
    with engine.paused():
        pass
    assert not engine.alive()


def test_stop_lets_requests_finish(make: MakeEngine) -> None:
    adapted = Adapted()
    engine = make(adapted, CHUNKED)
    engine.start()
    listeners = submit(engine, mixed(5))
    engine.stop(SECONDS)
    assert [listener.tokens for listener in listeners] == [adapted.generate(request) for request in mixed(5)]
    with pytest.raises(Unavailable, match="stop"):
        engine.submit(greedy("late", 3), Listener())


def test_stop_cancels_what_does_not_finish_in_time(make: MakeEngine) -> None:
    engine = make(Adapted(), replace(ROOMY, step_requests=2))
    engine.start()
    listeners = submit(engine, [greedy(str(i), 5, i, new=59) for i in range(6)])
    assert listeners[0].started.wait(SECONDS)
    engine.stop(0)
    assert [listener.reason for listener in listeners].count("cancelled") >= 4
    assert all(listener.over.is_set() for listener in listeners)
