"""The kernels for sorted pairs as torch operators; a `PairTiles` is passed tensor by tensor."""

import torch
from torch import Tensor

from molex.kernels.triton.grouped import launch_grouped_expand, launch_grouped_shrink, launch_grouped_wgrad
from molex.kernels.triton.pair_tiles import PairTiles


@torch.library.custom_op("molex::grouped_shrink", mutates_args=())
def _grouped_shrink(
    x: Tensor, A: Tensor, weights: Tensor, row_of_column: Tensor | None, pairs: list[Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    return launch_grouped_shrink(x, A, weights, row_of_column, PairTiles(*pairs), rank)


@_grouped_shrink.register_fake
def _(
    x: Tensor, A: Tensor, weights: Tensor, row_of_column: Tensor | None, pairs: list[Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty(weights.shape[1], x.shape[0], rank)
    return hidden, torch.empty_like(hidden)


def grouped_shrink(
    x: Tensor, A: Tensor, weights: Tensor, pairs: PairTiles, rank: int, row_of_column: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden and gated (K, T, R): A_e x[t], and the same times weights[t, k], for the expert of each pair.

    rank is the largest of the experts. weights (T, K) are float32, scale included. On (dy, Bᵀ) it gives dg and dh.
    """
    return _grouped_shrink(x, A, weights, row_of_column, list(pairs), rank)


@torch.library.custom_op("molex::grouped_expand_add_", mutates_args=("y",))
def _grouped_expand_add(y: Tensor, gated: Tensor, B: Tensor, row_of_column: Tensor | None, pairs: list[Tensor]) -> None:
    launch_grouped_expand(y, gated, B, row_of_column, PairTiles(*pairs))


def grouped_expand_add(
    y: Tensor, gated: Tensor, B: Tensor, pairs: PairTiles, row_of_column: Tensor | None = None
) -> Tensor:
    """y[t] += Σ_k B_e gated[k, t] in place, slot after slot; returns y. On (dx, dh, Aᵀ) it adds what x receives.

    B (O, C); where row_of_column is given, B has fewer columns and column c reads the one named there.
    """
    _grouped_expand_add(y, gated, B, row_of_column, list(pairs))
    return y


@torch.library.custom_op("molex::grouped_wgrad", mutates_args=())
def _grouped_wgrad(left: Tensor, right: Tensor, pairs: list[Tensor], num_columns: int) -> Tensor:
    return launch_grouped_wgrad(left, right, PairTiles(*pairs), num_columns)


@_grouped_wgrad.register_fake
def _(left: Tensor, right: Tensor, pairs: list[Tensor], num_columns: int) -> Tensor:
    return left.new_empty(num_columns, right.shape[1], dtype=torch.float32)


def grouped_wgrad(left: Tensor, right: Tensor, pairs: PairTiles, num_columns: int) -> Tensor:
    """Σ left[k, t]ᵀ right[t] over each expert's pairs: (K, T, R), (T, N) -> (C, N) float32."""
    return _grouped_wgrad(left, right, list(pairs), num_columns)
