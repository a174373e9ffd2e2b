"""Adapters between disk, host and device: the least recently used leave, those in use never do.

A generation is known from its first reading on. It is needed while an alias names it, a request waits for it or a lease
of it is open; needed by nobody, it is forgotten, and its place on the device given back. Who needs a place waits until
others leave, and then has the worker try.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from threading import Condition

from molex_serve.adapters.base import HostAdapter
from molex_serve.adapters.generations import Generations, Known, Level, Source
from molex_serve.adapters.worker import Counts, Device, Worker, result_of
from molex_serve.errors import LoadBusy
from molex_serve.settings import AdapterLimits

PATIENCE = 0.25  # of the time that a request waits at most: after it others must yield their places


class Residency:
    """attach(adapter) -> handle and detach(handle) run within `paused()`; attach raises LoadBusy where its pools are
    full. read(path) checks what it reads against the base. wait_seconds: for a place on the device.

    All methods may be called from any thread; only `acquire`, `settle` and `close` take time. Nobody waits for the
    engine with the lock held, so the engine's own thread may release leases.
    """

    def __init__(
        self,
        attach: Callable[[HostAdapter], int],
        detach: Callable[[int], None],
        read: Callable[[str], HostAdapter],
        paused: Callable[[], AbstractContextManager[None]],
        limits: AdapterLimits,
        wait_seconds: float = 30.0,
    ):
        self.limits, self.wait_seconds = limits, wait_seconds
        self._changed, self._generations = Condition(), Generations(limits)
        self._worker = Worker(Device(attach, detach, read, paused), self._generations, self._changed)
        self._closed = False

    def read(self, source: Source, then: Callable[[str], None]) -> Future[str]:
        """Has an adapter read into the host's memory, and `then` called with its generation, on the worker; what `then`
        does not name or expect is forgotten. The future has the generation, or raises BadAdapter."""
        return self._worker.submit(partial(self._read, source, then))

    def expect(self, generation: str) -> None:
        """Somebody will `acquire` it: until then it is not forgotten."""
        with self._changed:
            self._generations[generation].waiting += 1

    def acquire(self, generation: str) -> int:
        """Makes what was expected a lease, and returns its handle. Waits for a place on the device. Raises LoadBusy
        where none came free in time, and what reading or attaching it raises; then it is not expected any more."""
        with self._changed:
            known = self._generations[generation]
            self._worker.counts.hits[known.level] += 1
            try:
                handle = self._wait(known)
                known.leases += 1
            finally:
                self._left(known)
            return handle

    def release(self, generation: str) -> None:
        """Ends a lease."""
        with self._changed:
            known = self._generations[generation]
            assert known.leases > 0, f"{generation} has no lease"
            known.leases -= 1
            self._generations.use(known)
            self._may_leave(known)

    def name(self, generation: str, source: Source, pin: bool) -> None:
        """An alias names it. pin: it does not leave the device for others."""
        with self._changed:
            known = self._generations[generation]
            known.sources.append(source)
            known.pins += pin
            if pin and known.yielding:
                known.yielding = False
                self._changed.notify_all()

    def unname(self, generation: str, source: Source, pin: bool) -> None:
        """An alias that named it does no more."""
        with self._changed:
            known = self._generations[generation]
            known.sources.remove(source)
            known.pins -= pin
            self._may_leave(known)

    def settle(self) -> None:
        """Waits until what nobody needs has left the device; at most as long as for a place."""
        with self._changed:
            self._changed.wait_for(lambda: not self._worker.sweeping, self.wait_seconds)

    def close(self) -> None:
        """Ends the worker and all waiting. What is on the device stays there."""
        with self._changed:
            self._closed = True
            self._generations.state += 1  # who waits for others to leave asks again, and is told
        self._worker.close()
        with self._changed:
            self._changed.notify_all()

    def describe(self, generation: str) -> tuple[str, Level, int, int]:
        """Kind, level, bytes, leases."""
        with self._changed:
            known = self._generations[generation]
            return known.kind, known.level, known.num_bytes, known.leases

    def counts(self) -> Counts:
        """As they are now."""
        with self._changed:
            generations, counts = self._generations, self._worker.counts
            return replace(
                counts,
                hits=dict(counts.hits),
                resident=generations.resident(),
                host_bytes=generations.host_bytes,
                waiting=generations.waiting(),
                draining=generations.draining(),
            )

    def _read(self, source: Source, then: Callable[[str], None]) -> str:
        """On the worker."""
        adapter = self._worker.read(source)
        with self._changed:
            known = self._generations.learn(adapter, source)
            known.waiting += 1
        try:
            then(adapter.generation)
        finally:
            with self._changed:
                self._left(known)
        return adapter.generation

    # with the lock held

    def _wait(self, known: Known) -> int:
        """Until it is on the device."""
        start, patience, job = time.monotonic(), PATIENCE * self.wait_seconds, None
        while known.handle is None or known.yielding:
            if known.handle is None:
                self._generations.starve(known, start)
            if job is not None and job.done():
                with suppress(LoadBusy):  # there was no place
                    result_of(job)
            job = self._job(known)
            waited = time.monotonic() - start
            if waited >= self.wait_seconds:
                raise LoadBusy(
                    f"not on the device after {waited:.1f} s: others are being loaded, or every place is in use"
                )
            if waited >= patience:
                self._let_in()
            self._changed.wait(min(self.wait_seconds - waited, patience))
        return known.handle

    def _job(self, known: Known) -> Future[None] | None:
        """What brings it to the device; None where the last attempt found no place, and nobody has left since."""
        if known.busy:
            return known.job
        if known.handle is not None or known.tried == self._generations.state:
            return None
        known.tried = self._generations.state
        known.job = self._worker.submit(partial(self._worker.bring, known))
        known.job.add_done_callback(lambda _: self._tried(known))
        return known.job

    def _tried(self, known: Known) -> None:
        """Called without the lock, when a job is over."""
        with self._changed:
            self._let_in()
            self._may_leave(known)
            self._changed.notify_all()

    def _let_in(self) -> None:
        """Has others yield to those who have waited for long."""
        if self._generations.let_in(time.monotonic() - PATIENCE * self.wait_seconds):
            self._changed.notify_all()

    def _left(self, known: Known) -> None:
        """One that waited does no more."""
        known.waiting -= 1
        self._generations.use(known)
        if not known.waiting and self._generations.feed(known):
            self._let_in()
        self._may_leave(known)

    def _may_leave(self, known: Known) -> None:
        """Tells those who wait for a place where it might give its own, and forgets it where nobody needs it."""
        if known.evictable:
            self._generations.state += 1
            self._changed.notify_all()
        self._generations.forget(known)
        if not known.needed and known.handle is not None and not self._worker.sweeping and not self._closed:
            self._worker.sweeping = True
            self._worker.submit(self._worker.sweep)
