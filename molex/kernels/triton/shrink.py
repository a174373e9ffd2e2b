# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""Shrink and gate in one launch: h = A x and g = G * h, reading x once.

    h[t, c] = A[row_of_column[c]] · x[t]        g[t, c] = gates[t, expert_of_column[c]] · h[t, c]

h is what the gates' gradient needs, g what the expand reads. g may be the tail of a buffer [x | g], x copied on the
way; one product with [W | B] is then base and experts together. Where rows are few, D is split over programs
that write float32 planes, which a second kernel adds in a fixed order and gates: the result never depends on timing.
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
    split,
    widened,
)


@triton.jit
def shrink_kernel(
    x_ptr: tl.tensor,
    A_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    row_ptr: tl.tensor,
    hidden_ptr: tl.tensor,  # (T, C), or the float32 planes (splits, T, C)
    gated_ptr: tl.tensor,
    copy_ptr: tl.tensor,
    T: tl.tensor,
    D: tl.tensor,
    C: tl.tensor,
    depth: tl.tensor,  # of D that one split sums
    stride_x: tl.tensor,
    stride_A: tl.tensor,
    stride_gates: tl.tensor,
    stride_gated: tl.tensor,
    HAS_ROWS: tl.constexpr,
    COPY: tl.constexpr,
    SPLIT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (tile of T x C, split of D); neighbours share their rows of x."""
    num_tiles_c = tl.cdiv(C, BLOCK_C)
    tile_c = tl.program_id(0) % num_tiles_c
    t = (tl.program_id(0) // num_tiles_c * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(row_ptr + c, c < C, other=0) if HAS_ROWS else c
    row_offset = row.to(tl.int64)[None, :] * stride_A
    copied_rows = tl.where(tile_c == 0, T, 0)
    start = tl.program_id(1) * depth
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(start, tl.minimum(start + depth, D), BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + t * stride_x + d[None, :], (t < T) & (d[None, :] < D), other=0.0)
        A = tl.load(A_ptr + row_offset + d[:, None], (c[None, :] < C) & (d[:, None] < D), other=0.0)
        acc = tl.dot(widened(x, UP), widened(A, UP), acc, input_precision="ieee")
        if COPY:
            tl.store(copy_ptr + t * stride_gated + d[None, :], x, (t < copied_rows) & (d[None, :] < D))
    mask = (t < T) & (c[None, :] < C)
    if SPLIT:
        tl.store(hidden_ptr + (tl.program_id(1) * T + t) * C + c[None, :], acc, mask)
    else:
        expert = tl.load(expert_ptr + c, c < C, other=0)
        gates = tl.load(gates_ptr + t * stride_gates + expert[None, :], mask, other=0.0)
        tl.store(hidden_ptr + t * C + c[None, :], rounded(acc, UP), mask)
        tl.store(gated_ptr + t * stride_gated + c[None, :], rounded(acc * gates, UP), mask)


@triton.jit
def gate_planes_kernel(
    planes_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    T: tl.tensor,
    C: tl.tensor,
    num_planes: tl.tensor,
    stride_gates: tl.tensor,
    stride_gated: tl.tensor,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the planes, the first first, and gates the sum."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (t < T) & (c < C)
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for plane in range(num_planes):
        acc += tl.load(planes_ptr + (plane * T + t) * C + c, mask, other=0.0)
    expert = tl.load(expert_ptr + c, c < C, other=0)
    gates = tl.load(gates_ptr + t * stride_gates + expert, mask, other=0.0)
    tl.store(hidden_ptr + t * C + c, rounded(acc, UP), mask)
    tl.store(gated_ptr + t * stride_gated + c, rounded(acc * gates, UP), mask)


def shrink_tile(num_tokens: int, num_columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_T, BLOCK_C): all columns at once, so that x is read once; few rows spread their columns instead."""
    most = 64 if dtype == torch.float32 else 128  # 128 would not fit into a thread's registers
    return block(num_tokens, 64), block(num_columns, 16 if num_tokens <= 16 else most)


def shrink_splits(x: Tensor, num_columns: int) -> tuple[int, int]:
    """(number of splits of D, what one of them sums)."""
    BLOCK_T, BLOCK_C = shrink_tile(x.shape[0], num_columns, x.dtype)
    num_tiles = triton.cdiv(x.shape[0], BLOCK_T) * triton.cdiv(num_columns, BLOCK_C)
    return split(x.shape[1], num_tiles, x.device, at_least=256)


@on_its_device
def launch_shrink(
    x: Tensor,
    A: Tensor,
    gates: Tensor,
    expert_of_column: Tensor,
    row_of_column: Tensor | None,
    gated: Tensor,
    copy: Tensor | None = None,
) -> Tensor:
    """Returns hidden (T, C); writes gated (T, C) and, where given, a copy of x whose rows lie as far apart."""
    gates = row_major(gates)
    hidden = torch.empty(x.shape[0], len(expert_of_column), dtype=x.dtype, device=x.device)
    if hidden.numel() == 0:
        return hidden
    num_splits, depth = shrink_splits(x, len(expert_of_column))
    columns = (gates, expert_of_column, row_of_column)
    if num_splits == 1:
        _launch(x, A, *columns, hidden, gated, copy, depth)
        return hidden
    planes = torch.empty(num_splits, *hidden.shape, dtype=torch.float32, device=x.device)
    _launch(x, A, *columns, planes, gated, copy, depth)
    gate_planes(planes, gates, expert_of_column, hidden, gated)
    return hidden


@on_its_device
def launch_shrink_planes(x: Tensor, A: Tensor) -> Tensor:
    """A x as float32 planes (splits, T, C), not yet added and not gated."""
    num_splits, depth = shrink_splits(x, A.shape[0])
    planes = torch.empty(num_splits, x.shape[0], A.shape[0], dtype=torch.float32, device=x.device)
    if planes.numel():
        _launch(x, A, None, None, None, planes, planes, None, depth)
    return planes


def _launch(
    x: Tensor,
    A: Tensor,
    gates: Tensor | None,
    expert_of_column: Tensor | None,
    row_of_column: Tensor | None,
    out: Tensor,
    gated: Tensor,
    copy: Tensor | None,
    depth: int,
) -> None:
    """out: hidden (T, C), or the planes (splits, T, C), for which the kernel reads no gates and writes no gated."""
    check_dtypes(x, A)
    x, A = row_major(x), row_major(A)
    (num_tokens, depth_all), num_columns = x.shape, out.shape[-1]
    BLOCK_T, BLOCK_C = shrink_tile(num_tokens, num_columns, x.dtype)
    num_tiles = triton.cdiv(num_tokens, BLOCK_T) * triton.cdiv(num_columns, BLOCK_C)
    shrink_kernel[(num_tiles, triton.cdiv(depth_all, depth))](
        *(x, A, gates, expert_of_column, row_of_column, out, gated, copy, num_tokens, depth_all, num_columns, depth),
        *(x.stride(0), A.stride(0), 0 if gates is None else gates.stride(0), gated.stride(0)),
        HAS_ROWS=row_of_column is not None,
        COPY=copy is not None,
        SPLIT=out.dim() == 3,
        UP=must_widen(x.dtype),
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
        BLOCK_D=block_depth(x.dtype),
        num_warps=4,
        num_stages=4,
    )


def gate_planes(planes: Tensor, gates: Tensor, expert_of_column: Tensor, hidden: Tensor, gated: Tensor) -> None:
    """planes (splits, T, C) -> hidden and gated (T, C)."""
    num_planes, num_tokens, num_columns = planes.shape
    BLOCK_T, BLOCK_C = 16, block(num_columns, 64)
    gate_planes_kernel[(triton.cdiv(num_tokens, BLOCK_T), triton.cdiv(num_columns, BLOCK_C))](
        *(planes, gates, expert_of_column, hidden, gated, num_tokens, num_columns, num_planes),
        *(gates.stride(0), gated.stride(0)),
        UP=must_widen(hidden.dtype),
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
    )
