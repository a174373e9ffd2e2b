"""Several replicas in this process, each with its own pretended device, and a disk that they share."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from molex_serve.errors import Unavailable
from molex_serve.scale.directory import Directory
from molex_serve.scale.following import Follower
from molex_serve.scale.table import Report, first_table
from tests.serve.adapters.fake_device import World


class Member:
    """A replica. registry: as it is started, with what every replica is started with."""

    def __init__(self, name: str, root: Path, adapters: Mapping[str, str]):
        self.world = World(resident=2, wait_seconds=0.2)
        for alias, source in adapters.items():
            self.world.registry.register(alias, source)
        self.forgotten: list[str] = []
        self.follower = Follower(
            name, self.world.registry, first_table(adapters), self.world.read, str(root), self.forgotten.append
        )

    def says(self, alias: str) -> str:
        """The generation that a request to it is answered by."""
        with self.world.registry.resolve(alias) as lease:
            return lease.generation


class Cluster:
    """What the directory calls. lost: who does not answer any more. asked: which calls were made."""

    def __init__(self, root: Path, adapters: Mapping[str, str], size: int = 2):
        self.root, self.adapters = root, adapters
        self.members: dict[str, Member] = {}
        self.disk: dict[str, str] = {}
        self.lost: set[str] = set()
        self.asked: list[str] = []
        self.directory = Directory(adapters, self)
        for number in range(size):
            self.start(f"r{number}")

    def write(self, name: str, content: str) -> None:
        """A folder on every machine."""
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / "adapter_model.safetensors").touch()
        self.disk[str((self.root / name).resolve())] = content
        for member in self.members.values():
            self._mount(member)

    def start(self, name: str) -> Member:
        """As `Replica` does: it takes part in calls from now on, and follows the newest table."""
        member = self.members[name] = Member(name, self.root, self.adapters)
        self._mount(member)
        self.news(name)
        return member

    def news(self, name: str) -> None:
        """What a replica asks for now and then."""
        follower = self.members[name].follower
        follower.follow(asyncio.run(self.directory.newest(follower.table)))

    async def reports(self, method: str, *args: object) -> Sequence[Report]:
        self.asked.append(method)
        if not self.members:
            raise Unavailable("no replica runs")
        lost = Report(error=Unavailable("lost"))
        return [
            lost if name in self.lost else getattr(member.follower, method)(*args)
            for name, member in self.members.items()
        ]

    def load(self, alias: str, path: str, expected: str | None = None, pin: bool = False):
        return asyncio.run(self.directory.load(alias, path, expected, pin))

    def unload(self, alias: str, expected: str | None = None):
        return asyncio.run(self.directory.unload(alias, expected))

    def say(self, alias: str) -> dict[str, str]:
        return {name: member.says(alias) for name, member in self.members.items() if name not in self.lost}

    def _mount(self, member: Member) -> None:
        for path, content in self.disk.items():
            member.world.write(path, content)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members.values():
            member.world.close()
