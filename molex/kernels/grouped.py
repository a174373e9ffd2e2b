"""Sort (token, slot) pairs by expert once, then one grouped product each way: pays when C is large and K small.

    gather rows -> grouped_mm with A (E, D, R) -> weigh the R-wide hidden -> grouped_mm with B (E, R, O) -> unsort

`F.grouped_mm` wants 16-byte strides (ranks are padded to a multiple of 8), no float64, contiguous gradients, and
leaves rows past the last group unwritten, in the result and in the gradient. Those rows (nobody's) are masked with
`where` on the way in and on the way out of each product: 0 * NaN is NaN, forward and backward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex.kernels.base import Backend, backends
from molex.kernels.columns import Columns
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

    def pairs(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, columns: Columns) -> Tensor:
        plan = sort_pairs(expert_ids, len(columns.ranks))
        return _unsort(_sorted_pairs(rows[plan.order], weights[plan.order], columns, plan), plan)

    def delta(self, x: Tensor, columns: Columns, routing: Routing, hidden: Tensor | None = None) -> Tensor:
        num_tokens, num_slots = routing.expert_ids.shape
        plan = sort_pairs(routing.expert_ids.flatten(), len(columns.ranks))
        rows_ND = x[plan.order // num_slots]
        y_NO = _unsort(_sorted_pairs(rows_ND, routing.weights.flatten()[plan.order], columns, plan), plan)
        return y_NO.view(num_tokens, num_slots, y_NO.shape[-1]).sum(1)


def sort_pairs(expert_ids: Tensor, num_experts: int) -> Plan:
    """expert_ids (N,), -1 = nobody. Shapes never depend on the routing, so nothing waits for the device."""
    sorted_N, order_N = expert_ids.where(expert_ids >= 0, num_experts).sort(stable=True)
    experts_E = torch.arange(num_experts, device=expert_ids.device)
    ends_E = torch.searchsorted(sorted_N, experts_E, right=True).to(torch.int32)
    return Plan(order_N, ends_E, (sorted_N < num_experts)[:, None])


def _sorted_pairs(rows: Tensor, weights: Tensor, columns: Columns, plan: Plan) -> Tensor:
    A_ERD, B_EOR = _padded(columns)
    rows_ND = rows.where(plan.somebody, 0)
    hidden_NR = F.grouped_mm(rows_ND, A_ERD.transpose(1, 2), offs=plan.ends).where(plan.somebody, 0)
    gated_NR = (hidden_NR * weights[:, None]).to(rows.dtype).where(plan.somebody, 0)
    return F.grouped_mm(gated_NR, B_EOR.transpose(1, 2), offs=plan.ends).where(plan.somebody, 0)


def _unsort(sorted_rows: Tensor, plan: Plan) -> Tensor:
    return torch.zeros_like(sorted_rows).index_copy(0, plan.order, sorted_rows)


def _padded(columns: Columns) -> tuple[Tensor, Tensor]:
    """The experts as (E, R, D) and (E, O, R), zero-padded to one rank that is a multiple of 8."""
    rank = -(-max(columns.ranks) // 8) * 8
    A_CD = columns.A if columns.row_of_column is None else columns.A[columns.row_of_column]
    if columns.uniform_rank() == rank:
        return A_CD.unflatten(0, (-1, rank)), columns.B.unflatten(1, (-1, rank)).movedim(1, 0).contiguous()
    blocks = list(zip(A_CD.split(columns.ranks), columns.B.split(columns.ranks, dim=1), strict=True))
    A_ERD = torch.stack([F.pad(A_RD, (0, 0, 0, rank - A_RD.shape[0])) for A_RD, _ in blocks])
    return A_ERD, torch.stack([F.pad(B_OR, (0, rank - B_OR.shape[1])) for _, B_OR in blocks])
