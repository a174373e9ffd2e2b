"""The path of sorted pairs, forward and backward, against autograd in float64; and the tiles it goes by."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molex.kernels.triton.grouped_ops import (
    _grouped_expand_add,
    _grouped_shrink,
    _grouped_wgrad,
    grouped_expand_add,
    grouped_shrink,
    grouped_wgrad,
)
from molex.kernels.triton.pair_tiles import ROWS, PairTiles, tile_pairs
from tests.close import assert_close
from tests.kernels.triton.problems import CASES, DTYPES, Case, Problem, make

MORE = [
    Case("tiles that are full", num_tokens=128, ranks=(16, 16), top_k=2),
    Case("a large rank", num_tokens=130, ranks=(70, 3)),
    Case("more experts than tokens", num_tokens=5, ranks=(4,) * 30),
    Case("rank-1 experts", ranks=(1,) * 12, top_k=5),
]
ALL = [case for case in CASES if len(case.ranks) < 50] + MORE


def pairs_of(p: Problem) -> PairTiles:
    return tile_pairs(p.expert_ids, p.expert_of_column, p.gates.shape[1])


def weights_of(p: Problem) -> Tensor:
    """(T, K), zero where nobody serves."""
    return p.gates.gather(1, p.expert_ids.clamp(min=0)).detach() * (p.expert_ids >= 0)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_each_pair_is_in_one_tile_of_its_expert(case: Case) -> None:
    p = make(case, torch.float32)
    pairs, expected = pairs_of(p), p.expert_ids.T.tolist()
    for slot, ids in enumerate(expected):
        seen = []
        rows = zip(pairs.expert[slot].tolist(), pairs.first[slot].tolist(), pairs.last[slot].tolist(), strict=True)
        for expert, first, last in rows:
            assert last - first <= ROWS
            seen += [(token, expert) for token in pairs.order[slot, first:last].tolist()]
        assert sorted(seen) == [(token, expert) for token, expert in enumerate(ids) if expert >= 0]
    ranks = pairs.start_of_expert.diff().tolist()
    assert ranks == list(case.ranks)


def slot_by_slot(p: Problem, weights: Tensor) -> Tensor:
    """y in plain PyTorch: all columns for every slot, and a mask that leaves those of its expert."""
    A = p.A if p.row_of_column is None else p.A[p.row_of_column]
    y = p.y
    for k in range(weights.shape[1]):
        own_TC = p.expert_ids[:, k, None] == p.expert_of_column
        y = y + ((p.x @ A.T * own_TC * weights[:, k, None]).to(p.x.dtype) @ p.B.T)
    return y


def by_autograd(p: Problem, weights: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaves = {"x": p.x, "A": p.A, "B": p.B.detach().clone().requires_grad_(), "weights": weights.clone()}
    leaves["weights"].requires_grad_()
    y = slot_by_slot(replace(p, B=leaves["B"]), leaves["weights"])
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **dict(zip([f"d{name}" for name in leaves], grads, strict=True))}


@torch.no_grad()
def by_kernels(p: Problem, weights: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What a layer's autograd.Function does with them."""
    pairs, num_columns = pairs_of(p), len(p.expert_of_column)
    rank = int(pairs.start_of_expert.diff().max())
    hidden, gated = grouped_shrink(p.x, p.A, weights, pairs, rank, p.row_of_column)
    y = grouped_expand_add(p.y.clone(), gated, p.B, pairs)
    grad_gated, grad_hidden = grouped_shrink(grad, p.B.T, weights, pairs, rank)
    grad_x = grouped_expand_add(torch.zeros_like(p.x), grad_hidden, p.A.T, pairs, p.row_of_column)
    grad_A = grouped_wgrad(grad_hidden, p.x, pairs, num_columns)
    if p.row_of_column is not None:
        grad_A = torch.zeros_like(p.A, dtype=torch.float32).index_add(0, p.row_of_column, grad_A)
    grad_weights = (grad_gated.float() * hidden.float()).sum(-1).T
    grad_B = grouped_wgrad(gated, grad, pairs, num_columns).T
    dtype = p.x.dtype
    return {"y": y, "dx": grad_x, "dA": grad_A.to(dtype), "dB": grad_B.to(dtype), "dweights": grad_weights}


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(dtype: torch.dtype, case: Case) -> None:
    p = make(case, dtype)
    grad = torch.ones((), dtype=dtype).expand_as(p.y) if case.summed else torch.randn_like(p.y)
    weights = weights_of(p)
    truth = by_autograd(p.to(torch.float64), weights.double(), grad.double())
    expected = by_autograd(p.to(dtype), weights, grad)
    for what, got in by_kernels(p, weights, grad).items():
        assert_close(what, got, truth[what], expected[what], products=dtype)


def calls(p: Problem) -> dict[str, tuple[Callable, tuple]]:
    pairs, weights = list(pairs_of(p)), weights_of(p)
    x, A = p.x.detach(), p.A.detach()
    hidden = torch.randn(2, len(x), 8, dtype=x.dtype, device=x.device)
    return {
        "shrink": (_grouped_shrink, (x, A, weights, p.row_of_column, pairs, 8)),
        "expand": (_grouped_expand_add, (p.y, hidden, p.B, None, pairs)),
        "wgrad": (_grouped_wgrad, (hidden, x, pairs, 40)),
    }


@pytest.mark.parametrize("name", ["shrink", "expand", "wgrad"])
def test_opcheck(name: str) -> None:
    operator, arguments = calls(make(CASES[0], torch.float32))[name]
    torch.library.opcheck(operator, arguments)
