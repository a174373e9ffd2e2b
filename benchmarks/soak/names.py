"""Which generations an alias may name, as far as one can tell from outside while others change it."""

from collections.abc import Iterator
from contextlib import contextmanager

NOBODY = ""  # the generation of an alias that is not there


class Names:
    """A change that is under way may have happened already, or not yet."""

    def __init__(self) -> None:
        self._now: dict[str, set[str]] = {}
        self._watching: dict[str, list[set[str]]] = {}

    @contextmanager
    def watched(self, alias: str) -> Iterator[set[str]]:
        """All that the alias may name at any time within."""
        seen = set(self.now(alias))
        self._watching.setdefault(alias, []).append(seen)
        try:
            yield seen
        finally:
            self._watching[alias] = [other for other in self._watching[alias] if other is not seen]

    def now(self, alias: str) -> frozenset[str]:
        return frozenset(self._now.get(alias, {NOBODY}))

    def becomes(self, alias: str, *generations: str) -> None:
        """From now on it may be any of these."""
        self._now[alias] = set(generations)
        for seen in self._watching.get(alias, ()):
            seen |= self._now[alias]
