# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr)
"""Rerouting and counting in one launch: on a GPU what costs is launches, not the few thousand ids of a step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.tiles import on_its_device

BLOCK = 256  # pairs of a program


@triton.jit
def reroute_kernel(
    table_ptr: tl.tensor,  # (H + 1, M) int32
    handles_ptr: tl.tensor,  # (T,)
    ids_ptr: tl.tensor,  # (T, K)
    slots_ptr: tl.tensor,  # (T, K) int32
    counts_ptr: tl.tensor,  # (S,) int32, zeros
    N: tl.tensor,  # T K
    K: tl.tensor,
    M: tl.tensor,
    BLOCK: tl.constexpr,
):
    """Program (block of pairs). Whole numbers are added, so their order does not matter."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = pair < N
    handle = tl.load(handles_ptr + pair // K, real, other=0)
    expert = tl.load(ids_ptr + pair, real, other=0)
    slot = tl.load(table_ptr + handle * M + expert, real, other=0)
    tl.store(slots_ptr + pair, slot, real)
    tl.atomic_add(counts_ptr + slot, 1, real)


@on_its_device
def launch_reroute(table: Tensor, handles: Tensor, ids: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    table, handles, ids = table.contiguous(), handles.contiguous(), ids.contiguous()
    slots = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    counts = torch.zeros(num_slots, dtype=torch.int32, device=ids.device)
    if ids.numel():
        reroute_kernel[(triton.cdiv(ids.numel(), BLOCK),)](
            *(table, handles, ids, slots, counts),
            *(ids.numel(), ids.shape[1], table.shape[1]),
            BLOCK=BLOCK,
        )
    return slots, counts


@torch.library.custom_op("molex::reroute", mutates_args=())
def fused_reroute(table: Tensor, handles: Tensor, ids: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """slots (T, K) and counts (S,), as `reroute` has them."""
    return launch_reroute(table, handles, ids, num_slots)


@fused_reroute.register_fake
def _(table: Tensor, handles: Tensor, ids: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape, dtype=torch.int32), ids.new_empty(num_slots, dtype=torch.int32)
