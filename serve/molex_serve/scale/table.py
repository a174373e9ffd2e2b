"""What a cluster's adapters are to be, and what its replicas say of them: plain data that travels between processes.

Every change makes a table of the next revision; whoever sees a newer one follows it. So a replica that starts late, or
missed a call, or a directory that lost its memory, all catch up by the same rule.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from molex_serve.errors import ServeError
from molex_serve.http.ports import Residency


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An alias. source: a folder in the adapter root, or what the server was started with. serial: the revision that it
    came with, 0 = from the start. generation: what every replica read there, "" = from the start, and each reads it
    when it is first asked for."""

    source: str
    pin: bool = False
    serial: int = 0
    generation: str = ""


@dataclass(frozen=True)
class Table:
    revision: int = 0
    entries: Mapping[str, Entry] = field(default_factory=dict)

    def having(self, alias: str, entry: Entry) -> "Table":
        return Table(self.revision + 1, {**self.entries, alias: entry})

    def without(self, alias: str) -> "Table":
        return Table(self.revision + 1, {name: entry for name, entry in self.entries.items() if name != alias})

    def again(self) -> "Table":
        """The same, told as news: what was staged for this revision is not to be."""
        return replace(self, revision=self.revision + 1)


def first_table(adapters: Mapping[str, str]) -> Table:
    """Of what a server is started with: a source for each alias."""
    return Table(entries={alias: Entry(source=source) for alias, source in adapters.items()})


def newest(tables: Iterable[Table]) -> Table:
    return max(tables, key=lambda table: table.revision)


@dataclass(frozen=True, kw_only=True)
class Held:
    """An adapter as one replica has it; kind and generation are empty until it was read there."""

    kind: str
    generation: str
    residency: Residency
    pinned: bool
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a replica answers. replica: its name, "" = it was lost before it could answer. error: of what it was asked
    to do. generation: what it staged. held: what it has, by alias, where it was asked for that."""

    replica: str = ""
    error: ServeError | None = None
    generation: str = ""
    table: Table = Table()
    held: Mapping[str, Held] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a change to all replicas. error: why it was not made, anywhere."""

    error: ServeError | None = None
    reports: tuple[Report, ...] = ()
