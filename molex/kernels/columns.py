"""Columns: the experts of one layer as a kernel sees them.

Column c has an A row, a B column and an owner: h[t, c] = gate[t, expert_of_column[c]] * (A[row_of_column[c]] · x[t]).
LoRA blocks, rank-1 experts, a shared A (HydraLoRA) and a batch of adapters are all this. An expert's columns
are contiguous, experts come in order. Scales are folded into the routing's weights before a kernel is called.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Columns(NamedTuple):
    A: Tensor  # (C, D), or fewer rows where columns share them
    B: Tensor  # (O, C)
    ranks: tuple[int, ...]  # of each expert; their sum is C
    expert_of_column: Tensor  # (C,) int64
    row_of_column: Tensor | None = None  # (C,) int64; None = column c has row c

    def to(self, dtype: torch.dtype) -> "Columns":
        """The factors in the dtype the products run in; master weights may be wider."""
        return self._replace(A=self.A.to(dtype), B=self.B.to(dtype))

    def shrink(self, x: Tensor) -> Tensor:
        """A x for every column: (..., D) -> (..., C)."""
        hidden = F.linear(x, self.A)
        return hidden if self.row_of_column is None else hidden[..., self.row_of_column]

    def expert(self, expert_id: int) -> tuple[Tensor, Tensor]:
        """(R, D) and (O, R) of one expert."""
        start = sum(self.ranks[:expert_id])
        own = slice(start, start + self.ranks[expert_id])
        A_RD = self.A[own] if self.row_of_column is None else self.A[self.row_of_column[own]]
        return A_RD, self.B[:, own]

    def gate(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """Every column times its expert's gate: (..., T, C), (..., T, E) -> (..., T, C)."""
        return gate(hidden, gates, self.expert_of_column, self.uniform_rank())

    def uniform_rank(self) -> int | None:
        """R where every expert has the same rank, else None."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else None


def gate(hidden: Tensor, gates: Tensor, expert_of_column: Tensor, rank: int | None) -> Tensor:
    """Every column times its expert's gate: (..., T, C), (..., T, E) -> (..., T, C), in the wider of both dtypes.

    rank: of every expert, where all have the same.
    """
    if rank is None:
        return hidden * gates[..., expert_of_column]
    return (hidden.unflatten(-1, (gates.shape[-1], rank)) * gates[..., None]).flatten(-2)


def columns_of(ranks: tuple[int, ...]) -> Tensor:
    """expert_of_column (C,) for experts of these ranks."""
    return torch.tensor([expert_id for expert_id, rank in enumerate(ranks) for _ in range(rank)])
