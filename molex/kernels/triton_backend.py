"""The `preload` plan with its C-wide work in Triton kernels: shrink and gate in one launch, one read of x.

`import molex` does not import triton: the kernels are loaded where this backend is first asked to run.
"""

import os
from importlib.util import find_spec
from typing import ClassVar

from torch import Tensor, nn

from molex.kernels.base import backends
from molex.kernels.columns import Columns
from molex.kernels.extend import Extend
from molex.kernels.preload import Preload, Primitives
from molex.routing import Routing

_YES = ("1", "true", "yes", "on", "y")  # as triton reads its environment


@backends.register("triton")
class Triton(Preload):
    """On a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""

    launches: ClassVar[tuple[int, int]] = (0, 1)

    def primitives(self, columns: Columns) -> Primitives:
        from molex.kernels.triton import gate_backward, shrink_gate, skinny_wgrad

        return Primitives(shrink_gate, gate_backward, skinny_wgrad)

    def supports(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> str | None:
        if find_spec("triton") is None:
            return "the package triton is not installed: pip install 'molex[kernels]'"
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET", "").lower() not in _YES:
            return f"its kernels run on a GPU, x is on {x.device}"
        from molex.kernels.triton import DTYPES

        if x.dtype not in DTYPES:
            return f"its kernels take float32, bfloat16 and float16, not {x.dtype}"
        return super().supports(x, columns, routing, base)


@backends.register("triton_extend")
class TritonExtend(Triton, Extend):
    """`extend`, with x copied while it is read for the shrink."""

    def shrink_extend(self, x: Tensor, columns: Columns, gates: Tensor, width: int) -> tuple[Tensor, Tensor]:
        from molex.kernels.triton import shrink_extend

        return shrink_extend(x, columns.A, gates, columns.expert_of_column, columns.row_of_column, width)
