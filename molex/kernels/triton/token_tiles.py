"""Tokens in the order of their sets of experts, and for each tile of them the columns that it needs.

A tile of 64 tokens in the order they came needs nearly all of many experts; of neighbours in this order, few: with 64
experts and 2 a token 17 instead of 56 (of 8192 random ones). The order is by each token's rarest expert, then the next:
tokens of a popular expert are many and stay together anyway.

Everything here is torch on small tensors whose shapes do not depend on the routing; nothing waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS, COLUMNS = 64, 16  # of a tile, of a block


class TokenTiles(NamedTuple):
    """Of T tokens in tiles of ROWS, of C columns in blocks of COLUMNS."""

    order: Tensor  # (T,) int64: which token is the n-th
    blocks: Tensor  # (tiles, blocks) int32: first those that a tile needs, ascending
    counts: Tensor  # (tiles,) int32: how many it needs


class ExpertTiles(NamedTuple):
    """The same with experts instead of blocks."""

    order: Tensor  # (T,) int64
    experts: Tensor  # (tiles, E) int32: first those that a tile needs, ascending
    counts: Tensor  # (tiles,) int32


def tile_tokens(expert_ids: Tensor, expert_of_column: Tensor, num_experts: int) -> TokenTiles:
    """expert_ids (T, K), -1 = nobody."""
    order_T = set_order(expert_ids, num_experts)
    asks = asked(expert_ids[order_T], num_experts)
    num_columns = expert_of_column.shape[0]
    block_C = torch.arange(num_columns, device=expert_ids.device) // COLUMNS
    owns = asks.new_zeros(num_experts, -(-num_columns // COLUMNS))
    owns = owns.index_put((expert_of_column, block_C), asks.new_ones(()))
    return TokenTiles(order_T, *needed_first(asks @ owns > 0))


def tile_experts(expert_ids: Tensor, num_experts: int) -> ExpertTiles:
    """expert_ids (T, K), -1 = nobody."""
    order_T = set_order(expert_ids, num_experts)
    return ExpertTiles(order_T, *needed_first(asked(expert_ids[order_T], num_experts) > 0))


def asked(ids: Tensor, num_experts: int) -> Tensor:
    """(tiles, E) float32: 1 where a tile of these tokens (T, K) has chosen the expert."""
    num_tokens = ids.shape[0]
    ids_TK = ids.where(ids >= 0, num_experts)
    tile_TK = (torch.arange(num_tokens, device=ids.device) // ROWS)[:, None].expand_as(ids_TK)
    asks = torch.zeros(-(-num_tokens // ROWS), num_experts + 1, device=ids.device)
    return asks.index_put((tile_TK, ids_TK), asks.new_ones(()))[:, :num_experts]


def needed_first(needs: Tensor) -> tuple[Tensor, Tensor]:
    """(tiles, N) bool -> which of N each tile needs, ascending, before the others; and how many."""
    listed = needs.to(torch.int32).argsort(dim=1, descending=True, stable=True)
    return listed.to(torch.int32), needs.sum(1, dtype=torch.int32)


def set_order(expert_ids: Tensor, num_experts: int) -> Tensor:
    """(T,): tokens sorted by their experts' rarity, the rarest expert first, nobody last."""
    slots_TK = expert_ids.where(expert_ids >= 0, num_experts)
    served_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    served_E = served_E.index_add(0, slots_TK.flatten(), torch.ones_like(slots_TK.flatten()))
    rarity_E = served_E[:num_experts].argsort(stable=True).argsort(stable=True)
    rarity_E = torch.cat([rarity_E, rarity_E.new_full((1,), num_experts)])
    digits_TK = rarity_E[slots_TK].sort(dim=1).values
    num_digits = min(digits_TK.shape[1], 62 // (num_experts + 1).bit_length())  # as many as one int64 holds
    key_T = torch.zeros(expert_ids.shape[0], dtype=torch.int64, device=expert_ids.device)
    for k in range(num_digits):
        key_T = key_T * (num_experts + 1) + digits_TK[:, k]
    return key_T.argsort(stable=True)
