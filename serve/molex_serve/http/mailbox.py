"""Calls from other threads onto the event loop, many by one wake-up: a step brings news for many requests."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress


class Mailbox:
    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._calls: deque[Callable[[], object]] = deque()
        self._woken = False

    def put(self, call: Callable[[], object]) -> None:
        """From any thread; calls come in this order."""
        self._calls.append(call)
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody is left who would want to know
                self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._woken = False  # before, so that what comes from now on wakes us again
        while self._calls:
            self._loop.call_soon(self._calls.popleft())
