"""Brings one server's registry in line with the cluster's table, and holds what is staged for the next one.

Who heard of a load in time has the adapter staged, and only has to name it. Who did not, because it started later, gets
to know where the adapter lies and reads it when it is first asked for. Then it must be what the others read: a folder
that has changed since is an error, not another answer to the same question.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from molex_serve.adapters.base import HostAdapter
from molex_serve.adapters.paths import inside
from molex_serve.adapters.registry import Lease, Registry
from molex_serve.errors import BadAdapter, ServeError, UnknownAdapter
from molex_serve.scale.table import Entry, Held, Report, Table


@dataclass(frozen=True)
class Same:
    """A source that must hold the generation that the cluster loaded from it."""

    read: Callable[[str], HostAdapter]
    root: str | None
    path: str
    generation: str

    def __call__(self) -> HostAdapter:
        adapter = self.read(str(inside(self.root, self.path)))
        if adapter.generation != self.generation:
            raise BadAdapter(
                f"{self.path} holds generation {adapter.generation}, and {self.generation} when it was loaded: load it "
                "again to serve what is there now"
            )
        return adapter

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Staged:
    serial: int
    lease: Lease
    folder: str


class Follower:
    """name: of the replica, in its reports. table: what the registry has now. root: the adapter root. forget: told of
    an alias that is gone. Staging and following take long, one at a time."""

    def __init__(
        self,
        name: str,
        registry: Registry,
        table: Table,
        read: Callable[[str], HostAdapter],
        root: str | None,
        forget: Callable[[str], None],
    ):
        self.name, self.table = name, table
        self._registry, self._read, self._root, self._forget = registry, read, root, forget
        self._staged: Staged | None = None

    def stage(self, alias: str, path: str, pin: bool, serial: int) -> Report:
        """Gets an adapter ready for the table of this revision. What was staged before is given up."""
        self._give_up()
        try:
            folder = str(inside(self._root, path))
            self._staged = Staged(serial, self._registry.stage(alias, folder, pin=pin), folder)
        except ServeError as error:
            return Report(replica=self.name, error=error)
        return Report(replica=self.name, generation=self._staged.lease.generation)

    def follow(self, table: Table) -> Report:
        """An old table is none to follow."""
        if table.revision > self.table.revision:
            self._become(table)
        return self.holdings()

    def holdings(self) -> Report:
        held = {
            listed.alias: Held(
                kind=listed.kind,
                generation=listed.generation,
                residency=listed.residency,
                pinned=listed.pinned,
                num_bytes=listed.num_bytes,
            )
            for listed in self._registry.listing()
        }
        return Report(replica=self.name, table=self.table, held=held)

    def _become(self, table: Table) -> None:
        for alias in self.table.entries.keys() - table.entries.keys():
            self._unload(alias)
            self._forget(alias)
        for alias, entry in table.entries.items():
            known = self.table.entries.get(alias)
            if known is None or known.serial != entry.serial:
                self._take(alias, entry)
        self.table = table
        self._give_up()

    def _take(self, alias: str, entry: Entry) -> None:
        staged = self._staged
        if staged is not None and staged.serial == entry.serial:
            self._registry.commit(staged.lease, staged.folder, pin=entry.pin)
            return
        self._unload(alias)
        self._registry.register(alias, Same(self._read, self._root, entry.source, entry.generation), entry.pin)

    def _unload(self, alias: str) -> None:
        with suppress(UnknownAdapter):
            self._registry.unload(alias)

    def _give_up(self) -> None:
        if self._staged is not None:
            self._staged.lease.release()
            self._staged = None
