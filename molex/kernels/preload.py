"""One accumulator for the base's product and the experts': what is written once is not read, added and written again.

    forward    y = g Bᵀ + bias;   y += x Wᵀ            g = G * h,  h = A x
    backward   d g = dy B;   d h, d G from it;   d x = d h A;   d x += dy W

The second product of each pair accumulates onto the first (a GEMM with beta = 1), where reading y hides behind the
product's own work; `dense` adds in a pass of its own. It rounds once less. Saved for the backward are x, h and G, so
C-wide tensors alone beside what the base saves anyway. At B = 0 the base comes out bit for bit.

It reads the base's weight, so the base must be a plain linear whose weight lies there as numbers. What of it is C-wide
is `Primitives`: here in plain torch, in `triton_backend` as kernels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from molex.kernels.base import backends
from molex.kernels.columns import Columns, gate
from molex.kernels.cost import WIDE, Shape, Step, moved, product
from molex.kernels.dense import Dense, gated_streams
from molex.linears import hooked
from molex.routing import Routing


class Primitives(NamedTuple):
    """What a layer does that is C wide.

    shrink_gate     x (T, D), A, gates (T, E), expert_of_column, row_of_column -> hidden, gated (T, C), in x's dtype
    gate_backward   d gated, hidden (T, C), gates, expert_of_column -> d hidden (T, C), d gates (T, E)
    weight_grad     (T, C), (T, N) -> (C, N): the first transposed times the second
    """

    shrink_gate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    gate_backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    weight_grad: Callable[[Tensor, Tensor], Tensor]


Expand = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]  # x, W, bias, gated, B -> y


@backends.register("preload")
class Preload(Dense):
    """Single linears and the narrow end of a block; the widening end is `dense`'s, which accumulates already."""

    raced: ClassVar[bool] = True
    launches: ClassVar[tuple[int, int]] = (3, 4)  # that gating takes beside the products, forward and backward

    def primitives(self, columns: Columns) -> Primitives:
        rank = columns.uniform_rank()
        return Primitives(partial(shrink_gate, rank=rank), partial(gate_backward, rank=rank), weight_grad)

    def expand(self, columns: Columns, routing: Routing) -> Expand:
        """How the base's product and the experts' come together in y."""
        return folded

    def steps(self, shape: Shape) -> Iterator[Step] | None:
        T, D, O, C, s = shape.num_tokens, shape.num_in, shape.num_out, shape.num_columns, shape.itemsize  # noqa: E741
        launches = self.launches[0]
        yield product(T, C, D, s)
        yield moved(T, C, s + WIDE * launches, launches=launches)
        yield product(T, O, C, s)
        yield product(T, O, D, s, onto=True)
        if shape.backward:
            yield from self.backward_steps(shape)

    def backward_steps(self, shape: Shape) -> Iterator[Step]:
        T, D, O, C, s = shape.num_tokens, shape.num_in, shape.num_out, shape.num_columns, shape.itemsize  # noqa: E741
        launches = self.launches[1]
        yield product(T, C, O, s)
        yield moved(T, C, 3 * s + WIDE * (launches - 1), launches=launches)
        yield product(O, C, T, s)
        yield product(C, D, T, s)
        yield product(T, D, C, s)
        yield product(T, D, O, s, onto=True)

    def supports(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> str | None:
        return why_not_plain(base, x)

    def linear(
        self,
        x: Tensor,
        base: nn.Module,
        columns: Columns,
        routing: Routing,
        *,
        dropped: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        rows_TD = x.reshape(-1, x.shape[-1])
        if hidden is None:
            y_TO = self.layer(
                rows_TD, None if dropped is None else dropped.reshape(rows_TD.shape), base, columns, routing
            )
        else:
            gated_TC = columns.gate(hidden, routing.gates()).to(x.dtype)
            y_TO = folded(rows_TD, *weight_of(base), gated_TC, columns.B)
        return y_TO.view(*x.shape[:-1], len(columns.B))

    def layer(self, x: Tensor, source: Tensor | None, base: nn.Module, columns: Columns, routing: Routing) -> Tensor:
        """`linear` of rows (T, D) -> (T, O). source (T, D): what the experts read where that is not x."""
        owners, rows = columns.expert_of_column, columns.row_of_column
        factors = (columns.A, columns.B, routing.gates(), owners, rows)
        how = (self.primitives(columns), self.expand(columns, routing), columns.uniform_rank())
        return _Linear.apply(x, source, *weight_of(base), *factors, *how)

    def narrow_add(self, mixed: Tensor, streams: Tensor, base: nn.Module, columns: Columns, routing: Routing) -> Tensor:
        gated_TC = gated_streams(streams, columns, routing).to(mixed.dtype)
        y_TO = folded(mixed.flatten(0, -2), *weight_of(base), gated_TC, columns.B)
        return y_TO.view(*mixed.shape[:-1], len(columns.B))


def why_not_plain(base: nn.Module, x: Tensor) -> str | None:
    """Why a kernel may not take the base's weight for what the base does; None where it may."""
    if type(base) is not nn.Linear or "forward" in vars(base):
        return f"the base is a {type(base).__name__}, or changed: its weight alone does not say what it computes"
    if hooked(base):
        return "the base has hooks, which would not be called"
    weight = base.weight
    if type(weight) not in (Tensor, nn.Parameter) or hasattr(weight, "ds_id") or weight.dim() != 2:
        return "the base's weight is sharded or quantised"
    if weight.dtype != x.dtype or weight.device != x.device:
        return f"the base is {weight.dtype} on {weight.device}, its input {x.dtype} on {x.device}"
    if any(p.requires_grad for p in base.parameters()) or torch.is_autocast_enabled(x.device.type):
        return "the base trains, or autocast chooses its dtype"
    return None


def weight_of(base: nn.Module) -> tuple[Tensor, Tensor | None]:
    assert isinstance(base, nn.Linear)
    return base.weight, base.bias


def folded(x: Tensor, W: Tensor, bias: Tensor | None, gated: Tensor, B: Tensor) -> Tensor:
    """x Wᵀ + bias + gated Bᵀ, (T, O), in one accumulator."""
    return F.linear(gated, B, bias).addmm_(x, W.T)


class _Linear(torch.autograd.Function):
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
        gates: Tensor,
        expert_of_column: Tensor,
        row_of_column: Tensor | None,
        primitives: Primitives,
        expand: Expand,
        rank: int | None,
    ) -> Tensor:
        read = x if source is None else source
        hidden, gated = primitives.shrink_gate(read, A, gates, expert_of_column, row_of_column)
        ctx.save_for_backward(read, W, A, B, gates, hidden, expert_of_column, row_of_column)
        ctx.primitives, ctx.rank, ctx.apart = primitives, rank, source is not None
        return expand(x, W, bias, gated, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (read, W, A, B, gates, hidden, owners, rows) = grads, ctx.saved_tensors
        needs_x, needs_source, _, _, needs_A, needs_B, needs_gates = ctx.needs_input_grad[:7]
        d_x = d_source = d_A = d_B = d_gates = None
        d_gated = dy @ B
        if needs_B:
            d_B = ctx.primitives.weight_grad(gate_columns(hidden, gates, owners, ctx.rank), dy).T.to(B.dtype)
        d_hidden, d_gates = ctx.primitives.gate_backward(d_gated, hidden, gates, owners)
        if needs_A:
            d_A = sum_rows(ctx.primitives.weight_grad(d_hidden, read), rows, len(A)).to(A.dtype)
        if needs_x or needs_source:
            through_experts = d_hidden @ (A if rows is None else A[rows])
            if ctx.apart:
                d_x, d_source = dy @ W if needs_x else None, through_experts
            else:
                d_x = through_experts.addmm_(dy, W)
        return d_x, d_source, None, None, d_A, d_B, d_gates if needs_gates else None, *[None] * 5


def sum_rows(by_column: Tensor, row_of_column: Tensor | None, num_rows: int) -> Tensor:
    """The gradient of A (rows, D) from that of each column's row (C, D)."""
    if row_of_column is None:
        return by_column
    return by_column.new_zeros(num_rows, by_column.shape[1]).index_add_(0, row_of_column, by_column)


def shrink_gate(
    x: Tensor, A: Tensor, gates: Tensor, expert_of_column: Tensor, row_of_column: Tensor | None, *, rank: int | None
) -> tuple[Tensor, Tensor]:
    hidden_TC = F.linear(x, A)
    hidden_TC = hidden_TC if row_of_column is None else hidden_TC[:, row_of_column]
    return hidden_TC, gate_columns(hidden_TC, gates, expert_of_column, rank)


def gate_columns(hidden: Tensor, gates: Tensor, expert_of_column: Tensor, rank: int | None) -> Tensor:
    """(T, C) times each column's gate, in its own dtype."""
    return gate(hidden, gates, expert_of_column, rank).to(hidden.dtype)


def gate_backward(
    grad_gated: Tensor, hidden: Tensor, gates: Tensor, expert_of_column: Tensor, *, rank: int | None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gates.dtype, torch.float32)
    products_TC = grad_gated.to(wide) * hidden.to(wide)
    if rank is None:
        grad_gates_TE = torch.zeros_like(gates).index_add_(1, expert_of_column, products_TC)
    else:
        grad_gates_TE = products_TC.unflatten(1, (-1, rank)).sum(-1)
    return gate_columns(grad_gated, gates, expert_of_column, rank), grad_gates_TE


def weight_grad(left: Tensor, right: Tensor) -> Tensor:
    return left.T @ right
