"""A disk, an engine and a device without a model: what they are asked, and whether they were asked rightly."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from molex.errors import CheckpointError
from molex_serve.adapters.base import HostAdapter
from molex_serve.adapters.registry import Registry
from molex_serve.adapters.residency import Residency
from molex_serve.errors import BadAdapter, LoadBusy
from molex_serve.settings import AdapterLimits


@dataclass(frozen=True, kw_only=True)
class Fake(HostAdapter):
    """columns: of the device's pool. binds: whether attaching it succeeds."""

    columns: int = 1
    binds: bool = True


def adapter(content: str, source: str = "", num_bytes: int = 10, columns: int = 1, binds: bool = True) -> Fake:
    return Fake(
        kind="lora", generation=content, num_bytes=num_bytes, source=source or content, columns=columns, binds=binds
    )


class World:
    """disk: path -> what is there, an error where it is damaged. A step may run at any time but in a pause; attaching
    and detaching outside of one is an error, as is detaching a handle that a lease names (`held`)."""

    def __init__(self, resident: int = 2, columns: int = 1000, host_bytes: int = 1 << 30, wait_seconds: float = 5.0):
        self.disk: dict[str, Fake | Exception] = {}
        self.columns, self.read_seconds, self.stopped = columns, 0.0, False
        self.reads: Counter[str] = Counter()
        self.log: list[tuple[str, int, str]] = []
        self.attached: dict[int, Fake] = {}  # handle -> adapter
        self.held: Counter[int] = Counter()  # handle -> leases, as the test counts them
        self.step = threading.Lock()
        self.most_resident = 0
        self._pausing: int | None = None
        self.limits = AdapterLimits(resident=resident, host_bytes=host_bytes, registered=2000)
        self.residency = Residency(
            self.attach, self.detach, self.read, self.paused, self.limits, wait_seconds=wait_seconds
        )
        self.registry = Registry(self.residency, reserved=("base",))

    def write(self, path: str, content: str, **of_it: int | bool) -> None:
        self.disk[path] = adapter(content, path, **of_it)  # type: ignore[arg-type]

    def read(self, path: str) -> HostAdapter:
        self.reads[path] += 1
        time.sleep(self.read_seconds)
        found = self.disk.get(path)
        if found is None:
            raise CheckpointError(f"{path} is missing")
        if isinstance(found, Exception):
            raise found
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self.step:
            self._pausing = threading.get_ident()
            try:
                yield
            finally:
                self._pausing = None

    def attach(self, found: HostAdapter) -> int:
        assert self._pausing == threading.get_ident(), "attached outside of a pause"
        assert isinstance(found, Fake)
        if not found.binds:
            raise BadAdapter(f"{found.source} does not bind")
        if sum(other.columns for other in self.attached.values()) + found.columns > self.columns:
            raise LoadBusy("no columns are free")
        handle = next(handle for handle in range(1, 10_000) if handle not in self.attached)
        self.attached[handle] = found
        self.most_resident = max(self.most_resident, len(self.attached))
        self.log.append(("attach", handle, found.generation))
        return handle

    def detach(self, handle: int) -> None:
        assert self._pausing == threading.get_ident(), "detached outside of a pause"
        assert not self.held[handle], f"handle {handle} is in use"
        self.log.append(("detach", handle, self.attached.pop(handle).generation))

    def resident(self) -> set[str]:
        return {found.generation for found in self.attached.values()}

    def close(self) -> None:
        self.registry.close()
