"""Which waiting requests may start, where a step has places for a few different adapters.

In order of arrival: a request of the base always may; one of an adapter that is running may, too; one of another
takes a place where there is one. An adapter that waited for a place for longer than `patience` steps stops the others:
those that run get no further request, so one of them runs out, and its place goes to who waited longest.
"""

from collections.abc import Iterable, Sequence

from molex_serve.model.step import BASE


class Places:
    """limit: different adapters at once."""

    def __init__(self, limit: int, patience: int):
        self.limit, self.patience = limit, patience
        self._step = 0
        self._waits_since: dict[int, int] = {}

    def begin_step(self) -> None:
        self._step += 1

    def may_start(self, running: Iterable[int], waiting: Sequence[int]) -> list[bool]:
        """For the handles of waiting requests, in order of arrival, beside those of running ones."""
        held = set(running) - {BASE}
        places = self.limit - len(held)
        others = dict.fromkeys(handle for handle in waiting if handle != BASE and handle not in held)
        placed = set(list(others)[: max(places, 0)])
        self._waits_since = {h: self._waits_since.get(h, self._step) for h in others if h not in placed}
        overdue = any(self._step - since >= self.patience for since in self._waits_since.values())
        return [handle == BASE or handle in placed or (handle in held and not overdue) for handle in waiting]
