"""Who is being served: every request, from when it was accepted to its last event, of which it gets exactly one."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from molex_serve.engine.attribution import Dominant
from molex_serve.engine.base import Deliver, Event, ExpertShare, FinishReason, Request, TokenLogprob
from molex_serve.engine.grammar import Matcher
from molex_serve.engine.logprobs import Logprobs
from molex_serve.errors import BadRequest, Overloaded, Unavailable

logger = logging.getLogger("molex")


@dataclass(eq=False)
class Live:
    """A request that has not had its last event. key: its name inside the engine, never used twice. ends: tokens by
    which it stops. begun: its turn has come. leaving: it gives its place back before the next step."""

    request: Request
    deliver: Deliver
    ends: frozenset[int]
    seed: int
    matcher: Matcher | None = None
    key: str = ""
    delivered: int = 0
    begun: bool = False
    leaving: bool = False
    logprobs: dict[int, tuple[Logprobs, int]] = field(default_factory=dict)  # of which position, in which row
    experts: dict[int, tuple[Dominant, int]] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> "Live":
        """Who starts a request anew copies its settings; it stays the same request."""
        return self

    def take_event(self, tokens: Sequence[int], finish_reason: FinishReason | None) -> Event:
        """Of the next tokens to be delivered."""
        first = len(self.request.prompt_ids) + self.delivered
        positions = range(first, first + len(tokens))
        self.delivered += len(tokens)
        return Event(tuple(tokens), self._take_logprobs(positions), self._take_experts(positions), finish_reason)

    def _take_logprobs(self, positions: range) -> tuple[TokenLogprob, ...]:
        num_top = self.request.sampling.logprobs
        if num_top is None:
            return ()
        found = [self.logprobs.pop(position) for position in positions]
        return tuple(rows.of_row(row, num_top) for rows, row in found)

    def _take_experts(self, positions: range) -> tuple[ExpertShare | None, ...]:
        found = [self.experts.pop(position, None) for position in positions]
        if not any(found):
            return ()
        return tuple(None if place is None else place[0].of_row(place[1]) for place in found)


class Roster:
    """most_waiting: requests that are not running. Events are delivered on the calling thread, outside of the lock."""

    def __init__(self, most_waiting: int, num_running: Callable[[], int]):
        self.most_waiting, self.num_running = most_waiting, num_running
        self._live: dict[str, Live] = {}
        self._keys: dict[str, str] = {}  # of which request's id
        self._names = count()
        self._refusal: str | None = "the engine was not started"
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._live)

    def open(self) -> None:
        self._refusal = None

    def refuse(self, why: str) -> None:
        """Accepts no request from now on."""
        with self._changed:
            self._refusal = why

    def enter(self, live: Live) -> None:
        """Raises Unavailable, Overloaded, BadRequest."""
        with self._changed:
            if self._refusal is not None:
                raise Unavailable(self._refusal)
            waiting = len(self._live) - self.num_running()
            if waiting >= self.most_waiting:
                raise Overloaded(f"{waiting} requests are waiting, as many as may")
            if live.request.id in self._keys:
                raise BadRequest(f"a request with id {live.request.id!r} is running already")
            live.key = self._keys[live.request.id] = str(next(self._names))
            self._live[live.key] = live

    def find(self, key: str) -> Live | None:
        return self._live.get(key)

    def ask_to_leave(self, request_id: str) -> bool:
        """False where it is over already."""
        with self._changed:
            key = self._keys.get(request_id)
            if key is not None:
                self._live[key].leaving = True
            return key is not None

    def ask_all_to_leave(self) -> None:
        with self._changed:
            for live in self._live.values():
                live.leaving = True

    def begin(self, live: Live) -> None:
        """Delivers, once, that its turn has come."""
        if not live.begun:
            live.begun = True
            self._hand(live, Event())

    def advance(self, live: Live, tokens: Sequence[int], finish_reason: FinishReason | None) -> None:
        """Delivers new tokens, unless the request is over."""
        if live.matcher is not None and live.matcher.error:
            self.finish(live, "error", f"the grammar cannot be followed: {live.matcher.error}")
        elif live.key in self._live:
            if finish_reason is not None:
                self._leave(live)
            self._hand(live, live.take_event(tokens, finish_reason))

    def finish(self, live: Live, finish_reason: FinishReason, error: str | None = None) -> None:
        """The last event, without tokens, unless it had one."""
        if self._leave(live):
            self._hand(live, Event(finish_reason=finish_reason, error=error))

    def close(self, why: str) -> None:
        """Refuses requests from now on; those that are left end with an error."""
        self.refuse(why)
        for live in list(self._live.values()):
            self.finish(live, "error", why)

    def wait_until_empty(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout=seconds)

    def _leave(self, live: Live) -> bool:
        with self._changed:
            live.leaving = True
            if self._live.pop(live.key, None) is None:
                return False
            del self._keys[live.request.id]
            self._changed.notify_all()
            return True

    def _hand(self, live: Live, event: Event) -> None:
        try:
            live.deliver(event)
        except Exception:  # one listener that fails, such as one whose loop is closed, must not end all requests
            logger.exception("request %s: its listener failed, so it is cancelled", live.request.id)
            self._leave(live)
