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
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Everyone's place among the chosen, 0 for the best, TOP_K for who was not chosen: (T, SIZE)."""
    scores = tl.where(scores == scores, scores, float("inf"))
    place = tl.zeros_like(scores).to(tl.int32) + TOP_K
    for k in tl.static_range(TOP_K):
        left = tl.where(place < TOP_K, float("-inf"), scores)
        best = tl.max(left, axis=1, keep_dims=True)
        first = tl.min(tl.where((left == best) & (place == TOP_K), index, SIZE), axis=1, keep_dims=True)
        place = tl.where(index == first, k, place)
    return place


@triton.jit
def route_gate_kernel(
    planes_ptr: tl.tensor,  # (planes, T, C + E)
    scale_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    ids_ptr: tl.tensor,  # (T, K), and the weights
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
    """Program (tile of T)."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c, e = tl.arange(0, BLOCK_C)[None, :], tl.arange(0, BLOCK_E)[None, :]
    c_mask, e_mask = (t < T) & (c < C), (t < T) & (e < E)
    logits = added_planes(planes_ptr, t, C + e, e_mask, T, C + E, num_planes)
    tl.store(logits_ptr + t * E + e, logits, e_mask)
    scores = tl.where(e < E, logits, float("-inf"))
    shares = tl.exp(scores - tl.max(scores, axis=1, keep_dims=True))
    place = top_k(scores, e, TOP_K, BLOCK_E)
    weights = tl.where(place < TOP_K, shares, 0.0)
    weights /= tl.sum(weights if RENORMALISE else shares, axis=1, keep_dims=True)
    slot, chosen = t * TOP_K + place, (t < T) & (place < TOP_K)
    tl.store(ids_ptr + slot, tl.broadcast_to(e, (BLOCK_T, BLOCK_E)).to(tl.int64), chosen)
    tl.store(weights_ptr + slot, weights, chosen)
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
    ids_ptr: tl.tensor,  # (T, K), and the weights, which are 1
    weights_ptr: tl.tensor,
    scores_ptr: tl.tensor,
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
    # what a router outside would read, so that both choose alike
    stored = rounded(hidden, UP).to(hidden_ptr.dtype.element_ty)
    scores = stored.to(tl.float32) + tl.load(bias_ptr + c, c < C, other=0.0)
    scores = scores if SIGNED else tl.abs(scores)
    tl.store(scores_ptr + t * C + c, scores, mask)
    place = top_k(tl.where(c < C, scores, float("-inf")), c, TOP_K, BLOCK_C)
    slot, chosen = t * TOP_K + place, (t < T) & (place < TOP_K)
    tl.store(ids_ptr + slot, tl.broadcast_to(c, (BLOCK_T, BLOCK_C)).to(tl.int64), chosen)
    tl.store(weights_ptr + slot, 1.0, chosen)
    scale = tl.load(scale_ptr + c, c < C, other=0.0)
    tl.store(hidden_ptr + t * C + c, stored, mask)
    tl.store(gated_ptr + t * C + c, rounded(tl.where(place < TOP_K, hidden * scale, 0.0), UP), mask)


class Routed(NamedTuple):
    """What routing inside kernels leaves behind."""

    hidden: Tensor  # (T, C)
    gated: Tensor  # (T, C)
    expert_ids: Tensor  # (T, K) int64, best first
    weights: Tensor  # (T, K) float32, before the scale
    logits: Tensor  # (T, E) float32, by which they were chosen

    @staticmethod
    def empty(num_columns: int, num_experts: int, num_chosen: int, planes: Tensor, dtype: torch.dtype) -> "Routed":
        """Memory for it; planes (splits, T, ·) are where it comes from."""
        num_tokens, device = planes.shape[1], planes.device
        hidden = torch.empty(num_tokens, num_columns, dtype=dtype, device=device)
        ids = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=device)
        weights, logits = planes.new_empty(num_tokens, num_chosen), planes.new_empty(num_tokens, num_experts)
        return Routed(hidden, torch.empty_like(hidden), ids, weights, logits)


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
    routed = Routed.empty(num_columns, num_experts, num_chosen, planes, dtype)
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
) -> Routed:
    """planes (splits, T, C), bias and scale (C,) float32."""
    num_planes, num_tokens, num_columns = planes.shape
    routed = Routed.empty(num_columns, num_columns, num_chosen, planes, dtype)
    BLOCK_C = block(num_columns, SCORES)
    if num_tokens:
        self_gate_kernel[(triton.cdiv(num_tokens, choose_rows(BLOCK_C)),)](
            *(planes, bias, scale, *routed, num_tokens, num_columns, num_planes),
            UP=must_widen(dtype),
            TOP_K=num_chosen,
            SIGNED=signed,
            BLOCK_T=choose_rows(BLOCK_C),
            BLOCK_C=BLOCK_C,
        )
    return routed
