"""(token, slot) pairs sorted by expert, slot by slot, and cut into tiles of one expert each: indices, no copied rows.

Each slot is sorted apart, so that a token stands in it at most once: a pass over one slot may add to the rows of y
without atomics. How many tiles are needed depends on the routing: there are as many as could be, some of them empty,
and nothing waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # pairs in a tile


class PairTiles(NamedTuple):
    """Of K slots and E experts. Nobody's pairs are in no tile."""

    order: Tensor  # (K, T) int64: tokens by expert, nobody's last
    ends: Tensor  # (K, E) int64: where each expert's tokens end in order
    expert: Tensor  # (K, tiles) int64
    first: Tensor  # (K, tiles) int64, where in order the tile begins
    last: Tensor  # (K, tiles) int64, exclusive; equal to first where the tile is not needed
    start_of_expert: Tensor  # (E + 1,) int64: expert e has the columns from start[e] to start[e + 1]


def tile_pairs(expert_ids: Tensor, expert_of_column: Tensor, num_experts: int) -> PairTiles:
    """expert_ids (T, K), -1 = nobody. expert_of_column counts up."""
    slots_KT = expert_ids.where(expert_ids >= 0, num_experts).T.contiguous()
    num_slots, num_tokens = slots_KT.shape
    sorted_KT, order_KT = slots_KT.sort(dim=1, stable=True)
    experts_KE = torch.arange(num_experts, device=expert_ids.device).expand(num_slots, -1).contiguous()
    ends_KE = torch.searchsorted(sorted_KT, experts_KE, right=True)
    served_KE = ends_KE - torch.searchsorted(sorted_KT, experts_KE)
    tiles_KE = (served_KE + ROWS - 1) // ROWS
    tile_ends_KE = tiles_KE.cumsum(1)
    most = num_tokens // ROWS + min(num_experts, num_tokens)
    tile = torch.arange(most, device=expert_ids.device).expand(num_slots, -1).contiguous()
    found = torch.searchsorted(tile_ends_KE, tile, right=True)
    expert = found.clamp(max=num_experts - 1)
    end = ends_KE.gather(1, expert)
    number = tile - (tile_ends_KE - tiles_KE).gather(1, expert)  # among its expert's tiles
    first = (end - served_KE.gather(1, expert) + number * ROWS).where(found < num_experts, end)
    start_of_expert = torch.searchsorted(expert_of_column, torch.arange(num_experts + 1, device=expert_ids.device))
    return PairTiles(order_KT, ends_KE, expert, first, (first + ROWS).minimum(end), start_of_expert)
