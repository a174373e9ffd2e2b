# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""Gradients of a feed-forward block that are sums over tokens, those of its experts' factors; and d_weights on the way.

    dB1_e = Σ_t d g_e[t]ᵀ gate_gated_e[t]        dB3_e = Σ_t d u_e[t]ᵀ up_gated_e[t]
    dA2_e = Σ_t d_down_hidden_e[t]ᵀ (keep · a_e)[t]        d w[t, k] = Σ_i d_mixed · (a_e − a_0)

A program has a block of I and an expert, goes through the tokens that have chosen it and makes their streams again.
Tiles are (I, T), so that they are left factors as they come out of the products before. Programs of one block of I run
side by side and read the same rows, those of a token with several experts at about the same time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.ffn_activations import activated
from molex.kernels.triton.ffn_plan import Pairs, Plan
from molex.kernels.triton.ffn_tiles import Block, Grads, add_product, narrowed
from molex.kernels.triton.tiles import must_widen, split, widened
from molex.kernels.triton.token_tiles import COLUMNS

WIDTH = 64  # of I, in a tile


@triton.jit
def own_columns(ptr: tl.tensor, row: tl.tensor, row_mask: tl.tensor, c: tl.tensor, columns: tl.tuple) -> tl.tensor:
    """(BLOCK_T, BLOCK_C) of a (T, C) tensor; zero in what is not the expert's."""
    first, last, C = columns
    return tl.where((c >= first) & (c < last), tl.load(ptr + row + c, row_mask & (c < C), other=0.0), 0.0)


