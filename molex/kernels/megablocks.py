"""The `grouped` plan with MegaBlocks' product (arXiv:2211.15841): the package `grouped_gemm`, under its own layers too.

    gmm(rows (N, X), factors (E, Y, X), sizes (E,), trans_b=True) -> (N, Y), with autograd

It takes contiguous bfloat16 on a GPU and nothing else. The sizes of the groups must lie on the host, so that every
layer waits for the device: no CUDA graphs, no torch.compile. As in `F.grouped_mm`, rows past the last group are left
unwritten. Two builds have one face, and both are served: with cuBLAS, the default, a launch for each expert; with
CUTLASS (GROUPED_GEMM_CUTLASS=1) one for all, which wants rows of 16 bytes and refuses to multiply no row at all.
"""

from collections.abc import Iterator
from importlib import import_module

import torch
from torch import Tensor, nn

from molex.kernels.base import backends
from molex.kernels.columns import Columns
from molex.kernels.cost import Shape, Step
from molex.kernels.grouped import Grouped, Plan
from molex.routing import Routing

INSTALL = "pip install --no-build-isolation 'molex[megablocks]'"


@backends.register("megablocks")
class MegaBlocks(Grouped):
    """Sorted pairs through `grouped_gemm.ops.gmm`."""

    def steps(self, shape: Shape) -> Iterator[Step] | None:
        return None

    def supports(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> str | None:
        num_out, num_in = columns.B.shape[0], x.shape[-1]
        if torch.compiler.is_compiling():
            return "under torch.compile grouped_gemm cannot read its groups' sizes on the host"
        if not x.is_cuda:
            return f"grouped_gemm runs on a GPU, x is on {x.device}"
        if x.dtype != torch.bfloat16:
            return f"grouped_gemm takes bfloat16, not {x.dtype}"
        if num_in % 8 or num_out % 8:
            return f"rows of {num_in} and {num_out} {x.dtype} are not a multiple of 16 bytes"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being recorded, and grouped_gemm reads its groups' sizes on the host"
        return why_not_there()

    def groups(self, plan: Plan) -> Tensor:
        """Each group's size, on the host: waits for the device."""
        return torch.diff(plan.ends, prepend=plan.ends.new_zeros(1)).to("cpu", torch.int64)

    def multiply(self, rows: Tensor, factors: Tensor, groups: Tensor) -> Tensor:
        if not groups.any():  # every row is nobody's: zero here, and masked afterwards
            return rows @ factors[0].T
        gmm = import_module("grouped_gemm.ops").gmm
        return gmm(rows, factors.contiguous(), groups, trans_b=True)


def why_not_there() -> str | None:
    """Why the package cannot be used; None where it can."""
    try:
        import_module("grouped_gemm.ops")
    except ModuleNotFoundError as error:
        if error.name == "grouped_gemm":
            return f"the package grouped_gemm is not installed: {INSTALL}"
        return f"the package grouped_gemm is incomplete ({error}): {INSTALL}"
    except ImportError as error:
        return f"the package grouped_gemm was not built for this torch ({error}): {INSTALL}"
    return None
