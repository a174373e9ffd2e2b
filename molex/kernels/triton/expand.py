# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""Expand into a base output that is there already: y += g Bᵀ, one read and one write of y, one rounding.

The tile of y is loaded before the products and is on its way while they run. Where y is not there yet, there are better
plans, which need no kernel: one product with [W | B] over [x | g], or g Bᵀ first and the base's product added to it.

Where columns are very many, `expand_tiles` takes tokens in the order of their experts and skips the columns that a tile
of them does not need, still with one read and one write of y.
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
    rounded,
    row_major,
    widened,
)
from molex.kernels.triton.token_tiles import COLUMNS, ROWS, TokenTiles


@triton.jit
def expand_kernel(
    y_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    B_ptr: tl.tensor,
    T: tl.tensor,
    O: tl.tensor,  # noqa: E741
    C: tl.tensor,
    stride_y: tl.tensor,
    stride_gated: tl.tensor,
    stride_B: tl.tensor,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (tile of T x O); neighbours share their rows of g."""
    num_tiles_o = tl.cdiv(O, BLOCK_O)
    t = (tl.program_id(0) // num_tiles_o * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    o = (tl.program_id(0) % num_tiles_o * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
    y_ptrs, mask = y_ptr + t * stride_y + o, (t < T) & (o < O)
    y = tl.load(y_ptrs, mask, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        gated = tl.load(gated_ptr + t * stride_gated + c[None, :], (t < T) & (c[None, :] < C), other=0.0)
        B = tl.load(B_ptr + o.to(tl.int64) * stride_B + c[:, None], (o < O) & (c[:, None] < C), other=0.0)
        acc = tl.dot(widened(gated, UP), widened(B, UP), acc, input_precision="ieee")
    tl.store(y_ptrs, rounded(acc + y.to(tl.float32), UP), mask)


def expand_tile(num_tokens: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_T, BLOCK_O)."""
    return block(num_tokens, 64 if dtype == torch.float32 else 128), block(width, 128)


@on_its_device
def launch_expand(y: Tensor, gated: Tensor, B: Tensor) -> None:
    """y (T, O) += gated (T, C) · B (O, C)ᵀ, in place."""
    assert y.stride(1) == 1 or y.numel() == 0, "y is changed in place, and its rows must be contiguous"
    check_dtypes(y, gated, B)
    gated, B = row_major(gated), row_major(B)
    (num_tokens, width), num_columns = y.shape, gated.shape[1]
    if y.numel() == 0 or num_columns == 0:
        return
    BLOCK_T, BLOCK_O = expand_tile(num_tokens, width, gated.dtype)
    expand_kernel[(triton.cdiv(num_tokens, BLOCK_T) * triton.cdiv(width, BLOCK_O),)](
        *(y, gated, B, num_tokens, width, num_columns, y.stride(0), gated.stride(0), B.stride(0)),
        UP=must_widen(gated.dtype),
        BLOCK_T=BLOCK_T,
        BLOCK_O=BLOCK_O,
        BLOCK_C=block(num_columns, block_depth(gated.dtype)),
        num_warps=8,
        num_stages=3,
    )


@triton.jit
def expand_tiles_kernel(
    y_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    B_ptr: tl.tensor,
    order_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    T: tl.tensor,
    O: tl.tensor,  # noqa: E741
    C: tl.tensor,
    num_blocks: tl.tensor,
    stride_y: tl.tensor,
    stride_gated: tl.tensor,
    stride_B: tl.tensor,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The same for rows in the order of `token_tiles`, over the columns that a tile needs and no others."""
    num_tiles_o = tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0) // num_tiles_o
    n = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = (n < T)[:, None]
    t = tl.load(order_ptr + n, n < T, other=0)[:, None]
    o = (tl.program_id(0) % num_tiles_o * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
    y_ptrs, mask = y_ptr + t * stride_y + o, t_mask & (o < O)
    y = tl.load(y_ptrs, mask, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for i in range(0, tl.load(counts_ptr + tile)):
        c = tl.load(blocks_ptr + tile * num_blocks + i) * BLOCK_C + tl.arange(0, BLOCK_C)
        gated = tl.load(gated_ptr + t * stride_gated + c[None, :], t_mask & (c[None, :] < C), other=0.0)
        B = tl.load(B_ptr + o.to(tl.int64) * stride_B + c[:, None], (o < O) & (c[:, None] < C), other=0.0)
        acc = tl.dot(widened(gated, UP), widened(B, UP), acc, input_precision="ieee")
    tl.store(y_ptrs, rounded(acc + y.to(tl.float32), UP), mask)


@on_its_device
def launch_expand_tiles(y: Tensor, gated: Tensor, B: Tensor, tiles: TokenTiles) -> None:
    """y += gated · Bᵀ in place, for gated that is zero outside of its tokens' experts."""
    assert y.stride(1) == 1 or y.numel() == 0, "y is changed in place, and its rows must be contiguous"
    check_dtypes(y, gated, B)
    gated, B = row_major(gated), row_major(B)
    (num_tokens, width), (num_tiles, num_blocks) = y.shape, tiles.blocks.shape
    if y.numel() == 0 or num_blocks == 0:
        return
    BLOCK_O = block(width, 128)
    expand_tiles_kernel[(num_tiles * triton.cdiv(width, BLOCK_O),)](
        *(y, gated, B, *tiles, num_tokens, width, gated.shape[1], num_blocks),
        *(y.stride(0), gated.stride(0), B.stride(0)),
        UP=must_widen(gated.dtype),
        BLOCK_T=ROWS,
        BLOCK_O=BLOCK_O,
        BLOCK_C=COLUMNS,
        num_warps=8 if gated.dtype == torch.float32 else 4,
        num_stages=6,  # half of them are for the numbers of the blocks
    )
