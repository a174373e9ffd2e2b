"""Rerouting: a router's expert ids become slots of the pool, each token by its own adapter's row of the table.

    slots[t, k] = table[handles[t], ids[t, k]]        counts[s] = how many pairs (t, k) have slot s

One gather. The counts are what grouped products need, and say how many different experts a step reads.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor


class Rerouted(NamedTuple):
    slots: Tensor  # (T, K) int32
    counts: Tensor  # (S,) int32


def reroute(table: Tensor, handles: Tensor, ids: Tensor, num_slots: int) -> Rerouted:
    """table (H + 1, M) int32, handles (T,), ids (T, K) int64. Nothing waits for the device."""
    if ids.is_cuda and find_spec("triton"):
        from molex_serve.model.reroute_triton import fused_reroute

        return Rerouted(*fused_reroute(table, handles, ids, num_slots))
    slots_TK = table[handles[:, None], ids]
    counts = torch.zeros(num_slots, dtype=torch.int32, device=ids.device)
    return Rerouted(slots_TK, counts.index_add_(0, slots_TK.flatten(), torch.ones_like(slots_TK.flatten())))
