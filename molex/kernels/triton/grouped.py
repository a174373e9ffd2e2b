# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""For very many columns: each (token, slot) pair through the columns of its one expert, pairs sorted by expert.

    shrink   h[k, t] = A_e x[t],  g[k, t] = w[k, t] h[k, t]      e = the expert of slot k of token t
    expand   y[t] += Σ_k B_e g[k, t]                             one pass for each slot, so no atomics
    wgrad    dA_e = Σ g[k, t]ᵀ right[t] over the expert's pairs

h and g are (K, T, R), R the largest rank; zero beyond an expert's own rank and where nobody serves. Backward is the
same three: the shrink of (dy, Bᵀ) gives dg and dh, the expand of (dh, Aᵀ) gives dx, and wgrad both factors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.pair_tiles import ROWS, PairTiles
from molex.kernels.triton.tiles import (
    block,
    block_depth,
    check_dtypes,
    must_widen,
    on_its_device,
    rounded,
    row_major,
    widened,
)


@triton.jit
def grouped_shrink_kernel(
    x_ptr: tl.tensor,
    A_ptr: tl.tensor,
    row_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    order_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    first_ptr: tl.tensor,
    last_ptr: tl.tensor,
    start_ptr: tl.tensor,
    T: tl.tensor,
    D: tl.tensor,
    R: tl.tensor,
    num_tiles: tl.tensor,
    stride_x: tl.tensor,
    stride_A: tl.tensor,
    stride_A_d: tl.tensor,
    HAS_ROWS: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (tile of a slot, tile of R)."""
    tile, slot = tl.program_id(0), tl.program_id(0) // num_tiles
    first, last = tl.load(first_ptr + tile), tl.load(last_ptr + tile)
    if first >= last:
        return
    n = first + tl.arange(0, BLOCK_T)
    t, t_mask = tl.load(order_ptr + slot * T + n, n < last, other=0)[:, None], (n < last)[:, None]
    expert = tl.load(expert_ptr + tile)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.load(start_ptr + expert) + r
    c_mask = c < tl.load(start_ptr + expert + 1)
    row_offset = (tl.load(row_ptr + c, c_mask, other=0) if HAS_ROWS else c)[None, :] * stride_A
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + t * stride_x + d[None, :], t_mask & (d[None, :] < D), other=0.0)
        A_mask = c_mask[None, :] & (d[:, None] < D)
        A = tl.load(A_ptr + row_offset + d[:, None].to(tl.int64) * stride_A_d, A_mask, other=0.0)
        acc = tl.dot(widened(x, UP), widened(A, UP), acc, input_precision="ieee")
    pair = slot * T + t
    weights = tl.load(weights_ptr + pair, t_mask, other=0.0)
    mask = t_mask & (r[None, :] < R)
    tl.store(hidden_ptr + pair * R + r[None, :], rounded(acc, UP), mask)
    tl.store(gated_ptr + pair * R + r[None, :], rounded(acc * weights, UP), mask)


@triton.jit
def grouped_expand_kernel(
    y_ptr: tl.tensor,
    gated_ptr: tl.tensor,  # (T, R) of one slot
    B_ptr: tl.tensor,
    row_ptr: tl.tensor,
    order_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    first_ptr: tl.tensor,
    last_ptr: tl.tensor,
    start_ptr: tl.tensor,
    O: tl.tensor,  # noqa: E741
    R: tl.tensor,
    stride_y: tl.tensor,
    stride_B: tl.tensor,
    stride_B_c: tl.tensor,
    HAS_ROWS: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (tile of the slot x tile of O)."""
    num_tiles_o = tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0) // num_tiles_o
    first, last = tl.load(first_ptr + tile), tl.load(last_ptr + tile)
    if first >= last:
        return
    n = first + tl.arange(0, BLOCK_T)
    t, t_mask = tl.load(order_ptr + n, n < last, other=0)[:, None], (n < last)[:, None]
    o = (tl.program_id(0) % num_tiles_o * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
    y_ptrs, mask = y_ptr + t * stride_y + o, t_mask & (o < O)
    y = tl.load(y_ptrs, mask, other=0.0)
    expert = tl.load(expert_ptr + tile)
    c_first, c_last = tl.load(start_ptr + expert), tl.load(start_ptr + expert + 1)
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        c, c_mask = c_first + r, c_first + r < c_last
        column = tl.load(row_ptr + c, c_mask, other=0) if HAS_ROWS else c
        gated = tl.load(gated_ptr + t * R + r[None, :], t_mask & (r[None, :] < R), other=0.0)
        B_ptrs = B_ptr + o.to(tl.int64) * stride_B + column[:, None] * stride_B_c
        B = tl.load(B_ptrs, (o < O) & c_mask[:, None], other=0.0)
        acc = tl.dot(widened(gated, UP), widened(B, UP), acc, input_precision="ieee")
    tl.store(y_ptrs, rounded(acc + y.to(tl.float32), UP), mask)


@triton.jit
def grouped_wgrad_kernel(
    left_ptr: tl.tensor,  # (K, T, R)
    right_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (C, N) float32
    order_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    start_ptr: tl.tensor,
    T: tl.tensor,
    R: tl.tensor,
    N: tl.tensor,
    num_slots: tl.tensor,
    num_experts: tl.tensor,
    stride_right: tl.tensor,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (expert x tile of N, tile of R); the wide side has the tile's rows, so that a small rank wastes none."""
    num_tiles_n = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // num_tiles_n
    n = tl.program_id(0) % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for slot in range(num_slots):
        ends = ends_ptr + slot * num_experts + expert
        first, last = tl.load(ends - 1, expert > 0, other=0), tl.load(ends)
        for start in range(first, last, BLOCK_T):
            i = start + tl.arange(0, BLOCK_T)
            t, t_mask = tl.load(order_ptr + slot * T + i, i < last, other=0)[:, None], (i < last)[:, None]
            left = tl.load(left_ptr + (slot * T + t) * R + r[None, :], t_mask & (r[None, :] < R), other=0.0)
            right = tl.load(right_ptr + t * stride_right + n[None, :], t_mask & (n[None, :] < N), other=0.0)
            acc = tl.dot(tl.trans(widened(right, UP)), widened(left, UP), acc, input_precision="ieee")
    c = tl.load(start_ptr + expert) + r[None, :]
    tl.store(out_ptr + c * N + n[:, None], acc, (c < tl.load(start_ptr + expert + 1)) & (n[:, None] < N))


@on_its_device
def launch_grouped_shrink(
    x: Tensor, A: Tensor, weights: Tensor, row_of_column: Tensor | None, pairs: PairTiles, rank: int
) -> tuple[Tensor, Tensor]:
    """x (T, D), A (C, D) of any strides, weights (T, K) float32 -> hidden and gated (K, T, R)."""
    check_dtypes(x, A)
    x, weights_KT = row_major(x), weights.T.contiguous()
    (num_slots, num_tokens), num_tiles = pairs.order.shape, pairs.expert.shape[1]
    hidden = torch.zeros(num_slots, num_tokens, rank, dtype=x.dtype, device=x.device)
    gated = torch.zeros_like(hidden)
    BLOCK_R = block(rank, 64)
    if hidden.numel():
        grouped_shrink_kernel[(num_slots * num_tiles, triton.cdiv(rank, BLOCK_R))](
            *(x, A, row_of_column, weights_KT, hidden, gated),
            *(pairs.order, pairs.expert, pairs.first, pairs.last, pairs.start_of_expert),
            *(num_tokens, x.shape[1], rank, num_tiles, x.stride(0), *A.stride()),
            HAS_ROWS=row_of_column is not None,
            UP=must_widen(x.dtype),
            BLOCK_T=ROWS,
            BLOCK_R=BLOCK_R,
            BLOCK_D=block_depth(x.dtype),
            num_warps=4,
            num_stages=4,
        )
    return hidden, gated


@on_its_device
def launch_grouped_expand(y: Tensor, gated: Tensor, B: Tensor, row_of_column: Tensor | None, pairs: PairTiles) -> None:
    """y (T, O) += gated (K, T, R) · Bᵀ in place, B (O, C) of any strides, its column row_of_column[c] where given."""
    assert y.stride(1) == 1 or y.numel() == 0, "y is changed in place, and its rows must be contiguous"
    check_dtypes(y, gated, B)
    gated, width, rank = gated.contiguous(), y.shape[1], gated.shape[2]
    if gated.numel() == 0 or y.numel() == 0:
        return
    BLOCK_O = block(width, 128)
    for slot in range(gated.shape[0]):
        grouped_expand_kernel[(pairs.expert.shape[1] * triton.cdiv(width, BLOCK_O),)](
            *(y, gated[slot], B, row_of_column, pairs.order[slot]),
            *(pairs.expert[slot], pairs.first[slot], pairs.last[slot], pairs.start_of_expert),
            *(width, rank, y.stride(0), *B.stride()),
            HAS_ROWS=row_of_column is not None,
            UP=must_widen(gated.dtype),
            BLOCK_T=ROWS,
            BLOCK_O=BLOCK_O,
            BLOCK_R=block(rank, block_depth(gated.dtype)),
            num_warps=8 if gated.dtype == torch.float32 else 4,
            num_stages=3,
        )


@on_its_device
def launch_grouped_wgrad(left: Tensor, right: Tensor, pairs: PairTiles, num_columns: int) -> Tensor:
    """left (K, T, R), right (T, N) -> (C, N) float32."""
    check_dtypes(left, right)
    left, right = left.contiguous(), row_major(right)
    (num_slots, num_tokens, rank), width = left.shape, right.shape[1]
    num_experts = pairs.ends.shape[1]
    out = torch.empty(num_columns, width, dtype=torch.float32, device=left.device)
    BLOCK_N, BLOCK_R = block(width, 64), block(rank, 64)
    if out.numel():
        grouped_wgrad_kernel[(num_experts * triton.cdiv(width, BLOCK_N), triton.cdiv(rank, BLOCK_R))](
            *(left, right, out, pairs.order, pairs.ends, pairs.start_of_expert),
            *(num_tokens, rank, width, num_slots, num_experts, right.stride(0)),
            UP=must_widen(left.dtype),
            BLOCK_T=block_depth(left.dtype),
            BLOCK_R=BLOCK_R,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            num_stages=3,
        )
    return out
