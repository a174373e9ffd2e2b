"""What the ingress asks of the other deployments. Ray's handles have it; tests put something simple in their place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request

from molex_serve.errors import Unavailable
from molex_serve.scale.exchange import Call, Head
from molex_serve.scale.table import Outcome, Report


class Full(Unavailable):
    """Every replica has as many requests as it may, and so has the queue before them: try again."""

    code, retry_after = "overloaded", 1


class Answer(Protocol):
    """The head, then parts of the body. Raises Full where no replica takes the call, and Unavailable where the one that
    did is lost. cancel: the client is gone, and so shall the request be; at any time, and more than once."""

    async def __anext__(self) -> Head | bytes: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True)
class Figures:
    """A replica's metrics, as Prometheus reads them."""

    replica: str
    text: str


class Replicas(Protocol):
    async def reports(self, method: str, *args: object) -> Sequence[Report]:
        """What each of those that run answers to this call. Raises Unavailable where none runs."""
        ...


class Engines(Replicas, Protocol):
    def ask(self, call: Call, key: str) -> Answer:
        """One replica's answer: by preference one that got this key lately, "" = any."""
        ...

    async def figures(self) -> Sequence[Figures]: ...

    async def running(self) -> int:
        """How many replicas there are."""
        ...


class Directory(Protocol):
    """All raise Unavailable where it does not answer."""

    async def load(self, alias: str, path: str, expected_generation: str | None, pin: bool) -> Outcome: ...

    async def unload(self, alias: str, expected_generation: str | None) -> Outcome: ...

    async def aliases(self) -> frozenset[str]: ...


def engines_of(request: Request) -> Engines:
    return request.app.state.engines


def directory_of(request: Request) -> Directory:
    return request.app.state.directory