@triton.jit
def large_streams(
    gate: tl.tensor,  # (BLOCK_I, BLOCK_T), of the base
    up: tl.tensor,
    block: Block,
    stride: Block,
    grads: Grads,
    d_stride: Grads,
    t: tl.tensor,  # (1, BLOCK_T)
    t_mask: tl.tensor,
    i: tl.tensor,  # (BLOCK_I, 1)
    i_mask: tl.tensor,
    columns: tl.tuple,
    UP: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """gate and up of an expert, and what its stream receives through down_A, over several blocks of columns."""
    gate_e = add_product(
        *(gate, block.gate_B, i * stride.gate_B, 1, i_mask),
        *(block.gate_gated, t * stride.gate_gated, 1, t_mask, columns, UP, BLOCK_C),
    )
    up_e = add_product(
        *(up, block.up_B, i * stride.up_B, 1, i_mask),
        *(block.up_gated, t * stride.up_gated, 1, t_mask, columns, UP, BLOCK_C),
    )
    d_stream = add_product(
        *(tl.zeros_like(gate), block.down_A, i, stride.down_A, i_mask),
        *(grads.down, t * d_stride.down, 1, t_mask, columns, UP, BLOCK_C),
    )
    return gate_e, up_e, d_stream


@triton.jit
def sum_pairs(
    block: Block,
    stride: Block,
    pairs: Pairs,
    grads: Grads,
    d_stride: Grads,
    plane_ptr: tl.tensor,
    i: tl.tensor,  # (BLOCK_I, 1)
    c: tl.tensor,  # (1, BLOCK_C)
    columns: tl.tuple,
    I: tl.tensor,  # noqa: E741
    ACTIVATION: tl.constexpr,
    LARGE: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """d_gate_B, d_up_B, d_down_A (BLOCK_I, BLOCK_C) over an expert's pairs; their d_weights go into the plane."""
    first, _, C = columns
    B_mask, K = (i < I) & (c < C), stride.weights
    gate_B = widened(tl.load(block.gate_B + i * stride.gate_B + c, B_mask, other=0.0), UP)
    up_B = widened(tl.load(block.up_B + i * stride.up_B + c, B_mask, other=0.0), UP)
    down_A = widened(tl.load(block.down_A + i + c * stride.down_A, B_mask, other=0.0), UP)
    d_gate_B = tl.zeros((BLOCK_I, BLOCK_C), tl.float32)
    d_up_B, d_down_A = d_gate_B, d_gate_B
    begin, end = tl.load(pairs.ends + first - 1, first > 0, other=0), tl.load(pairs.ends + first)
    for start in range(begin, end, BLOCK_T):
        n = start + tl.arange(0, BLOCK_T)
        pair = tl.load(pairs.order + n, n < end, other=0)
        t, t_mask, mask = (pair // K).to(tl.int64), (n < end)[:, None], (n < end)[None, :] & (i < I)
        gate = tl.load(block.gate + t[None, :] * stride.gate + i, mask, other=0.0).to(tl.float32)
        up = tl.load(block.up + t[None, :] * stride.up + i, mask, other=0.0).to(tl.float32)
        d_mixed = tl.load(grads.mixed + t[None, :] * d_stride.mixed + i, mask, other=0.0).to(tl.float32)
        gate_gated = widened(own_columns(block.gate_gated, t[:, None] * stride.gate_gated, t_mask, c, columns), UP)
        up_gated = widened(own_columns(block.up_gated, t[:, None] * stride.up_gated, t_mask, c, columns), UP)
        d_down = widened(own_columns(grads.down, t[:, None] * d_stride.down, t_mask, c, columns), UP)
        base = activated(gate, ACTIVATION)[0] * up
        if LARGE:
            gate_e, up_e, d_stream = large_streams(
                *(gate, up, block, stride, grads, d_stride, t[None, :], (n < end)[None, :]),
                *(i, i < I, columns, UP, BLOCK_C),
            )
        else:
            gate_e = tl.dot(gate_B, tl.trans(gate_gated), gate, input_precision="ieee")
            up_e = tl.dot(up_B, tl.trans(up_gated), up, input_precision="ieee")
            d_stream = tl.dot(down_A, tl.trans(d_down), input_precision="ieee")
        value, slope = activated(gate_e, ACTIVATION)
        stream = value * up_e
        tl.store(plane_ptr + pair, tl.sum(d_mixed * (stream - base), axis=0), n < end)
        if block.keep is not None:
            keep = tl.load(block.keep + t[None, :] * stride.keep + i, mask, other=0) != 0
            stream, d_stream = tl.where(keep, stream, 0.0), tl.where(keep, d_stream, 0.0)
        d_stream += tl.load(block.weights + pair, n < end, other=0.0)[None, :] * d_mixed
        d_gate_e = narrowed(d_stream * up_e * slope, block.gate_B, UP)
        d_gate_B = tl.dot(d_gate_e, gate_gated, d_gate_B, input_precision="ieee")
        d_up_B = tl.dot(narrowed(d_stream * value, block.up_B, UP), up_gated, d_up_B, input_precision="ieee")
        d_down_A = tl.dot(narrowed(stream, block.down_A, UP), d_down, d_down_A, input_precision="ieee")
    return d_gate_B, d_up_B, d_down_A


@triton.jit
def ffn_mix_wgrad_kernel(
    block: Block,
    stride: Block,
    pairs: Pairs,
    grads: Grads,
    d_stride: Grads,
    lasts_ptr: tl.tensor,
    d_gate_B_ptr: tl.tensor,  # (I, C) float32
    d_up_B_ptr: tl.tensor,  # (I, C) float32
    d_down_A_ptr: tl.tensor,  # (C, I) float32
    planes_ptr: tl.tensor,  # (blocks of I, T K) float32
    sizes: tl.tuple,  # T K, I, C, programs for a block of I
    ACTIVATION: tl.constexpr,
    LARGE: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Program (block of I, some experts). LARGE: those that do not lie within one block of SMALL columns."""
    num_pairs, I, C, num_lanes = sizes  # noqa: E741
    block_i, lane = tl.program_id(0) // num_lanes, tl.program_id(0) % num_lanes
    i = (block_i * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    plane_ptr = planes_ptr + block_i.to(tl.int64) * num_pairs
    for number in range(lane, tl.load(pairs.count), num_lanes):
        first = tl.load(pairs.experts + number)
        last = tl.load(lasts_ptr + first)
        if (first // SMALL != (last - 1) // SMALL) == LARGE:
            for start in range(first // BLOCK_C * BLOCK_C, last if LARGE else first + 1, BLOCK_C):
                c = (tl.multiple_of(start, BLOCK_C) + tl.arange(0, BLOCK_C))[None, :]
                d_gate_B, d_up_B, d_down_A = sum_pairs(
                    *(block, stride, pairs, grads, d_stride, plane_ptr, i, c, (first, last, C), I),
                    *(ACTIVATION, LARGE, UP, BLOCK_T, BLOCK_I, BLOCK_C),
                )
                own = (c >= first) & (c < last) & (i < I)
                tl.store(d_gate_B_ptr + i * C + c, d_gate_B, own)
                tl.store(d_up_B_ptr + i * C + c, d_up_B, own)
                tl.store(d_down_A_ptr + c * I + i, d_down_A, own)


def launch_mix_wgrad(
    grads: Grads, block: Block, plan: Plan, pairs: Pairs, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_gate_B and d_up_B (I, C), d_down_A (C, I), d_weights (T, K), float32."""
    (num_columns, width), (num_tokens, num_slots) = block.down_A.shape, block.weights.shape
    dtype, device, num_blocks = block.gate.dtype, block.gate.device, triton.cdiv(width, WIDTH)
    shapes = ((width, num_columns), (width, num_columns), (num_columns, width))
    d_factors = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    planes = torch.zeros(num_blocks, num_tokens, num_slots, dtype=torch.float32, device=device)
    num_lanes, _ = split(num_columns, num_blocks, device, at_least=1, each=16)
    for large in (False, True) if num_columns > COLUMNS else (False,):
        pipelined = not large and dtype != torch.float32
        ffn_mix_wgrad_kernel[(num_blocks * num_lanes,)](
            *(block, block.strides(), pairs, grads, grads.strides(), plan.lasts, *d_factors, planes),
            (num_tokens * num_slots, width, num_columns, num_lanes),
            ACTIVATION=activation,
            LARGE=large,
            UP=must_widen(dtype),
            BLOCK_T=32 if large else 16,
            BLOCK_I=WIDTH,
            BLOCK_C=2 * COLUMNS if large else COLUMNS,
            SMALL=COLUMNS,
            num_warps=4 if pipelined else 8,
            num_stages=3 if pipelined else 1,
            enable_fp_fusion=False,
        )
    return d_factors[0], d_factors[1], d_factors[2], planes.sum(0)
