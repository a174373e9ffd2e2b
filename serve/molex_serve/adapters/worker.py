"""The thread that reads adapters and moves them to and from the device, one after the other.

It never waits for a place: what finds none fails with LoadBusy, and is tried again when others have left.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Condition
from typing import TypeVar

from molex.errors import MolexError
from molex_serve.adapters.base import HostAdapter
from molex_serve.adapters.generations import Generations, Known, Level, Source, check_limits
from molex_serve.errors import BadAdapter, LoadBusy, ServeError, Unavailable

logger = logging.getLogger("molex")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Device:
    """What is done with adapters: `read` at any time, the others within `paused()`, between two steps. attach raises
    LoadBusy where its pools are full."""

    attach: Callable[[HostAdapter], int]
    detach: Callable[[int], None]
    read: Callable[[str], HostAdapter]
    paused: Callable[[], AbstractContextManager[None]]


@dataclass(kw_only=True)
class Counts:
    """hits: leases by the level at which they found their adapter. loads: onto the device, and their seconds, readings
    among them. failures: readings and loads that raised. draining: generations that no alias names any more."""

    hits: dict[Level, int]
    loads: int = 0
    load_seconds: float = 0.0
    reads: int = 0
    failures: int = 0
    evictions: int = 0
    resident: int = 0
    host_bytes: int = 0
    waiting: int = 0
    draining: int = 0


class Worker:
    """Its methods run on the thread, except `submit` and `close`. changed: the lock of the generations, notified when
    they change; the thread takes it in pauses of the engine, so nobody may wait for the engine with it."""

    def __init__(self, device: Device, generations: Generations, changed: Condition):
        self.device, self.generations, self.changed = device, generations, changed
        self.counts = Counts(hits={"device": 0, "host": 0, "disk": 0})
        self.sweeping = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Has it do something, after what it was given before. Raises Unavailable once it is closed."""
        try:
            return self._thread.submit(work)
        except RuntimeError as error:
            raise Unavailable("adapters are not loaded any more: the server is stopping") from error

    def close(self) -> None:
        """What has not begun never does."""
        self._thread.shutdown(cancel_futures=True)

    def read(self, source: Source) -> HostAdapter:
        """Raises BadAdapter where it cannot be served here."""
        try:
            adapter = source() if callable(source) else self.device.read(str(source))
            check_limits(adapter, self.generations.limits)
        except ServeError:
            self._failed()
            raise
        except (MolexError, OSError) as error:
            self._failed()
            raise BadAdapter(f"{source}: {error}") from error
        with self.changed:
            self.counts.reads += 1
        return adapter

    def bring(self, known: Known) -> None:
        """Onto the device. Raises LoadBusy where there is no place now, and what reading or attaching it raises."""
        start = time.monotonic()
        if not known.needed:
            return
        try:
            self._place(known)
        except LoadBusy:
            raise
        except BaseException:
            known.tried = -1  # who wants it next tries again
            raise
        with self.changed:
            self.counts.loads += 1
            self.counts.load_seconds += time.monotonic() - start
        logger.info("generation %s of %s is on the device", known.generation, known.source)

    def _place(self, known: Known) -> None:
        self._check_place()  # or reading it would push others out of the host's memory for nothing
        adapter = known.host or self._read_again(known)
        self._check_place()
        with self.device.paused():
            handle = self._attach(adapter)
            with self.changed:
                self.generations.put(known, handle)

    def _check_place(self) -> None:
        with self.changed:
            if not self.generations.has_place():
                raise LoadBusy("every place on the device is in use or pinned")

    def _read_again(self, known: Known) -> HostAdapter:
        adapter = self.read(known.source)
        if adapter.generation != known.generation:
            self._failed()
            raise BadAdapter(
                f"{adapter.source} holds generation {adapter.generation}, and {known.generation} when it was loaded: "
                "load it again to serve what is there now"
            )
        with self.changed:
            self.generations.keep_in_host(known, adapter)
        return adapter

    def _attach(self, adapter: HostAdapter) -> int:
        """In a pause. Raises LoadBusy where all that may leave have left, and there is no place yet."""
        while True:
            with self.changed:
                is_full = self.generations.is_full()
            if not is_full:
                try:
                    return self.device.attach(adapter)
                except LoadBusy as busy:
                    logger.debug("%s waits for others to leave: %s", adapter.source, busy)
                except BaseException:
                    self._failed()
                    raise
            self._evict()

    def _evict(self) -> None:
        """In a pause."""
        with self.changed:
            victim = self.generations.victim()
            if victim is None:
                raise LoadBusy("what is left on the device is in use or pinned")
            self.counts.evictions += 1
            handle = self.generations.take(victim, time.monotonic())
        self.device.detach(handle)

    def sweep(self) -> None:
        """Takes what nobody needs off the device."""
        try:
            with self.device.paused():
                while (handle := self._next_unneeded()) is not None:
                    self.device.detach(handle)
        except BaseException:
            logger.exception("adapters that were unloaded keep their places on the device")
            with self.changed:
                self.sweeping = False
                self.changed.notify_all()
            raise

    def _next_unneeded(self) -> int | None:
        with self.changed:
            unneeded = self.generations.unneeded()
            if unneeded is not None:
                return self.generations.take(unneeded, time.monotonic())
            self.sweeping = False
            self.changed.notify_all()
            return None

    def _failed(self) -> None:
        with self.changed:
            self.counts.failures += 1


def result_of(job: Future[Result], seconds: float | None = None) -> Result:
    """What the thread returned or raised. Raises LoadBusy after so many seconds, Unavailable where it never began."""
    try:
        return job.result(seconds)
    except CancelledError as error:
        raise Unavailable("adapters are not loaded any more: the server is stopping") from error
    except TimeoutError as error:
        if job.done():
            raise
        raise LoadBusy(f"not read after {seconds} s: other adapters are being loaded") from error
