"""Which tokens go through which experts of a feed-forward block: tiles of tokens, and tokens expert by expert.

An expert is known by its first column. This needs no number of experts, which nobody could tell without waiting for the
device: there are at most as many as columns. Experts without a column add nothing and are taken for nobody.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from molex.kernels.triton.token_tiles import tile_experts


class Plan(NamedTuple):
    """Of T tokens, K slots and C columns."""

    order: Tensor  # (T,) int64: which token is the n-th
    experts: Tensor  # (tiles, C) int32: the experts that a tile needs, first the needed ones
    counts: Tensor  # (tiles,) int32: how many it needs
    slots: Tensor  # (T, C) int16: which slot of a token the expert that begins here has, -1 = none
    firsts: Tensor  # (C,) int32: the first column of each column's expert
    lasts: Tensor  # (C,) int32: the one after its last
    served: Tensor  # (T, K) bool: whether the slot has an expert

    def chosen(self) -> Tensor:
        """(T, C) bool: whether a token has chosen the expert of a column."""
        return self.slots[:, self.firsts.long()] >= 0


class Pairs(NamedTuple):
    """(token, slot) pairs in the order of their experts, then of their tokens: k of token t has the number t K + k."""

    experts: Tensor  # (C,) int32: every expert that there is, chosen or not, ascending
    count: Tensor  # (1,) int32: how many
    order: Tensor  # (T K,) int32: which pair is the n-th; nobody's are the last
    ends: Tensor  # (C,) int32: where in order the pairs of the expert that begins here end


def first_columns(expert_ids: Tensor, expert_of_column: Tensor) -> Tensor:
    """(T, K): the first column of each chosen expert, -1 where there is none. expert_of_column counts up."""
    num_columns = expert_of_column.shape[0]
    if num_columns == 0:
        return torch.full_like(expert_ids, -1)
    first_TK = torch.searchsorted(expert_of_column, expert_ids.contiguous())
    owner_TK = expert_of_column[first_TK.clamp(max=num_columns - 1)]
    return first_TK.where((first_TK < num_columns) & (owner_TK == expert_ids), -1)


def plan_tiles(first: Tensor, expert_of_column: Tensor) -> Plan:
    """first (T, K) as `first_columns` gives it."""
    (num_tokens, num_slots), num_columns = first.shape, expert_of_column.shape[0]
    slot_TK = torch.arange(num_slots, device=first.device, dtype=torch.int16).expand(num_tokens, -1)
    slots = torch.full((num_tokens, num_columns + 1), -1, dtype=torch.int16, device=first.device)
    slots = slots.scatter(1, first.where(first >= 0, num_columns), slot_TK)[:, :num_columns].contiguous()
    firsts, lasts = (
        torch.searchsorted(expert_of_column, expert_of_column, right=right).to(torch.int32) for right in (False, True)
    )
    return Plan(*tile_experts(first, num_columns), slots, firsts, lasts, first >= 0)


def plan_pairs(first: Tensor, expert_of_column: Tensor) -> Pairs:
    num_columns = expert_of_column.shape[0]
    column = torch.arange(num_columns, device=first.device)
    begins = torch.searchsorted(expert_of_column, expert_of_column) == column
    experts = begins.to(torch.int32).argsort(descending=True, stable=True)  # CUDA sorts no bool
    sorted_N, order_N = first.where(first >= 0, num_columns).flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_N, column, right=True)
    return Pairs._make(table.to(torch.int32) for table in (experts, begins.sum(0, keepdim=True), order_N, ends))
