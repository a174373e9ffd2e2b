"""Who is on the device: least recently used, in use, pinned; and many threads at once, against what always holds."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from molex.experts import LoRA
from molex_serve.adapters.base import ExpertSwap, ExpertWeights, LowRank
from molex_serve.adapters.generations import Generations, check_limits
from molex_serve.adapters.registry import Lease
from molex_serve.errors import BadAdapter, LoadBusy, ServeError, Unavailable
from molex_serve.settings import AdapterLimits
from tests.serve.adapters.fake_device import World, adapter


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def build(names: str = "", **sizes: float) -> World:
        worlds.append(World(**sizes))  # type: ignore[arg-type]
        for name in names:
            worlds[-1].write(name, name.upper())
            worlds[-1].registry.register(name, name)
        return worlds[-1]

    yield build
    for world in worlds:
        world.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(50) as pool:
        yield pool


def touch(world: World, *names: str) -> None:
    for name in names:
        world.registry.resolve(name).release()


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def test_the_least_recently_used_leaves(make: Callable[..., World]) -> None:
    world = make("abcd", resident=3)
    touch(world, "a", "b", "c", "a", "d")
    assert world.resident() == {"A", "C", "D"}
    touch(world, "b")
    assert world.resident() == {"A", "B", "D"}
    assert world.residency.counts().evictions == 2


def test_who_is_in_use_stays(make: Callable[..., World]) -> None:
    world = make("abcd", resident=2)
    oldest = world.registry.resolve("a")
    touch(world, "b", "c", "d")
    assert world.resident() == {"A", "D"}
    oldest.release()
    touch(world, "b", "c")
    assert world.resident() == {"B", "C"}


def test_who_is_pinned_stays(make: Callable[..., World]) -> None:
    world = make("bcd", resident=2)
    world.write("a", "A")
    world.registry.load("a", "a", pin=True)
    touch(world, "b", "c", "d")
    assert world.resident() == {"A", "D"}
    world.registry.load("a", "a", pin=False)
    touch(world, "b", "c")
    assert world.resident() == {"B", "C"}


def test_levels_and_what_they_save(make: Callable[..., World]) -> None:
    """20 bytes of host memory hold two of the adapters."""
    world = make("abc", resident=1, host_bytes=20)
    touch(world, "a", "a", "b", "a")
    assert world.reads == {"a": 1, "b": 1}
    touch(world, "c", "a")  # b was used before a
    assert world.reads == {"a": 1, "b": 1, "c": 1}
    touch(world, "b")
    assert world.reads == {"a": 1, "b": 2, "c": 1}
    counts = world.residency.counts()
    assert counts.host_bytes == 20
    assert counts.hits == {"device": 1, "host": 5, "disk": 1}
    assert (counts.loads, counts.reads, counts.evictions, counts.resident, counts.failures) == (6, 4, 5, 1, 0)
    assert counts.load_seconds > 0
    levels = {listed.alias: listed.residency for listed in world.registry.listing()}
    assert levels == {"a": "host", "b": "device", "c": "disk"}


def test_what_changed_on_disk_is_not_served_silently(make: Callable[..., World]) -> None:
    world = make("ab", resident=1, host_bytes=10)
    touch(world, "a", "b")
    world.write("a", "other content")
    for _ in range(2):
        with pytest.raises(BadAdapter, match="holds generation other content, and A when it was loaded: load it again"):
            world.registry.resolve("a")
    del world.disk["a"]
    with pytest.raises(BadAdapter, match="a is missing"):
        world.registry.resolve("a")
    touch(world, "b")
    world.write("a", "other content")
    world.registry.load("a", "a", expected_generation="A")
    touch(world, "a")


def test_more_columns_than_there_are_at_once(make: Callable[..., World]) -> None:
    """The device says that its pool is full; then others leave until it is not."""
    world = make(resident=10, columns=10)
    for name, columns in {"a": 4, "b": 3, "c": 3, "d": 8}.items():
        world.write(name, name.upper(), columns=columns)
        world.registry.register(name, name)
    touch(world, "a", "b", "c")
    kept = world.registry.resolve("c")
    world.residency.wait_seconds = 0.2
    with pytest.raises(LoadBusy):
        world.registry.resolve("d")
    assert world.resident() == {"C"}
    kept.release()
    touch(world, "d")
    assert world.resident() == {"D"}


def test_a_request_waits_for_a_place(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    world = make("abc", resident=2)
    leases = [world.registry.resolve(name) for name in "ab"]
    waiting = threads.submit(world.registry.resolve, "c")
    assert soon(lambda: world.residency.counts().waiting == 1)
    time.sleep(0.1)
    assert not waiting.done()
    leases[0].release()
    assert waiting.result(5).generation == "C"
    assert world.resident() == {"B", "C"}
    assert world.residency.counts().waiting == 0


def test_and_not_for_ever(make: Callable[..., World]) -> None:
    world = make("ab", resident=1, wait_seconds=0.3)
    lease = world.registry.resolve("a")
    start = time.monotonic()
    with pytest.raises(LoadBusy, match="every place is in use") as busy:
        world.registry.resolve("b")
    assert 0.3 <= time.monotonic() - start < 3
    assert (busy.value.status, busy.value.code, busy.value.retry_after) == (429, "load_busy", 1)
    assert world.registry.listing()[0].leases == 1
    assert world.residency.counts().waiting == 0
    lease.release()
    touch(world, "b")


def test_while_a_disk_is_slow(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    """Who is there is served; who waited for too long finds it read when asking again."""
    world = make("ab", wait_seconds=0.2)
    touch(world, "a")
    world.read_seconds = 0.6
    waiting = threads.submit(world.registry.resolve, "b")
    assert soon(lambda: world.reads["b"] == 1)
    touch(world, "a")
    assert not waiting.done()
    with pytest.raises(LoadBusy, match="not read after"):
        waiting.result(5)
    assert soon(lambda: world.registry.listing()[1].residency == "host")
    touch(world, "b")
    assert world.reads["b"] == 1


def test_many_ask_and_one_reads(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    world = make("a")
    world.read_seconds = 0.1
    leases = [asked.result(5) for asked in [threads.submit(world.registry.resolve, "a") for _ in range(50)]]
    assert world.reads == {"a": 1}
    assert len(world.log) == 1
    for lease in leases:
        lease.release()
    assert world.registry.listing()[0].leases == 0


def test_all_who_waited_hear_why_not(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    world = make("ab", resident=1, host_bytes=10)
    touch(world, "a", "b")
    world.disk["a"] = OSError("disk on fire")
    world.read_seconds = 0.2
    asked = [threads.submit(world.registry.resolve, "a") for _ in range(20)]
    for one in asked:
        with pytest.raises(BadAdapter, match="disk on fire"):
            one.result(10)
    assert world.reads["a"] <= 3  # not once for each
    assert world.residency.counts().waiting == 0


def test_leases_end_on_the_engines_thread(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    """While the worker waits for the step to end, the step itself releases."""
    world = make("abc", resident=2)
    leases = [world.registry.resolve(name) for name in "ab"]
    with world.step:
        leases[0].release()
        waiting = threads.submit(world.registry.resolve, "c")
        time.sleep(0.1)
        assert not waiting.done()
        leases[1].release()
        world.registry.listing()
    assert waiting.result(5).generation == "C"


def test_nobody_starves(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    """Two adapters are in use without a gap, by requests that overlap. A third one gets its turn, and then they do."""
    world = make("abc", resident=2, wait_seconds=2.0)
    served, stop = Counter[str](), threading.Event()

    def always(name: str) -> None:
        while not stop.is_set():
            with world.registry.resolve(name):
                time.sleep(0.03)
                served[name] += 1

    busy = [threads.submit(always, name) for name in "ab" * 6]
    assert soon(lambda: min(served["a"], served["b"]) > 10)
    with world.registry.resolve("c") as lease:
        assert lease.generation == "C"
        before = served.copy()
        assert soon(lambda: served["a"] > before["a"] and served["b"] > before["b"]), "one place is enough for two"
    stop.set()
    for one in busy:
        one.result(10)
    touch(world, "a", "b", "c")
    assert not any(known.yielding for known in world.residency._generations._resident.values())


def test_nothing_is_read_for_want_of_a_place(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    """Or those who wait would push each other out of the host's memory, over and over."""
    world = make("ab", resident=1, host_bytes=10)
    touch(world, "a")
    with world.registry.resolve("b"), world.registry.resolve("b"):
        waiting = threads.submit(world.registry.resolve, "a")
        assert soon(lambda: world.residency.counts().waiting == 1)
        time.sleep(0.1)
        assert world.reads == {"a": 1, "b": 1}
    waiting.result(5).release()
    assert world.reads == {"a": 2, "b": 1}


