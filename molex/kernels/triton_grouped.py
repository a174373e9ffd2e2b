"""Sorted pairs on Triton kernels: for very many columns of which each token uses few.

    forward    y = x Wᵀ;   h_k = A_e x;   y += Σ_k B_e (w_k h_k)                  e = the expert of slot k
    backward   dg_k = B_eᵀ dy;   dx = dy W;   dx += Σ_k A_eᵀ (w_k dg_k);   dA, dB over each expert's own pairs

Nothing is sorted but indices: rows are read through them, and results are added in place slot after slot, without
atomics. Saved for the backward beside x are h (K, T, R) and the indices.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from molex.kernels.base import backends
from molex.kernels.columns import Columns
from molex.kernels.cost import WIDE, Shape, Step, moved, product
from molex.kernels.preload import sum_rows, weight_of
from molex.kernels.triton_backend import Triton
from molex.routing import Routing

SORTING = 20  # launches on index tensors


@backends.register("triton_grouped")
class TritonGrouped(Triton):
    """Single linears; the two ends of a feed-forward block are `triton`'s."""

    has_blocks: ClassVar[bool] = False  # the same as triton's

    def steps(self, shape: Shape) -> Iterator[Step] | None:
        T, D, O, K, R, s = shape.num_tokens, shape.num_in, shape.num_out, shape.num_slots, shape.rank, shape.itemsize  # noqa: E741
        columns = min(shape.num_experts, T * K) * R  # that are used
        yield product(T, O, D, s)
        yield moved(T, K, 8 * WIDE, launches=SORTING)
        yield moved(columns, D + O, s, launches=0)
        yield product(T * K, R, D, s)
        yield product(T * K, O, R, s, onto=True)
        if shape.backward:
            yield product(T, D, O, s)
            yield product(T * K, R, O, s)
            yield moved(T * K, R, 4 * s, launches=3)
            yield product(T * K, D, R, s, onto=True)
            yield Step(2 * T * K * R * O, T * K * (O + R) * s + columns * O * WIDE)
            yield Step(2 * T * K * R * D, T * K * (D + R) * s + columns * D * WIDE)

    def layer(self, x: Tensor, source: Tensor | None, base: nn.Module, columns: Columns, routing: Routing) -> Tensor:
        factors = (columns.A, columns.B, routing.weights, routing.expert_ids)
        owners, rows = columns.expert_of_column, columns.row_of_column
        return _Pairs.apply(x, source, *weight_of(base), *factors, owners, rows, columns.ranks)


class _Pairs(torch.autograd.Function):
    """The whole layer. source: what the experts read where that is not x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Tensor | None,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        expert_of_column: Tensor,
        row_of_column: Tensor | None,
        ranks: tuple[int, ...],
    ) -> Tensor:
        from molex.kernels.triton.grouped_ops import grouped_expand_add, grouped_shrink
        from molex.kernels.triton.pair_tiles import tile_pairs

        read, pairs = x if source is None else source, tile_pairs(expert_ids, expert_of_column, len(ranks))
        hidden, gated = grouped_shrink(read, A, weights, pairs, max(ranks), row_of_column)
        ctx.save_for_backward(read, W, A, B, weights, hidden, row_of_column, *pairs)
        ctx.apart = source is not None
        return grouped_expand_add(F.linear(x, W, bias), gated, B, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from molex.kernels.triton.grouped_ops import grouped_expand_add, grouped_shrink, grouped_wgrad
        from molex.kernels.triton.pair_tiles import PairTiles

        (dy,), (read, W, A, B, weights, hidden, rows, *indices) = grads, ctx.saved_tensors
        needs_x, needs_source, _, _, needs_A, needs_B, needs_weights = ctx.needs_input_grad[:7]
        pairs, num_columns = PairTiles(*indices), B.shape[1]
        d_gated, d_hidden = grouped_shrink(dy, B.T, weights, pairs, hidden.shape[2])
        d_x = d_source = d_A = d_B = d_weights = None
        if needs_B:
            gated = (hidden * weights.T[..., None]).to(hidden.dtype)
            d_B = grouped_wgrad(gated, dy, pairs, num_columns).T.to(B.dtype)
        if needs_A:
            d_A = sum_rows(grouped_wgrad(d_hidden, read, pairs, num_columns), rows, len(A)).to(A.dtype)
        if needs_weights:
            d_weights = (d_gated.to(weights.dtype) * hidden).sum(-1).T
        if needs_x:
            d_x = dy @ W
        if needs_x or needs_source:
            through_experts = read.new_zeros(read.shape) if ctx.apart or d_x is None else d_x
            grouped_expand_add(through_experts, d_hidden, A.T, pairs, rows)
            d_source = through_experts if ctx.apart else None
        return d_x, d_source, None, None, d_A, d_B, d_weights, None, None, None, None
