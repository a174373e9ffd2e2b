"""The `preload` plan with its C-wide work in Triton kernels: shrink and gate in one launch, one read of x.

`import molex` does not import triton: the kernels are loaded where this backend is first asked to run.
"""

import os
from importlib.util import find_spec
from typing import ClassVar

from torch import Tensor, nn

from molex.kernels.base import backends
from molex.kernels.block import Core, Grads, Inputs, Mix
from molex.kernels.columns import Columns
from molex.kernels.extend import Extend
from molex.kernels.preload import Preload, Primitives, folded, weight_of
from molex.kernels.routed import RoutesItself
from molex.routing import Routing, Rule, SoftmaxTopK

FEW_TOKENS = 256  # above, launches cost little beside the work, which separate products do better
_YES = ("1", "true", "yes", "on", "y")  # as triton reads its environment


@backends.register("triton")
class Triton(Preload, RoutesItself):
    """On a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""

    launches: ClassVar[tuple[int, int]] = (0, 1)

    def primitives(self, columns: Columns) -> Primitives:
        from molex.kernels.triton import gate_backward, shrink_gate, skinny_wgrad

        return Primitives(shrink_gate, gate_backward, skinny_wgrad)

    def core(self, x: Tensor, width: int) -> Core | None:
        from molex.kernels.triton.ffn_ops import ffn_mix, ffn_mix_backward

        def forward(inputs: Inputs, mix: Mix) -> tuple[Tensor, Tensor]:
            return ffn_mix(*inputs, mix.activation)

        def backward(d_mixed: Tensor, d_hidden: Tensor, inputs: Inputs, mix: Mix) -> Grads:
            grads = Grads(*ffn_mix_backward(d_mixed, d_hidden, *inputs, mix.activation))
            return grads.of_normalised() if mix.normalised else grads

        return Core(forward, backward)

    def supports(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> str | None:
        if find_spec("triton") is None:
            return "the package triton is not installed: pip install 'molex[kernels]'"
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET", "").lower() not in _YES:
            return f"its kernels run on a GPU, x is on {x.device}"
        from molex.kernels.triton import DTYPES

        if x.dtype not in DTYPES:
            return f"its kernels take float32, bfloat16 and float16, not {x.dtype}"
        return super().supports(x, columns, routing, base)

    def routes(self, x: Tensor, columns: Columns, rule: Rule) -> bool:
        from molex.kernels.triton.choose import SCORES
        from molex.kernels.triton.route import COLUMNS, EXPERTS

        num_columns, few = len(columns.expert_of_column), x.shape[:-1].numel() <= FEW_TOKENS
        if isinstance(rule, SoftmaxTopK):
            return few and num_columns <= COLUMNS and len(rule.weight) <= EXPERTS
        return few and num_columns <= SCORES and columns.row_of_column is None

    def route_linear(
        self, x: Tensor, base: nn.Module, columns: Columns, rule: Rule, scale: Tensor
    ) -> tuple[Tensor, Routing]:
        from molex.kernels.triton import route_shrink, self_gated_shrink

        rows_TD, (W, bias), normalised = x.reshape(-1, x.shape[-1]), weight_of(base), False
        if isinstance(rule, SoftmaxTopK):
            tables, normalised = (columns.expert_of_column, columns.row_of_column), rule.renormalise
            settings = {"top_k": rule.top_k, "renormalise": rule.renormalise}
            routed = route_shrink(rows_TD, columns.A, rule.weight, scale, *tables, **settings)
        else:
            routed = self_gated_shrink(rows_TD, columns.A, rule.bias, scale, rule.top_k, rule.signed)
        y_TO = folded(rows_TD, W, bias, routed.gated, columns.B)
        routing = Routing(routed.expert_ids, routed.weights, routed.logits, len(columns.ranks), normalised)
        return y_TO.view(*x.shape[:-1], len(W)), routing


@backends.register("triton_extend")
class TritonExtend(Triton, Extend):
    """`extend`, with x copied while it is read for the shrink."""

    def shrink_extend(self, x: Tensor, columns: Columns, gates: Tensor, width: int) -> tuple[Tensor, Tensor]:
        from molex.kernels.triton import shrink_extend

        return shrink_extend(x, columns.A, gates, columns.expert_of_column, columns.row_of_column, width)