def test_what_nobody_wants_any_more_is_not_loaded(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    world = make("abc", resident=2, host_bytes=10, wait_seconds=0.2)
    touch(world, "a", "b", "c")
    world.write("d", "D")
    world.registry.register("d", "d")
    world.read_seconds = 0.5
    slow = threads.submit(world.registry.resolve, "d")
    assert soon(lambda: world.reads["d"] == 1)
    with pytest.raises(LoadBusy):
        world.registry.resolve("a")
    world.registry.unload("a")
    with pytest.raises(LoadBusy):
        slow.result(5)
    assert soon(lambda: "A" not in world.residency._generations)
    assert world.reads["a"] == 1


def test_a_pin_ends_yielding(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    world = make("abc", resident=2, wait_seconds=1.0)
    leases = [world.registry.resolve(name) for name in "ab"]
    waiting = threads.submit(world.registry.resolve, "c")
    known = world.residency._generations["A"]
    assert soon(lambda: known.yielding), "it has been there for longest"
    world.residency.name("A", "a", pin=True)
    assert not known.yielding
    world.registry.resolve("a").release()
    leases[1].release()
    assert waiting.result(5).generation == "C"


def test_what_is_under_way_is_not_known_twice() -> None:
    generations = Generations(AdapterLimits())
    first = generations.learn(adapter("one"), "a")
    first.job = Future()
    generations.forget(first)
    assert generations.learn(adapter("one"), "a") is first
    first.job.set_result(None)
    generations.forget(first)
    assert not generations
    second = generations.learn(adapter("one"), "a")
    generations.forget(first)
    assert generations["one"] is second
    generations.forget(second)
    assert (len(generations), generations.host_bytes) == (0, 0)


def test_closing_ends_all_waiting(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    world = make("abcd", resident=1, wait_seconds=30)
    lease = world.registry.resolve("a")
    touch_b = threads.submit(world.registry.resolve, "b")
    assert soon(lambda: world.residency.counts().waiting == 1)
    time.sleep(0.05)
    world.read_seconds = 0.3
    reading, queued = threads.submit(world.registry.resolve, "c"), threads.submit(world.registry.resolve, "d")
    time.sleep(0.1)
    world.close()
    for waiting in (touch_b, queued, reading):
        with pytest.raises(Unavailable, match="the server is stopping"):
            waiting.result(5)
    with pytest.raises(Unavailable):
        world.registry.load("new", "a")
    lease.release()
    touch(world, "a")
    world.registry.unload("a")


def test_an_engine_that_died(make: Callable[..., World], caplog: pytest.LogCaptureFixture) -> None:
    world = make("ab")
    touch(world, "a")
    alive = world.residency._worker.device.paused

    def dead() -> None:
        raise Unavailable("the engine has stopped")

    object.__setattr__(world.residency._worker.device, "paused", dead)
    with pytest.raises(Unavailable, match="the engine has stopped"):
        world.registry.resolve("b")
    touch(world, "a")
    world.registry.unload("a")
    assert "keep their places" in caplog.text
    object.__setattr__(world.residency._worker.device, "paused", alive)
    touch(world, "b")
    world.registry.unload("b")
    assert world.resident() == set(), "what could not leave does with the next"


def test_a_thousand_adapters_in_eight_places(make: Callable[..., World], threads: ThreadPoolExecutor) -> None:
    world = make(resident=8, host_bytes=200, wait_seconds=20)
    for number in range(1000):
        world.write(f"p{number}", f"g{number}")
        world.registry.register(f"a{number}", f"p{number}")

    def ask(number: int) -> None:
        with world.registry.resolve(f"a{number}") as lease:
            assert world.attached[lease.handle].generation == f"g{number}" == lease.generation

    for _ in threads.map(ask, range(1000)):
        pass
    dice = random.Random(0)
    for _ in threads.map(ask, [min(999, int(dice.paretovariate(1.0))) for _ in range(300)]):
        pass
    counts = world.residency.counts()
    assert world.most_resident == counts.resident == 8
    assert counts.host_bytes <= 200
    assert sum(listed.residency == "disk" for listed in world.registry.listing()) >= 1000 - 28
    assert counts.hits["device"] > 50


def low_rank(rank: int) -> LowRank:
    factors = {"linear": LoRA(torch.zeros(rank, 4), torch.zeros(4, rank), 1.0)}
    return LowRank(kind="lora", generation="x", num_bytes=8, source="law", factors=factors)


def swap(num_experts: int) -> ExpertSwap:
    weights = ExpertWeights(torch.zeros(2, 2), torch.zeros(2, 1))
    experts = {"first": {0: weights}, "second": dict.fromkeys(range(num_experts), weights)}
    return ExpertSwap(kind="esft", generation="x", num_bytes=8, source="law", experts=experts)


def test_limits() -> None:
    limits = AdapterLimits(rank=16, columns=12, host_bytes=100, expert_slots=3)
    check_limits(low_rank(12), limits)
    check_limits(swap(3), limits)
    for wrong, told in ((low_rank(17), "rank=17, and 16"), (low_rank(13), "columns=13, and 12"), (swap(4), "slots=4")):
        with pytest.raises(BadAdapter, match=f"law asks for .*{told}"):
            check_limits(wrong, limits)


class Chaos:
    """Threads that resolve, hold, release, load and unload at random, for some time, over files that change."""

    def __init__(self, world: World, seconds: float):
        self.world, self.end = world, time.monotonic() + seconds
        self.lock = threading.Lock()
        self.outcomes: dict[str, int] = {}

    def act(self, seed: int) -> None:
        dice, held = random.Random(seed), []
        while time.monotonic() < self.end:
            try:
                self.one(dice, held)
                self.count("ok")
            except ServeError as error:
                self.count(type(error).__name__)
        for lease in held:
            self.give(lease)

    def one(self, dice: random.Random, held: list[Lease]) -> None:
        alias, path = f"a{dice.randrange(12)}", f"p{dice.randrange(12)}"
        action = dice.random()
        if action < 0.6:
            lease = self.world.registry.resolve(alias)
            with self.lock:
                self.world.held[lease.handle] += 1
            assert self.world.attached[lease.handle].generation == lease.generation
            held.append(lease)
        elif action < 0.7:
            self.world.registry.load(alias, path, pin=dice.random() < 0.1)
        elif action < 0.75:
            self.world.registry.unload(alias)
        elif action < 0.8:
            self.world.registry.register(alias, path)
        elif action < 0.85:
            self.world.write(path, f"g{dice.randrange(30)}", binds=dice.random() < 0.9)
        time.sleep(dice.random() * 0.002)
        while held and (len(held) > 1 or dice.random() < 0.8):
            self.give(held.pop(dice.randrange(len(held))))

    def give(self, lease: Lease) -> None:
        assert self.world.attached[lease.handle].generation == lease.generation, "it changed while it was leased"
        with self.lock:
            self.world.held[lease.handle] -= 1
        lease.release()

    def count(self, outcome: str) -> None:
        with self.lock:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def steps(self) -> None:
        """An engine at work."""
        while time.monotonic() < self.end:
            with self.world.step:
                time.sleep(0.0005)
            time.sleep(0.0005)


def test_many_threads_at_once(make: Callable[..., World]) -> None:
    world = make(resident=5, columns=9, host_bytes=150, wait_seconds=0.5)
    for number in range(12):
        world.write(f"p{number}", f"g{number}", columns=1 + number % 3)
        world.registry.register(f"a{number}", f"p{number}")
    chaos = Chaos(world, seconds=2.0)
    with ThreadPoolExecutor(17) as pool:
        acting: list[Future[None]] = [pool.submit(chaos.act, seed) for seed in range(16)]
        acting.append(pool.submit(chaos.steps))
        for one in acting:
            one.result(20)
    assert chaos.outcomes.keys() >= {"ok", "UnknownAdapter", "LoadBusy"}
    assert chaos.outcomes["ok"] > 200, chaos.outcomes
    assert world.most_resident <= 5
    counts = world.residency.counts()
    assert (counts.waiting, counts.host_bytes <= 150) == (0, True)
    for listed in world.registry.listing():
        assert listed.leases == 0
        world.registry.unload(listed.alias)
    assert soon(lambda: not world.attached)
    counts = world.residency.counts()
    assert (counts.resident, counts.host_bytes, counts.draining, counts.waiting) == (0, 0, 0, 0)
    assert not world.residency._generations
