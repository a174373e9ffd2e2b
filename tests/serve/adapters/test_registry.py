"""Aliases, generations and leases over a pretended device: what changes, what stays as it was, and what is refused."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from molex.errors import CheckpointError
from molex_serve.errors import BadAdapter, BadRequest, Conflict, LoadBusy, ServeError, UnknownAdapter
from molex_serve.http.ports import Adapters
from tests.serve.adapters.fake_device import World, adapter


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def build(**sizes: float) -> World:
        worlds.append(World(**sizes))  # type: ignore[arg-type]
        return worlds[-1]

    yield build
    for world in worlds:
        world.close()


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_it_is_what_http_asks_for(make: Callable[..., World]) -> None:
    adapters: Adapters = make().registry
    assert adapters.listing() == []


def test_from_disk_to_the_device(make: Callable[..., World]) -> None:
    world = make()
    world.write("a", "one", num_bytes=7)
    world.registry.register("law", "a")
    (listed,) = world.registry.listing()
    assert (listed.alias, listed.kind, listed.generation, listed.residency, listed.num_bytes) == (
        ("law", "", "", "disk", 0)
    )
    with world.registry.resolve("law") as lease:
        assert (lease.alias, lease.generation, world.attached[lease.handle].generation) == ("law", "one", "one")
        (listed,) = world.registry.listing()
        assert (listed.kind, listed.generation, listed.residency, listed.num_bytes, listed.leases) == (
            ("lora", "one", "device", 7, 1)
        )
        with world.registry.resolve("law") as second:
            assert second.handle == lease.handle
    assert world.reads == {"a": 1}
    (listed,) = world.registry.listing()
    assert (listed.residency, listed.leases) == ("device", 0)


def test_a_lease_is_released_once(make: Callable[..., World]) -> None:
    world = make()
    world.write("a", "one")
    world.registry.register("law", "a")
    first, second = world.registry.resolve("law"), world.registry.resolve("law")
    first.release()
    first.release()
    assert world.registry.listing()[0].leases == 1
    second.release()
    with pytest.raises(AssertionError, match="one has no lease"):
        world.residency.release("one")


@pytest.mark.parametrize("name", ["nobody", "base", "", "x" * 10_000])
def test_unknown_names(make: Callable[..., World], name: str) -> None:
    registry = make().registry
    with pytest.raises(UnknownAdapter, match="no adapter is called"):
        registry.resolve(name)
    with pytest.raises(UnknownAdapter):
        registry.unload(name)


@pytest.mark.parametrize("name", ["", "base", "base:x", "../x", "a b", "a\n", "ä", "-a", "x" * 201])
def test_names_that_cannot_be(make: Callable[..., World], name: str) -> None:
    world = make()
    world.write("a", "one")
    with pytest.raises(BadRequest, match="cannot be an adapter's name"):
        world.registry.register(name, "a")
    with pytest.raises(BadRequest, match="cannot be an adapter's name"):
        world.registry.load(name, "a")
    assert not world.reads


def test_a_reload_and_who_was_there_before(make: Callable[..., World]) -> None:
    world = make()
    world.write("a", "one")
    world.registry.load("law", "a")
    old = world.registry.resolve("law")
    world.held[old.handle] += 1
    world.write("a", "two")
    assert world.registry.load("law", "a", expected_generation="one").generation == "two"
    with world.registry.resolve("law") as new:
        assert (new.generation, world.attached[new.handle].generation) == ("two", "two")
        assert new.handle != old.handle
    world.residency.settle()
    assert world.attached[old.handle].generation == "one"
    assert world.residency.counts().draining == 1
    world.held[old.handle] -= 1
    old.release()
    world.residency.settle()
    assert world.resident() == {"two"}
    assert world.residency.counts().draining == 0


def test_the_same_content_is_the_same_generation(make: Callable[..., World]) -> None:
    world = make()
    world.write("a", "one")
    world.write("b", "one")
    world.registry.load("law", "a")
    world.registry.load("law", "a")
    world.registry.load("code", "b")
    world.registry.register("later", "b")
    leases = [world.registry.resolve(name) for name in ("law", "code", "later")]
    assert len({lease.handle for lease in leases}) == 1
    for lease in leases:
        lease.release()
    world.registry.unload("law")
    del world.disk["a"]
    world.registry.unload("later")
    assert world.resident() == {"one"}
    world.registry.unload("code")
    assert world.resident() == set()
    assert [kind for kind, *_ in world.log] == ["attach", "detach"]


def test_after_one_alias_went_another_tells_where_it_is(make: Callable[..., World]) -> None:
    world = make(host_bytes=10)
    for path, content in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "three")):
        world.write(path, content)
    world.registry.load("code", "b")
    world.registry.load("law", "a")
    world.registry.unload("law")
    del world.disk["a"]
    for name in ("c", "d"):  # pushes "one" off the device and out of the host
        world.registry.load(name, name)
    with world.registry.resolve("code") as lease:
        assert lease.generation == "one"


@pytest.mark.parametrize(
    ("expected", "is_loaded", "is_right"),
    [("", False, True), ("", True, False), ("one", True, True), ("two", True, False), ("one", False, False)],
)
def test_compare_and_swap(make: Callable[..., World], expected: str, is_loaded: bool, is_right: bool) -> None:
    world = make()
    world.write("a", "one")
    world.write("b", "new")
    if is_loaded:
        world.registry.load("law", "a")
    before = world.registry.listing()
    if is_right:
        assert world.registry.load("law", "b", expected_generation=expected).generation == "new"
        return
    with pytest.raises(Conflict, match="expected generation"):
        world.registry.load("law", "b", expected_generation=expected)
    assert world.registry.listing() == before
    assert not world.reads["b"], "refused before it is read"
    if is_loaded:
        with pytest.raises(Conflict):
            world.registry.unload("law", expected_generation="two")
        world.registry.unload("law", expected_generation="one")


def test_the_alias_changes_while_another_is_read(make: Callable[..., World]) -> None:
    """Compared again when all is done."""
    world = make()
    world.write("a", "one")
    world.write("b", "two")
    world.registry.load("law", "a")
    world.disk["slow"] = adapter("three")
    world.read_seconds = 0.3
    raised: list[ServeError] = []

    def load() -> None:
        try:
            world.registry.load("law", "slow", expected_generation="one")
        except ServeError as error:
            raised.append(error)

    thread = started(load)
    time.sleep(0.1)
    world.registry.unload("law")
    thread.join(10)
    assert [type(error) for error in raised] == [Conflict]
    assert world.registry.listing() == []
    world.residency.settle()
    assert world.resident() == set()


def test_one_load_at_a_time(make: Callable[..., World]) -> None:
    world = make()
    world.write("a", "one")
    world.read_seconds = 0.3
    thread = started(lambda: world.registry.load("law", "a"))
    time.sleep(0.1)
    with pytest.raises(LoadBusy, match="another adapter is being loaded"):
        world.registry.load("code", "a")
    thread.join(10)
    world.registry.load("code", "a")


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (CheckpointError("a is cut short"), "a is cut short"),
        (PermissionError("not yours"), "not yours"),
        (None, "a is missing"),
        (adapter("new", binds=False), "does not bind"),
        (adapter("new", num_bytes=101), "asks for host_bytes=101, and 100 are allowed"),
    ],
)
def test_a_load_that_fails_leaves_the_alias_as_it_was(make: Callable[..., World], what: object, error: str) -> None:
    world = make(host_bytes=100)
    world.write("a", "one")
    world.registry.load("law", "a", pin=True)
    before = world.registry.listing()
    del world.disk["a"]
    if what is not None:
        world.disk["a"] = what  # type: ignore[assignment]
    for alias in ("law", "new"):
        with pytest.raises(BadAdapter, match=error):
            world.registry.load(alias, "a")
    assert world.registry.listing() == before
    with world.registry.resolve("law") as lease:
        assert lease.generation == "one"
    counts = world.residency.counts()
    assert (counts.failures, counts.resident, counts.draining, counts.waiting) == (2, 1, 0, 0)
    world.write("a", "two")
    assert world.registry.load("law", "a").generation == "two"


def test_a_load_without_a_place_leaves_the_alias_as_it_was(make: Callable[..., World]) -> None:
    world = make(resident=2, wait_seconds=0.2)
    for name in "abc":
        world.write(name, f"{name} content")
        world.registry.register(name, name)
    leases = [world.registry.resolve(name) for name in "ab"]
    with pytest.raises(LoadBusy) as busy:
        world.registry.load("a", "c")
    assert busy.value.retry_after
    assert world.registry.listing()[0].generation == "a content"
    leases[1].release()
    assert world.registry.load("a", "c").generation == "c content"


def test_unload_waits_for_leases_and_not_for_its_caller(make: Callable[..., World]) -> None:
    world = make()
    world.write("a", "one")
    world.registry.load("law", "a")
    lease = world.registry.resolve("law")
    world.held[lease.handle] += 1
    world.registry.unload("law")
    with pytest.raises(UnknownAdapter):
        world.registry.resolve("law")
    assert world.resident() == {"one"}
    world.held[lease.handle] -= 1
    lease.release()
    world.residency.settle()
    assert world.resident() == set()
    with pytest.raises(KeyError):
        world.residency.describe("one")
    world.registry.load("law", "a")  # the name is free again
    world.registry.unload("law")
    assert world.resident() == set(), "at once where nobody uses it"


def test_loaded_again_while_it_drains(make: Callable[..., World]) -> None:
    world = make()
    world.write("a", "one")
    world.registry.load("law", "a")
    lease = world.registry.resolve("law")
    world.registry.unload("law")
    world.registry.load("law", "a")
    lease.release()
    world.residency.settle()
    assert world.resident() == {"one"}
    assert len(world.log) == 1


def test_unloaded_while_it_is_read_for_the_first_time(make: Callable[..., World]) -> None:
    world = make()
    world.write("a", "one")
    world.registry.register("law", "a")
    world.read_seconds = 0.3
    raised: list[ServeError] = []

    def ask() -> None:
        try:
            world.registry.resolve("law")
        except ServeError as error:
            raised.append(error)

    thread = started(ask)
    time.sleep(0.1)
    world.registry.unload("law")
    thread.join(10)
    assert [type(error) for error in raised] == [UnknownAdapter]
    assert world.residency.counts().host_bytes == 0


def test_registered_and_damaged_until_it_is_mended(make: Callable[..., World]) -> None:
    world = make()
    world.disk["a"] = CheckpointError("a is cut short")
    world.registry.register("law", "a")
    for _ in range(2):
        with pytest.raises(BadAdapter, match="cut short"):
            world.registry.resolve("law")
    world.write("a", "one")
    world.registry.resolve("law").release()


def test_adapters_that_are_made_and_not_read(make: Callable[..., World]) -> None:
    world = make()
    world.registry.register("made", lambda: adapter("made here"))
    with world.registry.resolve("made") as lease:
        assert world.attached[lease.handle].generation == "made here"


def test_how_many_there_may_be(make: Callable[..., World]) -> None:
    world = make(resident=3)
    for number in range(2000):
        world.registry.register(f"a{number}", "a")
    with pytest.raises(BadRequest, match="2000 adapters are known, as many as may be"):
        world.registry.register("one-more", "a")
    with pytest.raises(Conflict):
        world.registry.register("a7", "b")
    world.registry.unload("a7")
    world.registry.register("one-more", "a")


def test_one_place_stays_without_a_pin(make: Callable[..., World]) -> None:
    world = make(resident=3)
    for name in "abcd":
        world.write(name, name)
    world.registry.load("a", "a", pin=True)
    world.registry.register("b", "b", pin=True)
    for change in (world.registry.load, world.registry.register):
        with pytest.raises(BadRequest, match="2 adapters are pinned, of 3 places"):
            change("c", "c", pin=True)
    world.registry.load("a", "c", pin=True)  # in the place of one that was
    world.registry.load("a", "c", pin=False)
    world.registry.load("d", "d", pin=True)
    assert [listed.pinned for listed in world.registry.listing()] == [False, True, True]
