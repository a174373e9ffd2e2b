# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""Weight gradients of skinny factors: out (C, N) = leftᵀ (C, T) · right (T, N), a sum over all tokens, in float32.

dA is this of (dh, x), dBᵀ of (g, dy). Few tiles and a long sum: T is split over programs, each writes a float32 plane,
and the planes are added in their order. No atomics: the same batch gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.tiles import (
    block,
    block_depth,
    check_dtypes,
    must_widen,
    on_its_device,
    row_major,
    split,
    widened,
)


@triton.jit
def wgrad_kernel(
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    planes_ptr: tl.tensor,  # (splits, C, N) float32
    T: tl.tensor,
    C: tl.tensor,
    N: tl.tensor,
    depth: tl.tensor,  # of T that one split sums
    stride_left: tl.tensor,
    stride_right: tl.tensor,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile of C x N, split of T)."""
    num_tiles_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % num_tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (tl.program_id(0) // num_tiles_c * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    start = tl.program_id(1) * depth
    acc = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for first in range(start, tl.minimum(start + depth, T), BLOCK_T):
        t = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        left = tl.load(left_ptr + t * stride_left + c[None, :], (t < T) & (c[None, :] < C), other=0.0)
        right = tl.load(right_ptr + t * stride_right + n, (t < T) & (n < N), other=0.0)
        acc = tl.dot(tl.trans(widened(left, UP)), widened(right, UP), acc, input_precision="ieee")
    c_row = (tl.program_id(1) * C + c).to(tl.int64)[:, None]
    tl.store(planes_ptr + c_row * N + n, acc, (c[:, None] < C) & (n < N))


def wgrad_tile(num_columns: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_N)."""
    return block(num_columns, 64 if dtype == torch.float32 else 128), block(width, 64)


@on_its_device
def launch_wgrad(left: Tensor, right: Tensor) -> Tensor:
    """(T, C), (T, N) -> (C, N) float32."""
    check_dtypes(left, right)
    left, right = row_major(left), row_major(right)
    (num_tokens, num_columns), width = left.shape, right.shape[1]
    BLOCK_C, BLOCK_N = wgrad_tile(num_columns, width, left.dtype)
    num_tiles = triton.cdiv(num_columns, BLOCK_C) * triton.cdiv(width, BLOCK_N)
    num_splits, depth = split(num_tokens, num_tiles, left.device, at_least=256, each=2)
    planes = torch.empty(num_splits, num_columns, width, dtype=torch.float32, device=left.device)
    if num_tiles:
        wgrad_kernel[(num_tiles, num_splits)](
            *(left, right, planes, num_tokens, num_columns, width, depth, left.stride(0), right.stride(0)),
            UP=must_widen(left.dtype),
            BLOCK_T=block_depth(left.dtype),
            BLOCK_C=BLOCK_C,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            num_stages=4,
        )
    return planes[0] if num_splits == 1 else planes.sum(0)
