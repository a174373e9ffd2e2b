"""Names for adapters: an alias names one immutable generation, and another one after a reload.

A request resolves its alias once and keeps what it got: generations that were replaced or unloaded stay on the device
until their last lease is released. A reload that fails at anything, reading, binding or finding a place, leaves the
alias as it was.
"""

import re
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Lock

from molex_serve.adapters.generations import Level, Source
from molex_serve.adapters.residency import Residency
from molex_serve.adapters.worker import result_of
from molex_serve.errors import BadRequest, Conflict, LoadBusy, UnknownAdapter

NAMES = re.compile(r"[A-Za-z0-9][\w.:@/+-]{0,199}", re.ASCII)
NEW = ""  # the generation of an alias that nobody has


class Lease:
    """An adapter stays on the device, as this generation, until this is released; releasing it again does nothing."""

    def __init__(self, alias: str, generation: str, handle: int, release: Callable[[], None]):
        self.alias, self.generation, self.handle = alias, generation, handle
        self._open, self._lock = [release], Lock()

    def release(self) -> None:
        with self._lock:
            held, self._open = self._open, []
        for release in held:
            release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An alias as people see it; kind and generation are empty until it was read for the first time."""

    alias: str
    kind: str
    generation: str
    residency: Level
    pinned: bool
    num_bytes: int
    leases: int
    source: str


@dataclass(eq=False)
class Alias:
    """learning: its first reading, where it was registered without one."""

    name: str
    source: Source
    pin: bool
    generation: str = ""
    learning: Future[str] | None = None


class Registry:
    """The aliases of one server. reserved: names that are no adapters', as the base's own, nor before a colon: clients
    ask for "base:ALIAS" too."""

    def __init__(self, residency: Residency, reserved: Collection[str] = ()):
        self.residency, self.limits, self.reserved = residency, residency.limits, reserved
        self._aliases: dict[str, Alias] = {}
        self._lock = Lock()  # never held while waiting; residency's is taken inside it
        self._loading = Lock()

    def register(self, alias: str, source: Source, pin: bool = False) -> None:
        """An adapter that is read when it is first asked for. Raises Conflict where the alias is taken."""
        with self._lock:
            self._check(alias, NEW, pin)
            self._aliases[alias] = Alias(alias, source, pin)

    def resolve(self, name: str) -> Lease:
        """The present generation of an alias, on the device. Raises UnknownAdapter, BadAdapter where it cannot be read
        or does not fit, LoadBusy where it does not get there in time."""
        while True:
            with self._lock:
                alias = self._get(name)
                if alias.generation:
                    generation = alias.generation
                    self.residency.expect(generation)
                    break
                learning = self._learn(alias)
            result_of(learning, self.residency.wait_seconds)
        handle = self.residency.acquire(generation)
        return Lease(name, generation, handle, partial(self.residency.release, generation))

    def load(self, alias: str, path: Source, expected_generation: str | None = None, pin: bool = False) -> Listed:
        """Reads an adapter, brings it to the device, and has the alias name it. expected_generation: what the alias
        must name until then, "" = nothing yet, None = anything. Raises Conflict, BadAdapter, and LoadBusy where another
        load is under way or no place came free; then the alias is as it was."""
        with self.stage(alias, path, expected_generation, pin) as staged:
            return self.commit(staged, path, expected_generation, pin)

    def stage(self, alias: str, path: Source, expected_generation: str | None = None, pin: bool = False) -> Lease:
        """The first half of a load: nobody is served it yet, and released it may be forgotten. Raises as `load`."""
        if not self._loading.acquire(blocking=False):
            raise LoadBusy("another adapter is being loaded")
        try:
            with self._lock:
                self._check(alias, expected_generation, pin)
            generation = result_of(self.residency.read(path, self.residency.expect))
            handle = self.residency.acquire(generation)
        finally:
            self._loading.release()
        return Lease(alias, generation, handle, partial(self.residency.release, generation))

    def commit(self, staged: Lease, path: Source, expected_generation: str | None = None, pin: bool = False) -> Listed:
        """The second half: the alias names what was staged for it, by a lease that is still open. Raises Conflict."""
        with self._lock:
            self._check(staged.alias, expected_generation, pin)
            self._replace(Alias(staged.alias, path, pin, staged.generation))
            return self._listed(self._aliases[staged.alias])

    def unload(self, alias: str, expected_generation: str | None = None) -> None:
        """Forgets an alias. Its generation leaves the device once its last lease is released, before this returns where
        there is none. Raises UnknownAdapter, Conflict."""
        with self._lock:
            found = self._get(alias)
            self._check_generation(found, expected_generation)
            del self._aliases[alias]
            self._unname(found)
        self.residency.settle()

    def listing(self) -> list[Listed]:
        """Every alias, by name."""
        with self._lock:
            return [self._listed(self._aliases[name]) for name in sorted(self._aliases)]

    def close(self) -> None:
        """Ends loading; leases may still be released."""
        self.residency.close()

    # with the lock held

    def _get(self, name: str) -> Alias:
        if name not in self._aliases:
            raise UnknownAdapter(f"no adapter is called {name[:200]!r}")
        return self._aliases[name]

    def _learn(self, alias: Alias) -> Future[str]:
        """The reading that tells its generation; a new one where the last failed."""
        if alias.learning is None or alias.learning.done():
            alias.learning = self.residency.read(alias.source, partial(self._learned, alias))
        return alias.learning

    def _check(self, alias: str, expected: str | None, pin: bool) -> None:
        """Whether an alias may come to name something else."""
        is_reserved = any(alias == name or alias.startswith(f"{name}:") for name in self.reserved)
        if not NAMES.fullmatch(alias) or is_reserved:
            raise BadRequest(
                f"{alias[:200]!r} cannot be an adapter's name: up to 200 letters, digits and _.:@/+-, and not "
                f"{', '.join(map(repr, self.reserved)) or 'empty'}"
            )
        found = self._aliases.get(alias)
        self._check_generation(found, expected)
        if found is None and len(self._aliases) >= self.limits.registered:
            raise BadRequest(f"{len(self._aliases)} adapters are known, as many as may be: unload one")
        pinned = sum(other.pin for other in self._aliases.values() if other is not found)
        if pin and pinned + 1 >= self.limits.resident:
            raise BadRequest(
                f"{pinned} adapters are pinned, of {self.limits.resident} places, and one place stays free for others"
            )

    def _check_generation(self, found: Alias | None, expected: str | None) -> None:
        present = found.generation or "one that was not read yet" if found else NEW
        if expected is not None and expected != present:
            raise Conflict(f"expected generation {expected or 'none'}, and there is {present or 'none'}")

    def _replace(self, alias: Alias) -> None:
        self.residency.name(alias.generation, alias.source, alias.pin)
        old = self._aliases.get(alias.name)
        self._aliases[alias.name] = alias
        if old is not None:
            self._unname(old)

    def _unname(self, alias: Alias) -> None:
        if alias.generation:
            self.residency.unname(alias.generation, alias.source, alias.pin)

    def _listed(self, alias: Alias) -> Listed:
        kind, level, num_bytes, leases = "", "disk", 0, 0
        if alias.generation:
            kind, level, num_bytes, leases = self.residency.describe(alias.generation)
        return Listed(
            alias=alias.name,
            kind=kind,
            generation=alias.generation,
            residency=level,
            pinned=alias.pin,
            num_bytes=num_bytes,
            leases=leases,
            source=str(alias.source),
        )

    def _learned(self, alias: Alias, generation: str) -> None:
        """On the worker, without the lock: an alias was read for the first time."""
        with self._lock:
            if self._aliases.get(alias.name) is alias:
                alias.generation = generation
                self.residency.name(generation, alias.source, alias.pin)
