"""One registry class for all that has a name in a configuration: routers, experts, losses, presets, backends.

A name is registered once, by a decorator over the thing itself; an unknown name is an error that lists the
known ones. This is what makes a new router cost one file and one import line.
"""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from molex.checks import near_and_known
from molex.errors import ConfigError

T = TypeVar("T")
Item = TypeVar("Item")


class Registry(Generic[T]):
    """Names to things of one `kind` ("router", "experts", "loss", "preset", "backend")."""

    def __init__(self, kind: str):
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Item], Item]:
        """Decorator. Raises ConfigError when the name is taken."""

        def add(item: Item) -> Item:
            if name in self._items:
                raise ConfigError(f"{self.kind} {name!r} is registered already; choose another name")
            self._items[name] = cast(T, item)
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if not isinstance(name, str) or name not in self._items:
            raise ConfigError(f"unknown {self.kind} {name!r}{near_and_known(name, self._items)}")
        return self._items[name]

    def name_of(self, item: T) -> str:
        """The name something was registered under."""
        return next(name for name, known in self._items.items() if known is item)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
