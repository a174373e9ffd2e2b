# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""The middle of a MixLoRA feed-forward block, read once and written once, however many experts a token has.

    a_0 = act(gate) · up            a_e = act(gate + gate_gated_e B1_eᵀ) · (up + up_gated_e B3_eᵀ)
    mixed = a_0 + Σ_k w_k (a_k − a_0)            down_hidden_e = A2_e (keep · a_e)

A program has a tile of tokens with like experts and a part of I. Its tiles of gate and up stay in registers while the
experts that some token of the tile has chosen pass by; no a_e is ever written. down_hidden is a sum over I: programs
leave float32 planes, one for each part. (MixLoRA, arXiv 2404.15159.)
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
    add_shrunk,
    expert_streams,
    narrowed,
    split_inner,
)
from molex.kernels.triton.tiles import must_widen, rounded
from molex.kernels.triton.token_tiles import COLUMNS, ROWS


@triton.jit
def ffn_mix_kernel(
    block: Block,
    stride: Block,
    plan: Plan,
    mixed_ptr: tl.tensor,
    planes_ptr: tl.tensor,  # (parts, T, C) float32
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
    plane_ptr = planes_ptr + part.to(tl.int64) * T * C
    for start in range(part * depth, tl.minimum(part * depth + depth, I), BLOCK_I):
        i = (tl.multiple_of(start, BLOCK_I) + tl.arange(0, BLOCK_I))[None, :]
        mask, wide = t_mask & (i < I), tl.trans(i)
        t = tl.load(plan.order + n, t_mask, other=0)
        gate = tl.load(block.gate + t * stride.gate + i, mask, other=0.0).to(tl.float32)
        up = tl.load(block.up + t * stride.up + i, mask, other=0.0).to(tl.float32)
        base = activated(gate, ACTIVATION)[0] * up
        mixed = base
        for number in range(tl.load(plan.counts + tile)):
            t = tl.load(plan.order + n, t_mask, other=0)  # again: its rows' addresses would fill the registers
            first = tl.load(plan.experts + tile * C + number)
            columns = (first, tl.load(plan.lasts + first), C)
            gate_e, up_e = expert_streams(gate, up, block, stride, t, t_mask, i, i < I, columns, UP, BLOCK_C)
            stream = activated(gate_e, ACTIVATION)[0] * up_e
            slot = tl.load(plan.slots + t * C + first, t_mask, other=-1)
            mixed += tl.load(block.weights + t * stride.weights + slot, slot >= 0, other=0.0) * (stream - base)
            if block.keep is not None:
                keep = tl.load(block.keep + t * stride.keep + i, mask, other=0)
                stream = tl.where(keep != 0, stream, 0.0)
            stream, down_A = narrowed(stream, block.down_A, UP), (block.down_A, stride.down_A, wide)
            add_shrunk(plane_ptr, t * C, t_mask, stream, *down_A, wide < I, columns, UP, BLOCK_C)
            tl.debug_barrier()  # the next expert may share a block of columns, read by other threads
        t = tl.load(plan.order + n, t_mask, other=0)
        tl.store(mixed_ptr + t * I + i, rounded(mixed, UP), mask)


def launch_mix(block: Block, plan: Plan, activation: str) -> tuple[Tensor, Tensor]:
    """mixed (T, I), and the planes (parts, T, C) of down_hidden."""
    (num_tokens, width), num_columns = block.gate.shape, block.down_A.shape[0]
    dtype, device, num_tiles = block.gate.dtype, block.gate.device, plan.counts.shape[0]
    mixed = torch.empty(num_tokens, width, dtype=dtype, device=device)
    num_parts, depth = split_inner(block, num_tiles, 1)
    planes = torch.zeros(num_parts, num_tokens, num_columns, dtype=torch.float32, device=device)
    if mixed.numel():
        ffn_mix_kernel[(num_tiles * num_parts,)](
            *(block, block.strides(), plan, mixed, planes),
            (num_tokens, width, num_columns, depth),
            ACTIVATION=activation,
            UP=must_widen(dtype),
            BLOCK_T=ROWS,
            BLOCK_I=INNER,
            BLOCK_C=COLUMNS,
            num_warps=8,
            num_stages=1,
            enable_fp_fusion=False,  # a difference of equal products must be zero, not one product's rounding error
        )
    return mixed, planes
