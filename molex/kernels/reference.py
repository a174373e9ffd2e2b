"""The oracle: one expert at a time, in any dtype. Slow, obvious, and what every other backend is tested against."""

from torch import Tensor

from molex.kernels.base import Backend, backends
from molex.kernels.columns import Columns


@backends.register("reference")
class Reference(Backend):
    """A loop over experts; never refuses."""

    def pairs(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, columns: Columns) -> Tensor:
        y_NO = rows.new_zeros(rows.shape[0], columns.B.shape[0])
        for expert_id in range(len(columns.ranks)):
            A_RD, B_OR = columns.expert(expert_id)
            weights_N = weights * (expert_ids == expert_id)
            hidden_NR = (rows @ A_RD.T) * weights_N[:, None]
            y_NO = y_NO + hidden_NR.to(rows.dtype) @ B_OR.T
        return y_NO
