"""The generations that are known: where each is, who needs it, and who leaves first. State alone, without threads."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from molex_serve.adapters.base import ExpertSwap, HostAdapter, LowRank
from molex_serve.errors import BadAdapter
from molex_serve.settings import AdapterLimits

Level = Literal["disk", "host", "device"]
Source = str | Path | Callable[[], HostAdapter]  # a folder, or what makes the adapter


@dataclass(eq=False, kw_only=True)
class Known:
    """One generation. sources: of the aliases that name it. waiting: threads that want it on the device, hungry: since
    when they do. yielding: gives no lease until it has left the device, so that others get its place. job, tried: the
    last attempt to bring it there, and at which state of the device."""

    generation: str
    kind: str
    num_bytes: int
    first_source: Source
    sources: list[Source] = field(default_factory=list)
    host: HostAdapter | None = None
    handle: int | None = None
    pins: int = 0
    leases: int = 0
    waiting: int = 0
    used: int = 0
    attached: int = 0
    hungry: float | None = None
    yielding: bool = False
    job: Future[None] | None = None
    tried: int = -1

    @property
    def level(self) -> Level:
        return "device" if self.handle is not None else "host" if self.host is not None else "disk"

    @property
    def source(self) -> Source:
        return self.sources[-1] if self.sources else self.first_source

    @property
    def needed(self) -> bool:
        return bool(self.sources or self.leases or self.waiting)

    @property
    def busy(self) -> bool:
        """Whether an attempt to bring it to the device is under way."""
        return self.job is not None and not self.job.done()

    @property
    def evictable(self) -> bool:
        idle = not self.leases and (not self.waiting or self.yielding)
        return self.handle is not None and not self.pins and idle


class Generations:
    """By their names. state: a clock of what leaves the device, or may from now on."""

    def __init__(self, limits: AdapterLimits):
        self.limits, self.state, self.host_bytes = limits, 0, 0
        self._known: dict[str, Known] = {}
        self._in_host: dict[str, Known] = {}  # the least recently used first
        self._resident: dict[str, Known] = {}
        self._hungry: dict[str, Known] = {}
        self._uses = 0

    def __getitem__(self, generation: str) -> Known:
        return self._known[generation]

    def __contains__(self, generation: str) -> bool:
        return generation in self._known

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, adapter: HostAdapter, source: Source) -> Known:
        """What is known of an adapter that was read, now in the host's memory."""
        known = self._known.get(adapter.generation)
        if known is None:
            known = self._known[adapter.generation] = Known(
                generation=adapter.generation, kind=adapter.kind, num_bytes=adapter.num_bytes, first_source=source
            )
        self.keep_in_host(known, adapter)
        return known

    def keep_in_host(self, known: Known, adapter: HostAdapter) -> None:
        """The least recently used make room for it."""
        self._drop_from_host(known)
        while self._in_host and self.host_bytes + known.num_bytes > self.limits.host_bytes:
            self._drop_from_host(next(iter(self._in_host.values())))
        known.host = adapter
        self._in_host[known.generation] = known
        self.host_bytes += known.num_bytes
        self.use(known)

    def _drop_from_host(self, known: Known) -> None:
        if self._in_host.pop(known.generation, None) is not None:
            known.host = None
            self.host_bytes -= known.num_bytes

    def use(self, known: Known) -> None:
        self._uses += 1
        known.used = self._uses
        if self._in_host.pop(known.generation, None) is not None:
            self._in_host[known.generation] = known

    def starve(self, known: Known, since: float) -> None:
        """It is wanted on the device, for so long."""
        if known.hungry is None:
            known.hungry = since
            self._hungry[known.generation] = known

    def feed(self, known: Known) -> bool:
        """It is not wanted any more, or there. Whether it was."""
        known.hungry = None
        return self._hungry.pop(known.generation, None) is not None

    def put(self, known: Known, handle: int) -> None:
        """It is on the device."""
        self.use(known)
        self.feed(known)
        known.handle, known.attached = handle, self._uses
        self._resident[known.generation] = known

    def take(self, known: Known, now: float) -> int:
        """It leaves the device, and is forgotten if nobody needs it. Returns its handle."""
        handle = known.handle
        assert handle is not None
        known.handle, known.yielding = None, False
        del self._resident[known.generation]
        if known.waiting:
            self.starve(known, now)
        self.state += 1
        self.forget(known)
        return handle

    def forget(self, known: Known) -> None:
        """Where nobody needs it and it holds no place."""
        is_idle = known.handle is None and not known.needed and not known.busy
        if is_idle and self._known.get(known.generation) is known:  # or it was forgotten, and is known anew
            del self._known[known.generation]
            self._drop_from_host(known)

    def unneeded(self) -> Known | None:
        """One that is on the device for nobody."""
        return next((known for known in self._resident.values() if not known.needed), None)

    def victim(self) -> Known | None:
        """Who leaves the device first."""
        evictable = (known for known in self._resident.values() if known.evictable)
        return min(evictable, key=lambda known: (known.needed, not known.yielding, known.used), default=None)

    def has_place(self) -> bool:
        """On the device, once others have left it as they may."""
        return not self.is_full() or self.victim() is not None

    def is_full(self) -> bool:
        return len(self._resident) >= self.limits.resident

    def let_in(self, since: float) -> bool:
        """Has as many yield their places as have been hungry since then, those first that have been on the device for
        longest. Whether anything changed."""
        num_starving = sum(known.hungry is not None and known.hungry <= since for known in self._hungry.values())
        yielding = [known for known in self._resident.values() if known.yielding]
        others = (k for k in self._resident.values() if k.leases and not k.pins and not k.yielding)
        stopping = yielding[num_starving:]
        starting = sorted(others, key=_attached)[: max(0, num_starving - len(yielding))]
        for known in (*stopping, *starting):
            known.yielding = not known.yielding
        return bool(stopping or starting)

    def resident(self) -> int:
        return len(self._resident)

    def waiting(self) -> int:
        return sum(known.waiting for known in self._known.values())

    def draining(self) -> int:
        """That no alias names any more."""
        return sum(not known.sources for known in self._known.values())


def _attached(known: Known) -> int:
    return known.attached


def check_limits(adapter: HostAdapter, limits: AdapterLimits) -> None:
    """Raises BadAdapter where there can never be a place for it."""
    asked = {"host_bytes": adapter.num_bytes}
    if isinstance(adapter, LowRank):
        asked |= {"rank": adapter.rank, "columns": adapter.rank}
    if isinstance(adapter, ExpertSwap):
        asked["expert_slots"] = max(map(len, adapter.experts.values()), default=0)
    for name, value in asked.items():
        most = getattr(limits, name)
        if value > most:
            raise BadAdapter(f"{adapter.source} asks for {name}={value}, and {most} are allowed in all")
