"""Arenas of the main memory: an anonymous private mapping, whose pages the kernel makes when they are first written.

Reserving takes no time and no memory; reading a page that nobody wrote finds the kernel's page of zeros; MADV_DONTNEED
gives pages back. Nothing is done on commit.
"""

import mmap
import sys
from contextlib import suppress

import torch

from molex.errors import BackendError
from molex_serve.memory.base import PagedArena

NO_RESERVE = 0x4000  # MAP_NORESERVE, a name in Python from 3.13 on: no swap is set aside


class MappedArena(PagedArena):
    """The mapping belongs to the tensor's storage and is unmapped with it: it is never closed, which would leave live
    tensors without memory. Raises BackendError where so many addresses cannot be had."""

    page_bytes = mmap.PAGESIZE

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__(shape, dtype)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        try:
            self._memory = mmap.mmap(-1, self.num_bytes, flags=flags)
        except (OSError, OverflowError) as error:
            raise BackendError(
                f"{self.num_bytes / 2**30:.1f} GiB of addresses cannot be reserved: {error}; allow fewer columns or "
                "expert slots, or set vm.overcommit_memory to 0 or 1"
            ) from error
        with suppress(OSError):  # a kernel without huge pages refuses
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)  # one column would take 2 MiB
        self.tensor = torch.frombuffer(self._memory, dtype=dtype).view(shape)

    def _map(self, pages: range) -> None:
        """The kernel does, at the first write."""

    def _unmap(self, pages: range) -> None:
        size = min(pages.stop * self.page_bytes, self.num_bytes) - pages.start * self.page_bytes
        self._memory.madvise(mmap.MADV_DONTNEED, pages.start * self.page_bytes, size)


def why_not() -> str | None:
    """Why there is no such arena on this system."""
    return None if sys.platform == "linux" else f"{sys.platform} has no MADV_DONTNEED that zeroes"
