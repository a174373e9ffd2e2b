"""The soak in short, and that it finds what it is there to find: servers with a fault each."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.soak import traffic, watch
from benchmarks.soak.asking import Answered, Asking, Choice
from benchmarks.soak.contents import TASK
from benchmarks.soak.knowledge import expected
from benchmarks.soak.names import NOBODY, Names
from benchmarks.soak.run import Plan, Prepared, leftovers, prepare, soak
from benchmarks.soak.run import traffic as run_traffic
from benchmarks.soak.server import assembled, settings
from benchmarks.soak.watch import Watcher
from molex_serve.adapters.registry import Lease
from molex_serve.engine.prefix import PrefixSalt
from molex_serve.http.server import Server
from tests.serve.http.conftest import wait_for

CONTENTS = ("law", "code", "poem", "blend", "mixlora", "mtlora")
PLAN = Plan(seconds=60, seed=1, clients=8, questions=8, contents=CONTENTS, warm_up=1 / 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("contents"), PLAN)


def test_nothing_is_wrong(prepared: Prepared) -> None:
    summary = asyncio.run(soak(prepared, PLAN))
    for name in ("status 200", "left", "loads", "adapter_evictions", "prefix_hit_tokens", "nonsense"):
        assert summary[name] > 0, name


@contextmanager
def serving(prepared: Prepared) -> Iterator[str]:
    """A server in this process, whose parts a test may break."""
    assembly = assembled(prepared.root, [*prepared.contents])
    server = Server(assembly.app, settings(prepared.root), log_level="critical")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive(), 30)
    try:
        yield "http://{}:{}".format(*server.address)
    finally:
        server.force_exit = server.should_exit = True
        thread.join(30)
        assembly.close()


def faults_of(prepared: Prepared, seed: int, seconds: float = 20.0) -> list[str]:
    known = prepared.knowledge()

    async def run(url: str) -> None:
        plan = Plan(seconds=seconds, seed=seed)
        await run_traffic(url, known, prepared, plan, os.getpid())
        if not known.faults:
            await leftovers(url, known)

    with serving(prepared) as url:
        asyncio.run(run(url))
    return known.faults


def test_prefixes_of_another_adapter_are_noticed(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixSalt, "apply", lambda self, owner, tokens: [*tokens])
    found = faults_of(prepared, 2)
    assert any(" said " in fault for fault in found), found


def test_a_lease_that_is_kept_is_noticed(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Lease] = []
    release = Lease.release

    def lose_the_first(self: Lease) -> None:
        if not kept:
            kept.append(self)
        if self is not kept[0]:
            release(self)

    monkeypatch.setattr(Lease, "release", lose_the_first)
    monkeypatch.setattr(watch, "SETTLED_SECONDS", 1.0)
    found = faults_of(prepared, 3, seconds=2.0)
    assert "after all was unloaded, not so: no adapter on the device" in found, found


def test_a_request_that_hangs_is_noticed(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "REQUEST_SECONDS", 0.001)
    found = faults_of(prepared, 4)
    assert any("hung" in fault for fault in found), found


def test_sizes_are_compared_after_a_warm_up() -> None:
    watcher = Watcher(None, None, 0)  # type: ignore[arg-type]
    watcher.sizes = [(float(when), 100 + when if when < 30 else 130 + when // 30) for when in range(91)]
    assert (watcher.size(1 / 3, 1 / 2), watcher.size(0.9, 1.0)) == (131, 132.0)


def test_an_answer_of_a_generation_that_was_not_named_is_noticed(prepared: Prepared) -> None:
    known = prepared.knowledge()
    (first, law), (second, code) = [*known.contents.items()][:2]
    asking = Asking(alias="alias-0", question=known.questions[0], num_tokens=3, n=1, task=TASK)
    for generation, content in ((first, law), (second, code)):
        text, finish = expected(known.answers[content.name][asking.question][0], asking)
        found = Answered(200, generation, {0: Choice(text, finish)})
        known.check(asking, found, {first})
    assert len(known.faults) == 1
    assert f"generation {second}" in known.faults[0]


def test_changes_under_way_may_be_seen_or_not() -> None:
    names = Names()
    with names.watched("law") as seen:
        names.becomes("law", NOBODY, "new")
        assert seen == {NOBODY, "new"}
    names.becomes("law", "new")
    assert (names.now("law"), seen) == ({"new"}, {NOBODY, "new"})
