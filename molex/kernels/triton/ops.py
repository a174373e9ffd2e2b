"""The kernels as torch operators, so that torch.compile keeps them in one graph and CUDA graphs capture them (after one
call: the first compiles).

Each has a fake form (shapes alone, for tracing), and `shrink_gate` its gradients. None waits for the device, none has a
shape that depends on the routing. They are `custom_op`s, closed to the compiler: what `triton_op` would open to it has
nothing to fuse with, and cannot be interpreted. Fakes read `shape[0]`: `len` of a traced tensor is one number for ever.
"""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from molex.kernels.preload import sum_rows
from molex.kernels.triton.choose import Routed, launch_route_gate, launch_self_gate
from molex.kernels.triton.expand import launch_expand, launch_expand_tiles
from molex.kernels.triton.gate_backward import launch_gate_backward
from molex.kernels.triton.route import launch_route_planes
from molex.kernels.triton.shrink import launch_shrink, launch_shrink_planes
from molex.kernels.triton.token_tiles import TokenTiles
from molex.kernels.triton.wgrad import launch_wgrad


@torch.library.custom_op("molex::shrink_gate", mutates_args=())
def shrink_gate(
    x: Tensor, A: Tensor, gates: Tensor, expert_of_column: Tensor, row_of_column: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden and gated (T, C) in x's dtype: A x for every column, and the same times the gate of its expert.

    x (T, D) and A (C, D), or fewer rows where columns share them, in one of DTYPES; gates (T, E) float32, scaled.
    """
    gated = torch.empty(x.shape[0], expert_of_column.shape[0], dtype=x.dtype, device=x.device)
    return launch_shrink(x, A, gates, expert_of_column, row_of_column, gated), gated


@shrink_gate.register_fake
def _(
    x: Tensor, A: Tensor, gates: Tensor, expert_of_column: Tensor, row_of_column: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty(x.shape[0], expert_of_column.shape[0])
    return hidden, torch.empty_like(hidden)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, gates, expert_of_column, row_of_column = inputs
    ctx.save_for_backward(x, A, gates, expert_of_column, row_of_column, output[0])
    ctx.set_materialize_grads(False)


def _shrink_gate_backward(
    ctx: Any, grad_hidden: Tensor | None, grad_gated: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, A, gates, expert_of_column, row_of_column, hidden = ctx.saved_tensors
    grad, grad_gates = grad_hidden, None
    if grad_gated is not None:
        grad, grad_gates = gate_backward(grad_gated, hidden, gates, expert_of_column)
        grad = grad if grad_hidden is None else grad + grad_hidden
    if grad is None:
        return None, None, None, None, None
    grad_x = grad @ (A if row_of_column is None else A[row_of_column]) if ctx.needs_input_grad[0] else None
    grad_A = None
    if ctx.needs_input_grad[1]:
        grad_A = sum_rows(skinny_wgrad(grad, x), row_of_column, A.shape[0]).to(A.dtype)
    return grad_x, grad_A, grad_gates, None, None


shrink_gate.register_autograd(_shrink_gate_backward, setup_context=_save)


@torch.library.custom_op("molex::shrink_extend", mutates_args=())
def shrink_extend(
    x: Tensor, A: Tensor, gates: Tensor, expert_of_column: Tensor, row_of_column: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """hidden (T, C) and [x | gated | 0] (T, width): the left factor of one product with [W | B | 0].

    width is at least D + C; a multiple of 8 keeps the rows of 16-bit types aligned.
    """
    used = x.shape[1] + expert_of_column.shape[0]
    extended = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    extended[:, used:].zero_()
    gated = extended[:, x.shape[1] : used]
    return launch_shrink(x, A, gates, expert_of_column, row_of_column, gated, copy=extended), extended


@shrink_extend.register_fake
def _(
    x: Tensor, A: Tensor, gates: Tensor, expert_of_column: Tensor, row_of_column: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], expert_of_column.shape[0]), x.new_empty(x.shape[0], width)


@torch.library.custom_op("molex::gate_backward", mutates_args=())
def gate_backward(grad_gated: Tensor, hidden: Tensor, gates: Tensor, expert_of_column: Tensor) -> tuple[Tensor, Tensor]:
    """grad_hidden (T, C) = gates · grad_gated, and grad_gates (T, E), the sums of grad_gated · hidden by expert."""
    return launch_gate_backward(grad_gated, hidden, gates, expert_of_column)


@gate_backward.register_fake
def _(grad_gated: Tensor, hidden: Tensor, gates: Tensor, expert_of_column: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), gates.new_empty(gates.shape)


@torch.library.custom_op("molex::skinny_wgrad", mutates_args=())
def skinny_wgrad(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right: (T, C), (T, N) of one dtype -> (C, N) float32, the same bits every time."""
    return launch_wgrad(left, right)


@skinny_wgrad.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=torch.float32)


