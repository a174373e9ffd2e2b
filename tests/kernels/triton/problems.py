"""Layers for the kernels, and two yardsticks: the equations column by column, and plain PyTorch.

Inputs lie in memory that is NaN around them: a mask that is wrong by one shows in the result.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """A shape, who serves whom, and why it is here (its name)."""

    name: str
    num_tokens: int = 37
    num_in: int = 24
    num_out: int = 40
    ranks: tuple[int, ...] = (8, 8, 8, 8, 8)
    top_k: int = 2
    chosen: str = "random"
    share_A: bool = False
    summed: bool = False  # the gradient of a sum: one number, strides zero

    def expert_ids(self) -> Tensor:
        """(T, K), -1 = nobody."""
        ids_TK = torch.rand(self.num_tokens, len(self.ranks)).topk(self.top_k).indices
        if self.chosen == "two of them":
            return torch.tensor([1, 3]).expand_as(ids_TK).clone()
        if self.chosen == "one":
            return torch.full_like(ids_TK, 2)
        if self.chosen == "nobody":
            return torch.full_like(ids_TK, -1)
        if self.chosen == "nobody for some":
            ids_TK[::3] = -1
            ids_TK[1::3, 0] = -1
        return ids_TK


CASES = [
    Case("plain"),
    Case("odd sizes", num_tokens=31, num_in=23, num_out=41),
    Case("empty experts", chosen="two of them"),
    Case("all to one", top_k=1, chosen="one"),
    Case("nobody for some", chosen="nobody for some"),
    Case("nobody for all", chosen="nobody"),
    Case("one token", num_tokens=1),
    Case("one token, deep", num_tokens=1, num_in=600),  # D is split
    Case("no token", num_tokens=0),
    Case("several tiles", num_tokens=128, num_in=100, num_out=128, ranks=(16,) * 9),
    Case("zero-stride gradient", summed=True),
    Case("unequal ranks", ranks=(2, 8, 5, 1, 11)),
    Case("rank-1 experts", ranks=(1,) * 70, top_k=6),
    Case("shared A", share_A=True),
    Case("one expert of rank 1", ranks=(1,), top_k=1),
]


@dataclass(frozen=True)
class Problem:
    x: Tensor  # (T, D)
    A: Tensor  # (C, D), or (R, D) shared
    B: Tensor  # (O, C)
    gates: Tensor  # (T, E)
    expert_ids: Tensor  # (T, K)
    expert_of_column: Tensor
    row_of_column: Tensor | None
    y: Tensor  # (T, O)
    grad: Tensor  # (T, C)

    LEAVES = ("x", "A", "gates")

    def to(self, dtype: torch.dtype) -> "Problem":
        """Fresh leaves in a dtype, NaN around them; gates stay at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        moved = {name: embedded(getattr(self, name).to(dtype)) for name in ("x", "A", "B", "y")}
        moved["gates"] = embedded(self.gates.to(wide))
        for name in self.LEAVES:
            moved[name].requires_grad_()
        return replace(self, **moved, grad=self.grad.to(dtype))


def embedded(tensor: Tensor) -> Tensor:
    """The same values as a view into a larger NaN matrix."""
    memory = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 3), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = memory[1 : 1 + tensor.shape[0], 1 : 1 + tensor.shape[1]]
    return view.copy_(tensor.detach()).detach()


def make(case: Case, dtype: torch.dtype) -> Problem:
    """A random problem at unit scale, its values exact in the dtype."""
    ids_TK = case.expert_ids()
    num_experts, num_columns = len(case.ranks), sum(case.ranks)
    weights_TK = (0.1 + torch.rand(ids_TK.shape)) * (ids_TK >= 0)
    gates_TE = torch.zeros(case.num_tokens, num_experts + 1)
    gates_TE.scatter_add_(1, ids_TK.where(ids_TK >= 0, num_experts), weights_TK)
    expert_of_column = torch.arange(num_experts).repeat_interleave(torch.tensor(case.ranks))
    row_of_column = torch.arange(num_columns) % case.ranks[0] if case.share_A else None
    grad = torch.ones(()).expand(case.num_tokens, num_columns) if case.summed else None
    problem = Problem(
        x=torch.randn(case.num_tokens, case.num_in),
        A=torch.randn(case.ranks[0] if case.share_A else num_columns, case.num_in) / case.num_in**0.5,
        B=torch.randn(case.num_out, num_columns) / max(case.ranks) ** 0.5,
        gates=gates_TE[:, :num_experts],
        expert_ids=ids_TK.to(DEVICE),
        expert_of_column=expert_of_column.to(DEVICE),
        row_of_column=None if row_of_column is None else row_of_column.to(DEVICE),
        y=torch.randn(case.num_tokens, case.num_out),
        grad=torch.randn(case.num_tokens, num_columns) if grad is None else grad,
    )
    moved = {name: getattr(problem, name).to(DEVICE) for name in ("x", "A", "B", "gates", "y", "grad")}
    return replace(problem, **moved).to(dtype)


def column_by_column(p: Problem) -> tuple[Tensor, Tensor]:
    """hidden and gated (T, C) as the equations have them."""
    hidden, gated = [], []
    for c, expert_id in enumerate(p.expert_of_column.tolist()):
        row = c if p.row_of_column is None else int(p.row_of_column[c])
        hidden.append((p.x * p.A[row]).sum(1))
        gated.append(p.gates[:, expert_id] * hidden[-1])
    return torch.stack(hidden, 1), torch.stack(gated, 1)


def plain(p: Problem) -> tuple[Tensor, Tensor]:
    """What one writes in PyTorch."""
    A = p.A if p.row_of_column is None else p.A[p.row_of_column]
    hidden = F.linear(p.x, A)
    return hidden, (hidden * p.gates[:, p.expert_of_column]).to(p.x.dtype)
