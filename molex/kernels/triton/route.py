# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""Router, top-k, shrink and gate in two launches, for decoding, where launches are most of what a mixture costs.

    l = W x      (w, ids) = top-k of softmax(l), renormalised or not      h = A x      g[t, c] = s_e w_e h[t, c]

The first reads x once for h and l, and splits D, because decoding has few rows. The second (`choose.py`) adds planes,
chooses and gates. The router's product is float32 whatever x is, as in `routers.Gate`. All columns and all logits of a
row lie in one program, so both are limited: COLUMNS and EXPERTS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.tiles import block, check_dtypes, must_widen, on_its_device, row_major, split, widened

COLUMNS, EXPERTS = 128, 128


@triton.jit
def route_planes_kernel(
    x_ptr: tl.tensor,
    A_ptr: tl.tensor,
    router_ptr: tl.tensor,
    row_ptr: tl.tensor,
    planes_ptr: tl.tensor,  # (splits, T, C + E) float32
    T: tl.tensor,
    D: tl.tensor,
    C: tl.tensor,
    E: tl.tensor,
    depth: tl.tensor,  # of D that one split sums
    stride_x: tl.tensor,
    stride_A: tl.tensor,
    stride_router: tl.tensor,
    HAS_ROWS: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (tile of T, split of D)."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c, e = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)[None, :]
    row = tl.load(row_ptr + c, c < C, other=0) if HAS_ROWS else c
    row_offset = row.to(tl.int64)[None, :] * stride_A
    start = tl.program_id(1) * depth
    hidden = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(start, tl.minimum(start + depth, D), BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + t * stride_x + d[None, :], (t < T) & (d[None, :] < D), other=0.0)
        A = tl.load(A_ptr + row_offset + d[:, None], (c[None, :] < C) & (d[:, None] < D), other=0.0)
        router = tl.load(router_ptr + e * stride_router + d[:, None], (e < E) & (d[:, None] < D), other=0.0)
        hidden = tl.dot(widened(x, UP), widened(A, UP), hidden, input_precision="ieee")
        logits = tl.dot(x.to(tl.float32), router.to(tl.float32), logits, input_precision="ieee")
    row_ptrs = planes_ptr + (tl.program_id(1) * T + t) * (C + E)
    tl.store(row_ptrs + c[None, :], hidden, (t < T) & (c[None, :] < C))
    tl.store(row_ptrs + C + e, logits, (t < T) & (e < E))


def route_tile(num_tokens: int, num_columns: int, num_experts: int) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_C, BLOCK_E); both accumulators and the float32 copy of x are in registers."""
    return block(num_tokens, 32), block(num_columns, COLUMNS), block(num_experts, EXPERTS)


@on_its_device
def launch_route_planes(x: Tensor, A: Tensor, router: Tensor, num_columns: int, row_of_column: Tensor | None) -> Tensor:
    """A x and W x as float32 planes (splits, T, C + E). router (E, D) in one of DTYPES."""
    check_dtypes(x, A)
    x, A, router = row_major(x), row_major(A), row_major(router)
    (num_tokens, depth_all), num_experts = x.shape, router.shape[0]
    assert num_columns <= COLUMNS, f"{num_columns} columns, at most {COLUMNS}"
    assert num_experts <= EXPERTS, f"{num_experts} experts, at most {EXPERTS}"
    BLOCK_T, BLOCK_C, BLOCK_E = route_tile(num_tokens, num_columns, num_experts)
    num_tiles = triton.cdiv(num_tokens, BLOCK_T)
    num_splits, depth = split(depth_all, num_tiles, x.device, at_least=128)
    planes = torch.empty(num_splits, num_tokens, num_columns + num_experts, dtype=torch.float32, device=x.device)
    if num_tokens:
        route_planes_kernel[(num_tiles, num_splits)](
            *(x, A, router, row_of_column, planes),
            *(num_tokens, depth_all, num_columns, num_experts, depth, x.stride(0), A.stride(0), router.stride(0)),
            HAS_ROWS=row_of_column is not None,
            UP=must_widen(x.dtype),
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
            BLOCK_E=BLOCK_E,
            BLOCK_D=32,
            num_warps=4,
            num_stages=3,
        )
    return planes
