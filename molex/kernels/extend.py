"""K-extension: the experts' columns lie behind the base's weight, so that one product each way does both.

    [x | g] · [W | B]ᵀ = x Wᵀ + g Bᵀ            dy · [W | B] = [dx | dg]

y is written once and dy read once, and a token that is decoded has one launch less. It costs a copy of x beside g, and
that the weight lies in rows of D + C numbers: the base's own weight becomes a view of them (the same Parameter, the
same values), and B is copied in behind it at every use. By arithmetic it wins nothing over `preload` on many tokens, so
it is there to be named, and `auto` moves nobody's weights.

At B = 0 the base comes out up to rounding: zeros are summed with it, in another order.
"""

from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from molex.kernels.base import backends
from molex.kernels.columns import Columns
from molex.kernels.cost import Shape, Step
from molex.kernels.preload import Preload, gate_columns, sum_rows, weight_of
from molex.routing import Routing

ALIGNED = 8  # numbers: rows of 16-bit types begin at multiples of 16 bytes


@backends.register("extend")
class Extend(Preload):
    """Single linears; the two ends of a feed-forward block are `preload`'s."""

    has_blocks: ClassVar[bool] = False  # the same as preload's

    def __init__(self) -> None:
        self._memories: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # (O, at least D + C) of each base

    def supports(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> str | None:
        if torch.compiler.is_compiling():
            return "it lays the base's weight in other memory, which a compiled graph cannot; use preload"
        return super().supports(x, columns, routing, base)

    def steps(self, shape: Shape) -> Iterator[Step] | None:
        return None  # as preload's but for a copy of x, and for the weight, which `auto` leaves where it is

    def shrink_extend(self, x: Tensor, columns: Columns, gates: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """hidden (T, C) and [x | gated | 0] (T, width)."""
        shrink_gate = Preload.primitives(self, columns).shrink_gate
        hidden, gated = shrink_gate(x, columns.A, gates, columns.expert_of_column, columns.row_of_column)
        return hidden, F.pad(torch.cat([x, gated], dim=1), (0, width - x.shape[1] - gated.shape[1]))

    def layer(self, x: Tensor, source: Tensor | None, base: nn.Module, columns: Columns, routing: Routing) -> Tensor:
        if source is not None:  # base and experts read two tensors: there is no [x | g]
            return super().layer(x, source, base, columns, routing)
        memory, bias = self.memory(base, columns.B), weight_of(base)[1]
        return _Extended.apply(x, memory, bias, columns.A, columns.B, routing.gates(), columns, self)

    def give_back(self, base: nn.Module) -> None:
        if self._memories.pop(base, None) is not None:
            W = weight_of(base)[0]
            W.data = W.data.contiguous()

    @torch.no_grad()
    def memory(self, base: nn.Module, B: Tensor) -> Tensor:
        """[W | · | 0] of a base, its weight a view of it. Laid once, and again when the weight went elsewhere."""
        W = weight_of(base)[0]
        used = W.shape[1] + B.shape[1]
        shape = (len(W), -(-used // ALIGNED) * ALIGNED)
        known = self._memories.get(base)
        if known is not None and known.shape == shape and known.data_ptr() == W.data_ptr() and known.dtype == W.dtype:
            return known
        with torch.inference_mode(False):  # what is laid in inference is trained with later
            memory = torch.zeros(shape, dtype=W.dtype, device=W.device)
            memory[:, : W.shape[1]] = W
            W.data = memory[:, : W.shape[1]]
        self._memories[base] = memory
        return memory


class _Extended(torch.autograd.Function):
    """Saves what `preload` saves: [x | g] is made and gone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        memory: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gates: Tensor,
        columns: Columns,
        plan: Extend,
    ) -> Tensor:
        hidden, extended = plan.shrink_extend(x, columns, gates, memory.shape[1])
        ctx.save_for_backward(x, A, B, gates, hidden, columns.expert_of_column, columns.row_of_column)
        ctx.memory, ctx.primitives, ctx.rank = memory, plan.primitives(columns), columns.uniform_rank()
        return F.linear(extended, _behind(memory, B, x.shape[1]), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, A, B, gates, hidden, owners, rows) = grads, ctx.saved_tensors
        num_in, num_columns = x.shape[1], B.shape[1]
        d_extended = dy @ _behind(ctx.memory, B, num_in)
        d_x, d_gated = d_extended[:, :num_in], d_extended[:, num_in : num_in + num_columns]
        d_hidden, d_gates = ctx.primitives.gate_backward(d_gated, hidden, gates, owners)
        d_x = d_x.addmm_(d_hidden, A if rows is None else A[rows]) if ctx.needs_input_grad[0] else None
        d_A = d_B = None
        if ctx.needs_input_grad[3]:
            d_A = sum_rows(ctx.primitives.weight_grad(d_hidden, x), rows, len(A)).to(A.dtype)
        if ctx.needs_input_grad[4]:
            d_B = ctx.primitives.weight_grad(gate_columns(hidden, gates, owners, ctx.rank), dy).T.to(B.dtype)
        return d_x, None, None, d_A, d_B, d_gates if ctx.needs_input_grad[5] else None, None, None


def _behind(memory: Tensor, B: Tensor, num_in: int) -> Tensor:
    """The memory with B behind the weight: it may be another one since."""
    memory[:, num_in : num_in + B.shape[1]] = B
    return memory
