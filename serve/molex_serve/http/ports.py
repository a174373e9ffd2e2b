"""What the HTTP face asks of the adapters behind it. The registry has it; tests put something simple in its place.

Every method may be called from any thread. Those that may take time (`resolve`, `load`, `unload`, `release`) are
called on worker threads, never on the event loop and never on the engine's thread.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

Residency = Literal["disk", "host", "device"]


class Lease(Protocol):
    """An adapter that stays on the device, as this generation, until it is released: exactly once, and only after the
    last event of every request that names its handle."""

    @property
    def alias(self) -> str: ...
    @property
    def handle(self) -> int: ...
    @property
    def generation(self) -> str: ...

    def release(self) -> None: ...


class Listed(Protocol):
    """An alias as clients see it. kind and generation are empty until it was read for the first time."""

    @property
    def alias(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def generation(self) -> str: ...
    @property
    def residency(self) -> Residency: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def num_bytes(self) -> int: ...


class Adapters(Protocol):
    def resolve(self, name: str) -> Lease:
        """An alias' present generation, made resident first where it is not. Raises UnknownAdapter, LoadBusy,
        BadAdapter."""
        ...

    def listing(self) -> Sequence[Listed]:
        """Every alias, by name. Does not wait for a load."""
        ...

    def load(self, alias: str, path: str, expected_generation: str | None, pin: bool) -> Listed:
        """Gives an alias a new generation, read from a folder. expected_generation: the one it must have now, "" = the
        alias must be new, None = any. Raises Conflict, BadAdapter, LoadBusy; then the alias is as it was."""
        ...

    def unload(self, alias: str, expected_generation: str | None) -> None:
        """Forgets an alias; requests that hold a lease finish. Raises UnknownAdapter, Conflict."""
        ...
