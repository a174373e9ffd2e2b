"""What an arena is: a tensor of which only the rows in use cost memory.

Rows that nobody committed read as zeros and are never written. Arenas are changed between steps, by one thread.
"""

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor


class Arena(ABC):
    """tensor (N, …), contiguous: its address never changes, so views and captured graphs of it stay valid."""

    tensor: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        assert min(shape) > 0, f"an arena of shape {shape} holds nothing"
        self.row_bytes = prod(shape[1:]) * dtype.itemsize
        self.num_bytes = shape[0] * self.row_bytes
        self._rows = bytearray(shape[0])  # 1 where committed

    def commit(self, start: int, stop: int) -> None:
        """Gives rows [start, stop), none of which is committed, memory to be written; they are zeros. Raises
        BackendError where there is none; then nothing has changed."""
        assert 0 <= start < stop <= len(self._rows), (start, stop)
        assert not any(self._rows[start:stop]), f"some of rows {start} to {stop} are committed already"
        self._commit(start, stop)
        self._rows[start:stop] = b"\1" * (stop - start)

    def release(self, start: int, stop: int) -> None:
        """Takes back the memory of rows [start, stop), all of them committed; they are zeros again."""
        assert 0 <= start < stop <= len(self._rows), (start, stop)
        assert all(self._rows[start:stop]), f"some of rows {start} to {stop} are not committed"
        self._release(start, stop)
        self._rows[start:stop] = bytes(stop - start)

    def close(self) -> None:
        """Releases every row. Who still holds a view reads zeros; addresses go with the last view."""
        while (start := self._rows.find(1)) >= 0:
            stop = self._rows.find(0, start)
            self.release(start, stop if stop > 0 else len(self._rows))

    @property
    @abstractmethod
    def committed_bytes(self) -> int:
        """Of memory that belongs to committed rows, in whole pages."""

    @abstractmethod
    def _commit(self, start: int, stop: int) -> None: ...

    @abstractmethod
    def _release(self, start: int, stop: int) -> None: ...

    def _zero(self, start: int, stop: int) -> None:
        """Bytes [start, stop) of the tensor; nothing where stop is not behind start."""
        self.tensor.view(-1).view(torch.uint8)[start:stop].zero_()


class PagedArena(Arena):
    """Over memory that comes in pages. A page is there as long as one of the rows on it is committed: neighbours share
    the pages at their boundaries."""

    page_bytes: int
    _num_pages = 0

    @property
    def committed_bytes(self) -> int:
        return self._num_pages * self.page_bytes

    def _own_pages(self, start: int, stop: int) -> range:
        """That hold some of rows [start, stop), and of no other committed row."""
        first, end = start * self.row_bytes // self.page_bytes, -(-stop * self.row_bytes // self.page_bytes)
        before, after = first * self.page_bytes // self.row_bytes, -(-end * self.page_bytes // self.row_bytes)
        first += any(self._rows[before:start])
        end -= any(self._rows[stop:after])
        return range(first, max(first, end))

    def _commit(self, start: int, stop: int) -> None:
        own = self._own_pages(start, stop)
        self._map(own)
        self._num_pages += len(own)

    def _release(self, start: int, stop: int) -> None:
        own = self._own_pages(start, stop)
        begin, end = start * self.row_bytes, stop * self.row_bytes
        if own:
            self._zero(begin, own.start * self.page_bytes)
            self._zero(own.stop * self.page_bytes, end)
            self._unmap(own)
            self._num_pages -= len(own)
        else:
            self._zero(begin, end)

    @abstractmethod
    def _map(self, pages: range) -> None:
        """Gives pages memory of their own, zeros. Raises BackendError where there is none; then nothing has changed."""

    @abstractmethod
    def _unmap(self, pages: range) -> None:
        """Takes it back: they read as zeros."""
