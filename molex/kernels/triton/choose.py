# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""Adds float32 planes, chooses experts and gates: the second half of routing inside kernels.

    route_gate   ids = top-k of l;  w = softmax(l)[ids], renormalised or not;  g[t, c] = s_e w_e h[t, c]
    self_gate    ids = top-k of |h + bias| (rank-1 experts route by what they computed, FlyLoRA);  g = s h on the chosen

Of equal scores the lowest expert is chosen; NaN counts as the largest, as in torch.topk, and so is seen.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.tiles import block, must_widen, on_its_device, rounded

SCORES = 256  # most that a program chooses among, or gates


@triton.jit
def added_planes(
    planes_ptr: tl.tensor,
    t: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    T: tl.tensor,
    width: tl.tensor,
    num_planes: tl.tensor,
) -> tl.tensor:
    """The sum of planes (T, width) at (t, column), the first plane first."""
    total = tl.load(planes_ptr + t * width + column, mask, other=0.0)
    for plane in range(1, num_planes):
        total += tl.load(planes_ptr + (plane * T + t) * width + column, mask, other=0.0)
    return total


@triton.jit
def top_k(
    scores: tl.tensor,
    index: tl.tensor,
    ids_ptrs: tl.tensor,
    mask: tl.tensor,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Stores the ids (T, K), best first, and returns who was chosen (T, SIZE)."""
    scores = tl.where(scores == scores, scores, float("inf"))
    chosen = tl.zeros_like(scores) > 0
    for k in tl.static_range(TOP_K):
        left = tl.where(chosen, float("-inf"), scores)
        best = tl.max(left, axis=1, keep_dims=True)
        first = tl.min(tl.where((left == best) & ~chosen, index, SIZE), axis=1, keep_dims=True)
        tl.store(ids_ptrs + k, first.to(tl.int64), mask)
        chosen = chosen | (index == first)
    return chosen


@triton.jit
def route_gate_kernel(
    planes_ptr: tl.tensor,  # (planes, T, C + E)
    scale_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    T: tl.tensor,
    C: tl.tensor,
    E: tl.tensor,
    num_planes: tl.tensor,
    UP: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program (tile of T). weights (T, E) are zero where an expert was not chosen."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c, e = tl.arange(0, BLOCK_C)[None, :], tl.arange(0, BLOCK_E)[None, :]
    c_mask, e_mask = (t < T) & (c < C), (t < T) & (e < E)
    logits = added_planes(planes_ptr, t, C + e, e_mask, T, C + E, num_planes)
    tl.store(logits_ptr + t * E + e, logits, e_mask)
    scores = tl.where(e < E, logits, float("-inf"))
    shares = tl.exp(scores - tl.max(scores, axis=1, keep_dims=True))
    weights = tl.where(top_k(scores, e, ids_ptr + t * TOP_K, t < T, TOP_K, BLOCK_E), shares, 0.0)
    weights /= tl.sum(weights if RENORMALISE else shares, axis=1, keep_dims=True)
    tl.store(weights_ptr + t * E + e, weights, e_mask)
    expert = tl.load(expert_ptr + c, c < C, other=0).to(tl.int32)
    gates = tl.gather(weights, tl.broadcast_to(expert, (BLOCK_T, BLOCK_C)), axis=1) * tl.load(scale_ptr + expert)
    hidden = added_planes(planes_ptr, t, c, c_mask, T, C + E, num_planes)
    tl.store(hidden_ptr + t * C + c, rounded(hidden, UP), c_mask)
    tl.store(gated_ptr + t * C + c, rounded(hidden * gates, UP), c_mask)


@triton.jit
def self_gate_kernel(
    planes_ptr: tl.tensor,  # (planes, T, C)
    bias_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    T: tl.tensor,
    C: tl.tensor,
    num_planes: tl.tensor,
    UP: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (tile of T)."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (t < T) & (c < C)
    hidden = added_planes(planes_ptr, t, c, mask, T, C, num_planes)
    stored = rounded(hidden, UP).to(
        hidden_ptr.dtype.element_ty
    )  # what a router outside would read, so that both choose alike
    scores = stored.to(tl.float32) + tl.load(bias_ptr + c, c < C, other=0.0)
    scores = tl.where(c < C, scores if SIGNED else tl.abs(scores), float("-inf"))
    chosen = top_k(scores, c, ids_ptr + t * TOP_K, t < T, TOP_K, BLOCK_C)
    scale = tl.load(scale_ptr + c, c < C, other=0.0)
    tl.store(hidden_ptr + t * C + c, stored, mask)
    tl.store(gated_ptr + t * C + c, rounded(tl.where(chosen, hidden * scale, 0.0), UP), mask)


class Routed(NamedTuple):
    """What routing inside kernels leaves behind."""

    hidden: Tensor  # (T, C)
    gated: Tensor  # (T, C)
    expert_ids: Tensor  # (T, K) int64, best first
    weights: Tensor  # (T, E) float32, before the scale; zero where not chosen
    logits: Tensor  # (T, E) float32


def choose_rows(size: int) -> int:
    """BLOCK_T for programs that hold `size` scores or columns a row."""
    return max(1, 1024 // size)


@on_its_device
def launch_route_gate(
    planes: Tensor,
    scale: Tensor,
    expert_of_column: Tensor,
    dtype: torch.dtype,
    num_chosen: int,
    renormalise: bool,
) -> Routed:
    """planes (splits, T, C + E), scale (E,) float32."""
    (num_planes, num_tokens, width), num_columns = planes.shape, len(expert_of_column)
    num_experts = width - num_columns
    hidden = torch.empty(num_tokens, num_columns, dtype=dtype, device=planes.device)
    ids = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=planes.device)
    weights = planes.new_empty(num_tokens, num_experts)
    routed = Routed(hidden, torch.empty_like(hidden), ids, weights, torch.empty_like(weights))
    BLOCK_C, BLOCK_E = block(num_columns, SCORES), block(num_experts, SCORES)
    BLOCK_T = choose_rows(max(BLOCK_C, BLOCK_E))
    if num_tokens:
        route_gate_kernel[(triton.cdiv(num_tokens, BLOCK_T),)](
            *(planes, scale, expert_of_column, *routed, num_tokens, num_columns, num_experts, num_planes),
            UP=must_widen(dtype),
            TOP_K=num_chosen,
            RENORMALISE=renormalise,
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
            BLOCK_E=BLOCK_E,
        )
    return routed


@on_its_device
def launch_self_gate(
    planes: Tensor, bias: Tensor, scale: Tensor, dtype: torch.dtype, num_chosen: int, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """planes (splits, T, C), bias and scale (C,) float32 -> hidden, gated (T, C), ids (T, K)."""
    num_planes, num_tokens, num_columns = planes.shape
    hidden = torch.empty(num_tokens, num_columns, dtype=dtype, device=planes.device)
    gated, ids = torch.empty_like(hidden), torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=planes.device)
    BLOCK_C = block(num_columns, SCORES)
    if num_tokens:
        self_gate_kernel[(triton.cdiv(num_tokens, choose_rows(BLOCK_C)),)](
            *(planes, bias, scale, hidden, gated, ids, num_tokens, num_columns, num_planes),
            UP=must_widen(dtype),
            TOP_K=num_chosen,
            SIGNED=signed,
            BLOCK_T=choose_rows(BLOCK_C),
            BLOCK_C=BLOCK_C,
        )
    return hidden, gated, ids