@torch.library.custom_op("molex::expand_add_", mutates_args=("y",))
def _expand_add(y: Tensor, gated: Tensor, B: Tensor) -> None:
    launch_expand(y, gated, B)


def expand_add(y: Tensor, gated: Tensor, B: Tensor) -> Tensor:
    """y (T, O) += gated (T, C) · B (O, C)ᵀ in place, summed in float32; returns y. Has no gradient of its own."""
    _expand_add(y, gated, B)
    return y


@torch.library.custom_op("molex::expand_add_tiles_", mutates_args=("y",))
def _expand_add_tiles(y: Tensor, gated: Tensor, B: Tensor, order: Tensor, blocks: Tensor, counts: Tensor) -> None:
    launch_expand_tiles(y, gated, B, TokenTiles(order, blocks, counts))


def expand_add_tiles(y: Tensor, gated: Tensor, B: Tensor, tiles: TokenTiles) -> Tensor:
    """`expand_add` that skips what a tile of like tokens does not need: gated must be zero there."""
    _expand_add_tiles(y, gated, B, *tiles)
    return y


def _route_shrink_now(
    x: Tensor,
    A: Tensor,
    router: Tensor,
    scale: Tensor,
    expert_of_column: Tensor,
    row_of_column: Tensor | None,
    top_k: int,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    planes = launch_route_planes(x, A, router, len(expert_of_column), row_of_column)
    return launch_route_gate(planes, scale, expert_of_column, x.dtype, top_k, renormalise)


_route_shrink = torch.library.custom_op("molex::route_shrink", _route_shrink_now, mutates_args=())


@_route_shrink.register_fake
def _(
    x: Tensor,
    A: Tensor,
    router: Tensor,
    scale: Tensor,
    expert_of_column: Tensor,
    row_of_column: Tensor | None,
    top_k: int,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    planes = scale.new_empty(1, x.shape[0], 0)
    return Routed.empty(expert_of_column.shape[0], router.shape[0], top_k, planes, x.dtype)


def route_shrink(
    x: Tensor,
    A: Tensor,
    router: Tensor,
    scale: Tensor,
    expert_of_column: Tensor,
    row_of_column: Tensor | None = None,
    *,
    top_k: int,
    renormalise: bool = True,
) -> Routed:
    """The softmax top-k router and `shrink_gate` in two launches, for inference: it has no gradient.

    router (E, D) in one of DTYPES, scale (E,) float32; at most `route.COLUMNS` columns of `route.EXPERTS` experts.
    """
    run = _route_shrink if _watched() else _route_shrink_now
    return Routed(*run(x, A, router, scale, expert_of_column, row_of_column, top_k, renormalise))


def _self_gated_shrink_now(
    x: Tensor, A: Tensor, bias: Tensor, scale: Tensor, top_k: int, signed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    planes = launch_shrink_planes(x, A)
    return launch_self_gate(planes, bias, scale, x.dtype, top_k, signed)


_self_gated_shrink = torch.library.custom_op("molex::self_gated_shrink", _self_gated_shrink_now, mutates_args=())


@_self_gated_shrink.register_fake
def _(
    x: Tensor, A: Tensor, bias: Tensor, scale: Tensor, top_k: int, signed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    planes = scale.new_empty(1, x.shape[0], 0)
    return Routed.empty(A.shape[0], A.shape[0], top_k, planes, x.dtype)


def self_gated_shrink(x: Tensor, A: Tensor, bias: Tensor, scale: Tensor, top_k: int, signed: bool) -> Routed:
    """Rank-1 experts that route on A x, in two launches, for inference; their weights are 1, their logits the scores.

    bias, which takes part in the choice alone, and scale are (C,) float32; at most `choose.SCORES` columns.
    """
    run = _self_gated_shrink if _watched() else _self_gated_shrink_now
    return Routed(*run(x, A, bias, scale, top_k, signed))


def _watched() -> bool:
    """Whether anything sees torch's operators go by. Else going through one costs as much time as ten small ones."""
    return is_compiling() or is_in_torch_dispatch_mode()
