"""The one place where a cluster's adapters change: an alias names the same generation on every replica, or none new.

A load has every replica read the adapter and bring it to its device; only when all of them have, and read the same,
does the table name it, and they follow. Where one cannot, none does, and the alias is as it was everywhere. A replica
that is lost in between does not count: the one that takes its place follows the table when it starts.

The table is kept in memory, here and in each replica, and the newest counts: a directory that is started anew learns it
from any of them. A load that it had begun is then lost, and its caller told nothing: asking again is safe.
"""

import asyncio
from collections.abc import Mapping, Sequence

from molex_serve.errors import BadAdapter, Conflict, LoadBusy, ServeError, Unavailable, UnknownAdapter
from molex_serve.scale.ports import Replicas
from molex_serve.scale.table import Entry, Outcome, Report, Table, first_table, newest


class Directory:
    """adapters: what the replicas are started with."""

    def __init__(self, adapters: Mapping[str, str], replicas: Replicas):
        self._table = first_table(adapters)
        self._replicas = replicas
        self._changing = asyncio.Lock()

    async def newest(self, theirs: Table) -> Table:
        """What a replica that follows `theirs` should follow."""
        self._table = newest((self._table, theirs))
        return self._table

    async def aliases(self) -> frozenset[str]:
        return frozenset(self._table.entries)

    async def load(self, alias: str, path: str, expected_generation: str | None, pin: bool) -> Outcome:
        """As the registry's, on every replica or on none."""
        if self._changing.locked():
            return Outcome(error=LoadBusy("another adapter is being loaded or unloaded"))
        async with self._changing:
            try:
                return await self._load(alias, path, expected_generation, pin)
            except ServeError as error:
                return Outcome(error=error)

    async def unload(self, alias: str, expected_generation: str | None) -> Outcome:
        """As the registry's. A replica that does not hear of it now follows later."""
        async with self._changing:
            try:
                await self._check(alias, expected_generation)
                if alias not in self._table.entries:
                    raise UnknownAdapter(f"no adapter is called {alias[:200]!r}")
                return Outcome(reports=await self._tell(self._table.without(alias)))
            except ServeError as error:
                return Outcome(error=error)

    async def _load(self, alias: str, path: str, expected_generation: str | None, pin: bool) -> Outcome:
        await self._check(alias, expected_generation)
        serial = self._table.revision + 1
        staged = tuple(await self._replicas.reports("stage", alias, path, pin, serial))
        error = objection(path, staged)
        if error is not None:
            await self._tell(self._table.again())
            return Outcome(error=error, reports=staged)
        generation = next(report.generation for report in staged if report.replica)
        entry = Entry(source=path, pin=pin, serial=serial, generation=generation)
        return Outcome(reports=await self._tell(self._table.having(alias, entry)))

    async def _check(self, alias: str, expected: str | None) -> None:
        """Learns what replicas know better. Raises Conflict where the alias is not of the expected generation."""
        reports = await self._replicas.reports("holdings")
        self._table = newest((self._table, *(report.table for report in reports)))
        if expected is None:
            return
        present = self._present(alias, reports)
        if present != {expected}:
            raise Conflict(f"expected generation {expected or 'none'}, and there is {' or '.join(present) or 'none'}")

    def _present(self, alias: str, reports: Sequence[Report]) -> set[str]:
        """The generations that it has; more than one where replicas read it for themselves, and not the same."""
        entry = self._table.entries.get(alias)
        if entry is None or entry.generation:
            return {"" if entry is None else entry.generation}
        read = {report.held[alias].generation for report in reports if alias in report.held} - {""}
        return read or {"one that was not read yet"}

    async def _tell(self, table: Table) -> tuple[Report, ...]:
        self._table = table
        return tuple(await self._replicas.reports("follow", table))


def objection(path: str, staged: Sequence[Report]) -> ServeError | None:
    """Why an adapter is not loaded."""
    answered = [report for report in staged if report.replica]
    if not answered:
        return Unavailable("every replica was lost while it loaded the adapter")
    if len({report.generation for report in answered if report.error is None}) > 1:
        return BadAdapter(f"replicas read different adapters in {path!r}: is it one folder, shared by their machines?")
    return next((report.error for report in answered if report.error is not None), None)
