"""Layers to try every backend on, and the two yardsticks: the equations token by token, and plain PyTorch."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from molex.kernels import Columns, Form, backends, columns_of
from molex.routing import Routing


@dataclass(frozen=True)
class Case:
    """A shape, who serves whom, and why it is here (its name)."""

    name: str
    num_tokens: int = 37
    num_in: int = 24
    num_out: int = 40
    ranks: tuple[int, ...] = (8, 8, 8, 8, 8)
    top_k: int = 2
    choose: Callable[[Tensor], Tensor] = lambda ids_TK: ids_TK  # changes the random ids
    share_A: bool = False
    strided_x: bool = False
    summed: bool = False  # the gradient of y.sum(): one number, stride zero
    normalised: bool = False  # weights that sum to 1: feed-forward blocks then have no stream of the base

    def expert_ids(self) -> Tensor:
        scores_TE = torch.rand(self.num_tokens, len(self.ranks))
        return self.choose(scores_TE.topk(self.top_k).indices)


def _every_third_alone(ids_TK: Tensor) -> Tensor:
    ids_TK = ids_TK.clone()
    ids_TK[::3] = -1
    ids_TK[1::3, 0] = -1
    return ids_TK


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _runs_here(name: str) -> bool:
    """On a GPU all, on it; elsewhere triton's kernels run in its interpreter, in a process of their own. megablocks has
    tests of its own."""
    return name != "megablocks" and (DEVICE.type == "cuda" or name.startswith("triton") == INTERPRETED)


HERE = [name for name in backends if _runs_here(name)]

CASES = [
    Case("plain"),
    Case("odd sizes", num_tokens=31, num_in=23, num_out=41),
    Case("empty experts", choose=lambda ids_TK: torch.tensor([1, 3]).expand_as(ids_TK)),
    Case("all to one", top_k=1, choose=lambda ids_TK: torch.full_like(ids_TK, 2)),
    Case("nobody for some", choose=_every_third_alone),
    Case("nobody for all", choose=lambda ids_TK: torch.full_like(ids_TK, -1)),
    Case("one token", num_tokens=1),
    Case("no token", num_tokens=0),
    Case("strided x", strided_x=True),
    Case("zero-stride gradient", summed=True),
    Case("unequal ranks", ranks=(2, 8, 5, 1, 11)),
    Case("rank-1 experts", ranks=(1,) * 16, top_k=6),
    Case("shared A", share_A=True),
    Case("all experts", top_k=5),
    Case("one expert", ranks=(4,), top_k=1),
    Case("many columns", ranks=(64,) * 9),
    Case("normalised", normalised=True),
    Case("normalised, one each", top_k=1, normalised=True),
    Case("normalised, three each", top_k=3, normalised=True),
]


@dataclass(frozen=True)
class Problem:
    """One layer's tensors; x is (K+1, T, D) where the form is narrow."""

    x: Tensor
    W: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    weights: Tensor
    mix: Tensor
    expert_ids: Tensor
    ranks: tuple[int, ...]
    row_of_column: Tensor
    grad: Tensor
    normalised: bool = False

    LEAVES = ("x", "A", "B", "weights", "mix")

    def columns(self) -> Columns:
        shared = self.row_of_column if self.A.shape[0] != sum(self.ranks) else None
        return Columns(self.A, self.B, self.ranks, columns_of(self.ranks).to(self.A.device), shared)

    def routing(self) -> Routing:
        return Routing(self.expert_ids, self.weights, None, len(self.ranks), self.normalised)

    def shares(self) -> Tensor:
        """mix (T, K), or its share of each token's sum. Gradients are compared through it: a sum of 1 cannot move."""
        return self.mix / self.mix.sum(1, keepdim=True) if self.normalised else self.mix

    def factors(self, expert_id: int) -> tuple[Tensor, Tensor]:
        start = sum(self.ranks[:expert_id])
        own = range(start, start + self.ranks[expert_id])
        return self.A[self.row_of_column[list(own)]], self.B[:, list(own)]

    def to(self, dtype: torch.dtype, device: torch.device = DEVICE) -> "Problem":
        """Fresh leaves in a dtype; the routing's weights stay at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        moved = {name: getattr(self, name).detach().to(device, dtype) for name in ("x", "W", "bias", "A", "B", "grad")}
        moved |= {name: getattr(self, name).detach().to(device, wide) for name in ("weights", "mix")}
        moved |= {name: getattr(self, name).to(device) for name in ("expert_ids", "row_of_column")}
        for name in self.LEAVES:
            moved[name].requires_grad_()
        return replace(self, **moved)


def make(case: Case, form: Form, dtype: torch.dtype) -> Problem:
    """A random problem at unit scale on DEVICE, its values exact in the dtype. Strides are made there: a copy from
    another device has none."""
    num_streams = case.top_k + (not case.normalised)
    shape = (num_streams, case.num_tokens, case.num_in) if form == "narrow" else (case.num_tokens, case.num_in)
    x = torch.randn(*shape[:-1], 2 * case.num_in).to(DEVICE)[..., ::2] if case.strided_x else torch.randn(shape)
    ids_TK = case.expert_ids()
    weights_TK = (0.1 + torch.rand(ids_TK.shape)) * (ids_TK >= 0)
    num_columns = sum(case.ranks)
    rows = torch.arange(num_columns) % (case.ranks[0] if case.share_A else num_columns)
    out_shape = (num_streams, case.num_tokens, case.num_out) if form == "widen" else (case.num_tokens, case.num_out)
    return Problem(
        x=x,
        W=torch.randn(case.num_out, case.num_in) / case.num_in**0.5,
        bias=torch.randn(case.num_out),
        A=torch.randn(int(rows.max()) + 1, case.num_in) / case.num_in**0.5,
        B=torch.randn(case.num_out, num_columns) / max(case.ranks) ** 0.5,
        weights=weights_TK,
        mix=weights_TK * 0.7,
        expert_ids=ids_TK,
        ranks=case.ranks,
        row_of_column=rows,
        grad=torch.ones((), device=DEVICE).expand(out_shape) if case.summed else torch.randn(out_shape),
        normalised=case.normalised,
    ).to(dtype)


def token_by_token(p: Problem, form: Form) -> Tensor:
    """The equations as they stand in the papers, one token and one expert at a time."""
    rows = []
    num_tokens, num_slots = p.expert_ids.shape
    for t in range(num_tokens):
        own = p.x[:, t][-num_slots:] if form == "narrow" else p.x[t].expand(num_slots, -1)
        x = p.x[0, t] if form == "narrow" else p.x[t]
        added = [p.bias.new_zeros(p.bias.shape)] * num_slots
        for k, expert_id in enumerate(p.expert_ids[t].tolist()):
            if expert_id >= 0:
                A_RD, B_OR = p.factors(expert_id)
                added[k] = p.weights[t, k] * (B_OR @ (A_RD @ own[k]))
        if form == "widen":
            y = p.W @ x + p.bias
            rows.append(torch.stack([*([] if p.normalised else [y]), *(y + delta for delta in added)]))
        elif form == "linear":
            rows.append(p.W @ x + p.bias + sum(added))
        else:
            rest = 0 if p.normalised else 1 - p.shares()[t].sum()
            mixed = rest * x + sum(p.shares()[t, k] * own[k] for k in range(num_slots))
            rows.append(p.W @ mixed + p.bias + sum(added))
    return torch.stack(rows, dim=-2) if rows else p.grad * p.W.sum() * p.x.sum()


def expert_by_expert(p: Problem, form: Form) -> Tensor:
    """What one writes in plain PyTorch: for each expert pick its tokens, two products, put them back."""
    num_slots = p.expert_ids.shape[1]
    added = []
    for k in range(num_slots):
        x = p.x[-num_slots:][k] if form == "narrow" else p.x
        delta_TO = x.new_zeros(x.shape[0], p.B.shape[0])
        for expert_id in range(len(p.ranks)):
            A_RD, B_OR = p.factors(expert_id)
            (tokens,) = torch.where(p.expert_ids[:, k] == expert_id)
            weighed = F.linear(x[tokens], A_RD) * p.weights[tokens, k, None]
            delta_TO = delta_TO.index_add(0, tokens, F.linear(weighed.to(x.dtype), B_OR))
        added.append(delta_TO)
    if form == "linear":
        return F.linear(p.x, p.W, p.bias) + sum(added)
    if form == "widen":
        y = F.linear(p.x, p.W, p.bias)
        return torch.stack([*([] if p.normalised else [y]), *(y + delta for delta in added)])
    others = range(1 if p.normalised else 0, num_slots)
    mixed = p.x[0] + sum((p.shares()[:, k, None] * (p.x[-num_slots:][k] - p.x[0])).to(p.x.dtype) for k in others)
    return F.linear(mixed, p.W, p.bias) + sum(added)
