"""Arenas where nothing better is: an ordinary tensor, all of it there from the beginning."""

import torch

from molex_serve.memory.base import Arena


class EagerArena(Arena):
    """Commits and releases are kept track of, and change nothing but the rows' content."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        super().__init__(shape, dtype)
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def committed_bytes(self) -> int:
        return self.num_bytes

    def _commit(self, start: int, stop: int) -> None:
        """It is there."""

    def _release(self, start: int, stop: int) -> None:
        self._zero(start * self.row_bytes, stop * self.row_bytes)
