"""All experts for all tokens, masked at the rank: two products, no sort, no gather, no host sync.

    h = A x (T, C)      y = (h * gates) Bᵀ

The zeros cost only multiplications on a C-wide dimension; while C is below about 500 that is cheaper than
moving tokens around, on CPU and GPU alike. Gate gradients of unchosen experts come for free.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from molex.kernels.base import Backend, backends
from molex.kernels.block import Block, Core, Inputs, Mix, Projection, run_core
from molex.kernels.columns import Columns
from molex.kernels.cost import WIDE, Shape, Step, moved, product
from molex.kernels.streams import CORE
from molex.routing import Routing

WORTH = 1 << 17  # numbers of a (T, I) tensor: of fewer, an expert after the other takes longer than the zeros do


@backends.register("dense")
class Dense(Backend):
    """Two matrix products and a mask; never refuses."""

    has_blocks: ClassVar[bool] = True

    def steps(self, shape: Shape) -> Iterator[Step] | None:
        T, D, O, C, s = shape.num_tokens, shape.num_in, shape.num_out, shape.num_columns, shape.itemsize  # noqa: E741
        yield product(T, O, D, s)
        yield product(T, C, D, s)
        yield moved(T, C, 2 * s + 2 * WIDE, launches=4)
        yield product(T, O, C, s, onto=True)
        if shape.backward:
            yield product(T, D, O, s)
            yield product(T, C, O, s)
            yield moved(T, C, 2 * s + 6 * WIDE, launches=6)
            yield product(O, C, T, s)
            yield product(C, D, T, s)
            yield product(T, D, C, s)
            yield moved(T, D, 3 * s)  # both gradients of x, added

    def pairs(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, columns: Columns) -> Tensor:
        one_slot = Routing(expert_ids[:, None], weights[:, None], None, len(columns.ranks))
        return self.delta(rows, columns, one_slot)

    def delta(self, x: Tensor, columns: Columns, routing: Routing, hidden: Tensor | None = None) -> Tensor:
        return expand(gated_hidden(x, columns, routing, hidden), columns)

    def add(self, y: Tensor, rows: Tensor, columns: Columns, routing: Routing, hidden: Tensor | None) -> Tensor:
        if y.dtype != columns.B.dtype:
            return super().add(y, rows, columns, routing, hidden)
        # one pass over y and one rounding less than a product and a sum
        gated_TC = gated_hidden(rows, columns, routing, hidden).to(y.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), gated_TC, columns.B.T).view(y.shape)

    def widen_add(self, y: Tensor, rows: Tensor, columns: Columns, routing: Routing) -> Tensor:
        if y.dtype != columns.B.dtype:
            return super().widen_add(y, rows, columns, routing)
        gated_KTC = columns.gate(columns.shrink(rows), slot_gates(routing)).to(y.dtype)
        num_slots = len(gated_KTC)
        return torch.baddbmm(y.expand(num_slots, -1, -1), gated_KTC, columns.B.T.expand(num_slots, -1, -1))

    def widen_delta(self, x: Tensor, columns: Columns, routing: Routing) -> Tensor:
        return expand(columns.gate(columns.shrink(x), slot_gates(routing)), columns)

    def core(self, x: Tensor, width: int) -> Core | None:
        """What computes between the base's projections of a block, `width` wide; None: streams side by side do."""
        worth = x.shape[:-1].numel() * width >= WORTH
        return CORE if worth and x.device.type == "cpu" and not torch.compiler.is_compiling() else None

    def ffn(self, x: Tensor, block: Block) -> Tensor:
        core = self.core(x, block.down.columns.A.shape[1])
        if core is None:
            return super().ffn(x, block)
        rows_TD, (gate, up, down) = x.reshape(-1, x.shape[-1]), block[:3]
        inputs = Inputs(
            gate=gate.base(x).flatten(0, -2),
            up=up.base(x).flatten(0, -2),
            gate_gated=_gated(rows_TD, gate),
            up_gated=_gated(rows_TD, up),
            gate_B=gate.columns.B,
            up_B=up.columns.B,
            down_A=down.columns.A,
            weights=block.routing.weights,
            expert_ids=block.routing.expert_ids,
            expert_of_column=down.columns.expert_of_column,
            keep=block.keep,
        )
        mixed_TI, hidden_TC = run_core(inputs, Mix(block.activation, block.routing.normalised), core)
        mixed = mixed_TI.view(*x.shape[:-1], mixed_TI.shape[-1])
        return self.linear(mixed, down.base, down.columns, down.routing, hidden=hidden_TC)

    def narrow_delta(self, streams: Tensor, columns: Columns, routing: Routing) -> Tensor:
        return expand(gated_streams(streams, columns, routing), columns)


def _gated(rows: Tensor, one: Projection) -> Tensor:
    """(T, D) -> (T, C) in the dtype of the rows, zero in the columns of experts that are not a token's."""
    source = rows if one.source is None else one.source.reshape(rows.shape)
    return one.columns.gate(one.columns.shrink(source), one.routing.gates()).to(rows.dtype)


def gated_hidden(x: Tensor, columns: Columns, routing: Routing, hidden: Tensor | None) -> Tensor:
    """(T, D) -> (T, C), float32 or wider."""
    hidden_TC = columns.shrink(x) if hidden is None else hidden
    return columns.gate(hidden_TC, routing.gates())


def gated_streams(streams: Tensor, columns: Columns, routing: Routing) -> Tensor:
    """Each slot's stream through its own expert's columns: (K, T, D) -> (T, C), float32 or wider."""
    return columns.gate(columns.shrink(streams), slot_gates(routing)).sum(0)


def expand(gated: Tensor, columns: Columns) -> Tensor:
    """(..., C) -> (..., O), in the dtype of the factors: gates are float32 and would widen the product."""
    return F.linear(gated.to(columns.B.dtype), columns.B)


def slot_gates(routing: Routing) -> Tensor:
    """The gates of each slot apart: (K, T, E), one non-zero entry a row."""
    one_hot_KTE = routing.expert_ids.T[..., None] == torch.arange(routing.num_experts, device=routing.expert_ids.device)
    return one_hot_KTE * routing.weights.T[..., None]
