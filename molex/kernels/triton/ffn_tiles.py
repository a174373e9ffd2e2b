"""What the kernels of a feed-forward block share: their inputs, and products with the columns of one expert.

Columns are loaded in blocks whose first is a multiple of the block's width, so that loads are wide whatever the ranks;
what belongs to a neighbour is masked after the load.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.ffn_activations import ACTIVATIONS
from molex.kernels.triton.tiles import check_dtypes, rounded, row_major, split, widened

INNER = 32  # of I, in the tiles of a program: more of them would not fit into a thread's registers
PLANES = 1 << 27  # bytes, at most, of the float32 planes of one launch


class Block(NamedTuple):
    """A feed-forward block between its base products. All but weights and keep have one dtype of DTYPES."""

    gate: Tensor  # (T, I), the base's alone
    up: Tensor  # (T, I)
    gate_gated: Tensor  # (T, C): A x times the expert's scale, zero where the expert was not chosen
    up_gated: Tensor  # (T, C)
    gate_B: Tensor  # (I, C)
    up_B: Tensor  # (I, C)
    down_A: Tensor  # (C, I)
    keep: Tensor | None  # (T, I) bool
    weights: Tensor  # (T, K) float32, contiguous

    def checked(self, activation: str) -> "Block":
        """With rows that are contiguous."""
        assert activation in ACTIVATIONS, f"activation is {activation!r}, known are {ACTIVATIONS}"
        assert self.weights.dtype == torch.float32, f"weights are {self.weights.dtype}, not float32"
        check_dtypes(*self.factors())
        factors = [row_major(factor) for factor in self.factors()]
        assert all(len(factor) * factor.stride(0) < 1 << 31 for factor in factors[4:]), "offsets in B and A are int32"
        keep = None if self.keep is None else row_major(self.keep).view(torch.int8)
        return Block._make([*factors, keep, self.weights.contiguous()])

    def factors(self) -> tuple[Tensor, ...]:
        return self[:7]

    def strides(self) -> "Block":
        """From row to row of each. One row of weights may have any stride, and theirs is K too."""
        strides = Block._make(None if tensor is None else tensor.stride(0) for tensor in self)
        return strides._replace(weights=self.weights.shape[1])


class Grads(NamedTuple):
    """Of a block's two results, in its dtype, and what the base's own stream receives of the first."""

    mixed: Tensor  # (T, I)
    down: Tensor  # (T, C)
    rest: Tensor  # (T,) float32: 1 − Σ w

    def strides(self) -> "Grads":
        return Grads._make(tensor.stride(0) for tensor in self)


@triton.jit
def add_product(
    acc: tl.tensor,  # (M, N)
    left_ptr: tl.tensor,
    left_offset: tl.tensor,  # (M, 1)
    left_stride: tl.tensor,  # from column to column
    left_mask: tl.tensor,
    right_ptr: tl.tensor,
    right_offset: tl.tensor,  # (1, N)
    right_stride: tl.tensor,
    right_mask: tl.tensor,
    columns: tl.tuple,  # the expert's first, the one after its last, C
    UP: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tl.tensor:
    """acc + left[m, c] right[c, n], summed over the expert's columns, from first to last."""
    first, last, C = columns
    for start in range(first // BLOCK_C * BLOCK_C, last, BLOCK_C):
        c = tl.multiple_of(start, BLOCK_C) + tl.arange(0, BLOCK_C)
        left = tl.load(left_ptr + left_offset + c[None, :] * left_stride, left_mask & (c < C)[None, :], other=0.0)
        right = tl.load(right_ptr + right_offset + c[:, None] * right_stride, (c < C)[:, None] & right_mask, other=0.0)
        right = tl.where(((c >= first) & (c < last))[:, None], right, 0.0)
        acc = tl.dot(widened(left, UP), widened(right, UP), acc, input_precision="ieee")
    return acc


@triton.jit
def add_shrunk(
    planes_ptr: tl.tensor,
    t_offset: tl.tensor,  # (BLOCK_T, 1)
    t_mask: tl.tensor,
    tile: tl.tensor,  # (BLOCK_T, BLOCK_I)
    wide_ptr: tl.tensor,
    stride_c: tl.tensor,
    i_offset: tl.tensor,  # (BLOCK_I, 1)
    i_mask: tl.tensor,
    columns: tl.tuple,  # the expert's first, the one after its last, C
    UP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """planes[t, c] += tile[t, i] wide[c, i], summed over i, for the expert's columns.

    Of one row of planes one program alone knows; between two calls for the same columns it needs a barrier.
    """
    first, last, C = columns
    for start in range(first // BLOCK_C * BLOCK_C, last, BLOCK_C):
        c = tl.multiple_of(start, BLOCK_C) + tl.arange(0, BLOCK_C)
        wide_ptrs = wide_ptr + c[None, :] * stride_c + i_offset
        wide = tl.load(wide_ptrs, (c < C)[None, :] & i_mask, other=0.0)
        own = (c >= first) & (c < last)
        added = tl.dot(tile, widened(wide, UP), input_precision="ieee")
        planes_ptrs, mask = planes_ptr + t_offset + c[None, :], t_mask & (c < C)[None, :]
        before = tl.load(planes_ptrs, mask, other=0.0)
        tl.store(planes_ptrs, before + tl.where(own[None, :], added, 0.0), mask)


@triton.jit
def expert_streams(
    gate: tl.tensor,
    up: tl.tensor,
    block: Block,
    stride: Block,
    t: tl.tensor,
    t_mask: tl.tensor,
    i: tl.tensor,
    i_mask: tl.tensor,
    columns: tl.tuple,
    UP: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """gate and up (BLOCK_T, BLOCK_I) of an expert, from the base's."""
    gate_e = add_product(
        *(gate, block.gate_gated, t * stride.gate_gated, 1, t_mask),
        *(block.gate_B, i * stride.gate_B, 1, i_mask, columns, UP, BLOCK_C),
    )
    up_e = add_product(
        *(up, block.up_gated, t * stride.up_gated, 1, t_mask),
        *(block.up_B, i * stride.up_B, 1, i_mask, columns, UP, BLOCK_C),
    )
    return gate_e, up_e


@triton.jit
def narrowed(tile: tl.tensor, like_ptr: tl.tensor, UP: tl.constexpr) -> tl.tensor:
    """A float32 tile as a factor: rounded to the dtype of what `like_ptr` points to, then widened where it must be."""
    return widened(rounded(tile, UP).to(like_ptr.dtype.element_ty), UP)


def split_inner(block: Block, num_tiles: int, num_planes: int) -> tuple[int, int]:
    """Cuts I: (number of parts, part). Each part has num_planes float32 planes (T, C), of PLANES bytes all together."""
    num_tokens, width = block.gate.shape
    most = max(1, PLANES // max(1, 4 * num_planes * num_tokens * block.down_A.shape[0]))
    at_least = -(-width // (most * INNER)) * INNER
    return split(width, num_tiles, block.gate.device, at_least, each=8)


def add_planes(planes: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """planes (parts, T, C) -> (T, C), added in their order; zero where the expert is not chosen."""
    return planes.sum(0).where(chosen, 0.0).to(dtype)
