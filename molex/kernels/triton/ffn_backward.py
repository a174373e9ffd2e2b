# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""Back through the middle of a feed-forward block to gate, up, their columns' inputs and the weights.

Nothing of an expert was kept: a_e and act' are made again from gate, up and the C-wide tensors, in the forward's tiles.

    d a_e = w_e d_mixed + keep · (d_down_hidden_e A2_e)        d a_0 = (1 − Σ_k w_k) d_mixed
    d g_e = d a_e · u_e · act'(g_e)        d u_e = d a_e · act(g_e)        d w_e = Σ_i d_mixed · (a_e − a_0)
    d_gate = d g_0 + Σ_k d g_k      d_gate_gated_e = d g_e B1_e           and so for up
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.ffn_activations import activated
from molex.kernels.triton.ffn_plan import Plan
from molex.kernels.triton.ffn_tiles import (
    INNER,
    Block,
    Grads,
    add_product,
    add_shrunk,
    expert_streams,
    narrowed,
    split_inner,
)
from molex.kernels.triton.tiles import must_widen, rounded
from molex.kernels.triton.token_tiles import COLUMNS, ROWS


@triton.jit
def ffn_mix_backward_kernel(
    block: Block,
    stride: Block,
    plan: Plan,
    grads: Grads,
    d_stride: Grads,
    d_gate_ptr: tl.tensor,
    d_up_ptr: tl.tensor,
    planes_ptr: tl.tensor,  # (2, parts, T, C) float32, of gate and up
    sizes: tl.tuple,  # T, I, C, what of I one part has
    ACTIVATION: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (tile of tokens, part of I)."""
    T, I, C, depth = sizes  # noqa: E741
    num_parts = tl.cdiv(I, depth)
    tile, part = tl.program_id(0) // num_parts, tl.program_id(0) % num_parts
    n = (tile * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    t_mask = n < T
    plane_ptr, to_up = planes_ptr + part.to(tl.int64) * T * C, num_parts.to(tl.int64) * T * C
    for start in range(part * depth, tl.minimum(part * depth + depth, I), BLOCK_I):
        i = (tl.multiple_of(start, BLOCK_I) + tl.arange(0, BLOCK_I))[None, :]
        mask, wide = t_mask & (i < I), tl.trans(i)
        t = tl.load(plan.order + n, t_mask, other=0)
        gate = tl.load(block.gate + t * stride.gate + i, mask, other=0.0).to(tl.float32)
        up = tl.load(block.up + t * stride.up + i, mask, other=0.0).to(tl.float32)
        d_mixed = tl.load(grads.mixed + t * d_stride.mixed + i, mask, other=0.0).to(tl.float32)
        d_base = tl.load(grads.rest + t, t_mask, other=0.0) * d_mixed
        value, slope = activated(gate, ACTIVATION)
        d_gate, d_up = d_base * up * slope, d_base * value
        for number in range(tl.load(plan.counts + tile)):
            t = tl.load(plan.order + n, t_mask, other=0)  # again: its rows' addresses would fill the registers
            first = tl.load(plan.experts + tile * C + number)
            columns = (first, tl.load(plan.lasts + first), C)
            slot = tl.load(plan.slots + t * C + first, t_mask, other=-1)
            d_stream = add_product(
                *(tl.zeros_like(gate), grads.down, t * d_stride.down, 1, slot >= 0),
                *(block.down_A, i, stride.down_A, i < I, columns, UP, BLOCK_C),
            )
            if block.keep is not None:
                keep = tl.load(block.keep + t * stride.keep + i, mask, other=0)
                d_stream = tl.where(keep != 0, d_stream, 0.0)
            d_stream += tl.load(block.weights + t * stride.weights + slot, slot >= 0, other=0.0) * d_mixed
            gate_e, up_e = expert_streams(gate, up, block, stride, t, t_mask, i, i < I, columns, UP, BLOCK_C)
            value, slope = activated(gate_e, ACTIVATION)
            d_gate_e, d_up_e = d_stream * up_e * slope, d_stream * value
            d_gate += d_gate_e
            d_up += d_up_e
            rows, d_gate_e, d_up_e = t * C, narrowed(d_gate_e, block.gate_B, UP), narrowed(d_up_e, block.up_B, UP)
            B_gate, B_up = (block.gate_B, 1, wide * stride.gate_B), (block.up_B, 1, wide * stride.up_B)
            add_shrunk(plane_ptr, rows, t_mask, d_gate_e, *B_gate, wide < I, columns, UP, BLOCK_C)
            add_shrunk(plane_ptr + to_up, rows, t_mask, d_up_e, *B_up, wide < I, columns, UP, BLOCK_C)
            tl.debug_barrier()  # the next expert may share a block of columns, read by other threads
        t = tl.load(plan.order + n, t_mask, other=0)
        tl.store(d_gate_ptr + t * I + i, rounded(d_gate, UP), mask)
        tl.store(d_up_ptr + t * I + i, rounded(d_up, UP), mask)


def launch_mix_backward(grads: Grads, block: Block, plan: Plan, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """d_gate and d_up (T, I), and the planes (2, parts, T, C) of d_gate_gated and d_up_gated."""
    (num_tokens, width), num_columns = block.gate.shape, block.down_A.shape[0]
    dtype, device, num_tiles = block.gate.dtype, block.gate.device, plan.counts.shape[0]
    d_gate, d_up = (torch.empty(num_tokens, width, dtype=dtype, device=device) for _ in range(2))
    num_parts, depth = split_inner(block, num_tiles, 2)
    planes = torch.zeros(2, num_parts, num_tokens, num_columns, dtype=torch.float32, device=device)
    if d_gate.numel():
        ffn_mix_backward_kernel[(num_tiles * num_parts,)](
            *(block, block.strides(), plan, grads, grads.strides(), d_gate, d_up, planes),
            (num_tokens, width, num_columns, depth),
            ACTIVATION=activation,
            UP=must_widen(dtype),
            BLOCK_T=ROWS,
            BLOCK_I=INNER,
            BLOCK_C=COLUMNS,
            num_warps=8,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return d_gate, d_up, planes
