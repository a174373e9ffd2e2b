"""Sort (token, slot) pairs by expert once, then one grouped product each way: pays when C is large and K small.

    gather rows -> grouped_mm with A (E, D, R) -> weigh the R-wide hidden -> grouped_mm with B (E, R, O) -> unsort

`F.grouped_mm` wants 16-byte strides (ranks are padded to a multiple of 8), no float64, contiguous gradients, and
leaves rows past the last group unwritten, in the result and in the gradient. Those rows (nobody's) are masked with
`where` on the way in and on the way out of each product: 0 * NaN is NaN, forward and backward.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex.kernels.base import Backend, backends
from molex.kernels.columns import Columns
from molex.kernels.cost import Shape, Step, moved, product
from molex.routing import Routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """N pairs in the order of their experts, nobody's last."""

    order: Tensor  # (N,) int64: where the n-th sorted pair stood before
    ends: Tensor  # (E,) int32, exclusive: where each expert's pairs end
    somebody: Tensor  # (N, 1) bool


@backends.register("grouped")
class Grouped(Backend):
    """Sorted pairs through `torch.nn.functional.grouped_mm`."""

    def steps(self, shape: Shape) -> Iterator[Step] | None:
        T, D, O, K, R, s = shape.num_tokens, shape.num_in, shape.num_out, shape.num_slots, shape.rank, shape.itemsize  # noqa: E741
        loops = shape.num_experts if s == 4 else 1  # of products one after the other, but in 16 bits
        yield product(T, O, D, s)
        yield moved(shape.num_columns, D + 2 * O, s, launches=2)  # every factor is read, B is laid anew
        yield moved(T * K, D, 4 * s, launches=8)  # sort, gather, mask
        yield product(T * K, R, D, s)._replace(launches=loops)
        yield product(T * K, O, R, s)._replace(launches=loops)
        yield moved(T * K, O, 6 * s, launches=4)  # mask, unsort, sum
        yield moved(T, O, 4 * s, launches=2)
        if shape.backward:
            yield product(T, D, O, s)
            yield moved(T * K, O, 6 * s, launches=4)
            yield product(T * K, R, O, s)._replace(launches=loops)
            yield product(T * K, D, R, s)._replace(launches=loops)
            yield Step(2 * T * K * R * (D + O), T * K * (D + O + 2 * R) * s, 2 * loops)
            yield moved(T * K, D, 6 * s, launches=6)
            yield moved(T, D, 4 * s, launches=2)

    def supports(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> str | None:
        num_out, num_in = columns.B.shape[0], x.shape[-1]
        per_row = 16 // x.element_size()
        if x.dtype not in DTYPES:
            return f"grouped_mm takes float32, bfloat16 and float16, not {x.dtype}"
        if num_in % per_row or num_out % per_row:
            return f"rows of {num_in} and {num_out} {x.dtype} are not a multiple of 16 bytes"
        if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
            return "under torch.compile grouped_mm takes bfloat16 only"
        return None

    def groups(self, plan: Plan) -> Tensor:
        """What `multiply` is told of the groups; asked for once, for the two products of a layer."""
        return plan.ends

    def multiply(self, rows: Tensor, factors: Tensor, groups: Tensor) -> Tensor:
        """Each row times its own expert's factor: (N, X), (E, Y, X) -> (N, Y). Rows past the last group may be
        anything, in the result and in the gradient."""
        return F.grouped_mm(rows, factors.transpose(1, 2), offs=groups)

    def pairs(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, columns: Columns) -> Tensor:
        plan = sort_pairs(expert_ids, len(columns.ranks))
        return unsort(self._sorted_pairs(rows[plan.order], weights[plan.order], columns, plan), plan.order)

    def delta(self, x: Tensor, columns: Columns, routing: Routing, hidden: Tensor | None = None) -> Tensor:
        num_tokens, num_slots = routing.expert_ids.shape
        plan = sort_pairs(routing.expert_ids.flatten(), len(columns.ranks))
        rows_ND, weights_N = x[plan.order // num_slots], routing.weights.flatten()[plan.order]
        y_NO = unsort(self._sorted_pairs(rows_ND, weights_N, columns, plan), plan.order)
        return y_NO.view(num_tokens, num_slots, y_NO.shape[-1]).sum(1)

    def _sorted_pairs(self, rows: Tensor, weights: Tensor, columns: Columns, plan: Plan) -> Tensor:
        (A_ERD, B_EOR), groups = _padded(columns), self.groups(plan)
        rows_ND = rows.where(plan.somebody, 0)
        hidden_NR = self.multiply(rows_ND, A_ERD, groups).where(plan.somebody, 0)
        gated_NR = (hidden_NR * weights[:, None]).to(rows.dtype).where(plan.somebody, 0)
        return self.multiply(gated_NR, B_EOR, groups).where(plan.somebody, 0)


def sort_pairs(expert_ids: Tensor, num_experts: int) -> Plan:
    """expert_ids (N,), -1 = nobody. Shapes never depend on the routing, so nothing waits for the device."""
    sorted_N, order_N = expert_ids.where(expert_ids >= 0, num_experts).sort(stable=True)
    experts_E = torch.arange(num_experts, device=expert_ids.device)
    ends_E = torch.searchsorted(sorted_N, experts_E, right=True).to(torch.int32)
    return Plan(order_N, ends_E, (sorted_N < num_experts)[:, None])


def unsort(sorted_rows: Tensor, order: Tensor) -> Tensor:
    """(N, X) rows back in the places that they were taken from in this order."""
    return torch.zeros_like(sorted_rows).index_copy(0, order, sorted_rows)


def _padded(columns: Columns) -> tuple[Tensor, Tensor]:
    """The experts as (E, R, D) and (E, O, R), zero-padded to one rank that is a multiple of 8."""
    rank = -(-max(columns.ranks) // 8) * 8
    A_CD = columns.A.contiguous() if columns.row_of_column is None else columns.A[columns.row_of_column]
    if columns.uniform_rank() == rank:
        return A_CD.unflatten(0, (-1, rank)), columns.B.unflatten(1, (-1, rank)).movedim(1, 0).contiguous()
    blocks = list(zip(A_CD.split(columns.ranks), columns.B.split(columns.ranks, dim=1), strict=True))
    A_ERD = torch.stack([F.pad(A_RD, (0, 0, 0, rank - A_RD.shape[0])) for A_RD, _ in blocks])
    return A_ERD, torch.stack([F.pad(B_OR, (0, rank - B_OR.shape[1])) for _, B_OR in blocks])
