"""Who is inside: once the server is told to stop, nobody comes in any more, and it waits for those who are."""

from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Used on the event loop alone, but for `close`, which a signal may call."""

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0

    def close(self) -> None:
        self.closed = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
