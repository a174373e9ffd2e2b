"""Routing inside kernels: the same experts as the router's own code, ties to the lowest, weights against float64."""

import pytest
import torch
from torch import Tensor

from molex.kernels.triton import route_shrink, self_gated_shrink
from molex.kernels.triton.route import COLUMNS
from tests.close import assert_close
from tests.kernels.triton.problems import CASES, DEVICE, DTYPES, Case, Problem, column_by_column, make, plain

ROUTED = [case for case in CASES if sum(case.ranks) <= COLUMNS]


def lowest_first_top_k(scores: Tensor, top_k: int) -> Tensor:
    """One token at a time, as a sentence: the best, and of equals the first."""
    rows = [sorted(range(scores.shape[1]), key=lambda e: -row[e])[:top_k] for row in scores.tolist()]
    return torch.tensor(rows, dtype=torch.int64, device=scores.device).view(len(scores), top_k)


def weights_of(logits: Tensor, ids: Tensor, renormalise: bool) -> Tensor:
    """(T, K)."""
    chosen = logits.softmax(-1).gather(1, ids)
    return chosen / chosen.sum(1, keepdim=True) if renormalise else chosen


def gate_by(p: Problem, gates: Tensor) -> Problem:
    return Problem(**{**vars(p), "gates": gates})


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("case", ROUTED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_router(dtype: torch.dtype, case: Case, renormalise: bool) -> None:
    p, num_experts = make(case, dtype), len(case.ranks)
    router = torch.randn(num_experts, case.num_in, device=DEVICE) / case.num_in**0.5
    scale = 0.5 + torch.rand(num_experts, device=DEVICE)
    tables = (p.expert_of_column, p.row_of_column)
    got = route_shrink(p.x, p.A, router, scale, *tables, top_k=case.top_k, renormalise=renormalise)
    logits64, logits = p.x.double() @ router.double().T, p.x.float() @ router.T
    assert_close("logits", got.logits, logits64, logits)
    assert torch.equal(got.expert_ids, lowest_first_top_k(got.logits, case.top_k))
    weights64 = weights_of(logits64, got.expert_ids, renormalise)
    weights = weights_of(logits, got.expert_ids, renormalise)
    assert_close("weights", got.weights, weights64, weights)
    nobody64, nobody = torch.zeros_like(logits64), torch.zeros_like(logits)
    gates64, gates = (a.scatter(1, got.expert_ids, w) for a, w in ((nobody64, weights64), (nobody, weights)))
    truth = column_by_column(gate_by(p.to(torch.float64), gates64 * scale.double()))
    expected = plain(gate_by(p, gates * scale))
    assert_close("hidden", got.hidden, truth[0], expected[0])
    assert_close("gated", got.gated, truth[1], expected[1])


@torch.no_grad()
def test_of_equal_logits_the_lowest_experts_are_chosen() -> None:
    p = make(CASES[0], torch.float32)
    router, scale = torch.zeros(5, 24, device=DEVICE), torch.ones(5, device=DEVICE)
    router[4] = p.x[0]
    got = route_shrink(p.x, p.A, router, scale, p.expert_of_column, top_k=3)
    best_last, rest_best = got.logits[:, 4] > 0, got.logits[:, 4] < 0
    assert bool(best_last.any())
    assert bool(rest_best.any())
    assert got.expert_ids[best_last].unique(dim=0).tolist() == [[4, 0, 1]]
    assert got.expert_ids[rest_best].unique(dim=0).tolist() == [[0, 1, 2]]


@torch.no_grad()
def test_nobody_is_chosen_twice_though_all_logits_are_minus_infinity() -> None:
    p = make(CASES[0], torch.float32)
    p.x[0, 0] = torch.inf
    router, scale = torch.full((5, 24), -1.0, device=DEVICE), torch.ones(5, device=DEVICE)
    got = route_shrink(p.x, p.A, router, scale, p.expert_of_column, top_k=3)
    assert bool(got.logits[0].isneginf().all())
    assert got.expert_ids[0].tolist() == [0, 1, 2]


@torch.no_grad()
def test_nan_is_not_hidden() -> None:
    p = make(CASES[0], torch.float32)
    p.x[3] = torch.nan
    router, scale = torch.randn(5, 24, device=DEVICE), torch.ones(5, device=DEVICE)
    got = route_shrink(p.x, p.A, router, scale, p.expert_of_column, top_k=2)
    assert bool(got.gated[3].isnan().any())
    assert bool(got.gated[[0, 1, 2, 4]].isfinite().all())
    assert got.expert_ids[3].tolist() == [0, 1]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(37, 24, 70, 6), (1, 600, 32, 8), (5, 23, 1, 1), (0, 24, 16, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_rank_one_experts_route_themselves(dtype: torch.dtype, shape: tuple[int, int, int, int], signed: bool) -> None:
    num_tokens, num_in, num_columns, top_k = shape
    p = make(Case("rank 1", num_tokens, num_in, 8, (1,) * num_columns, 1), dtype)
    bias, scale = 0.3 * torch.randn(num_columns, device=DEVICE), 0.5 + torch.rand(num_columns, device=DEVICE)
    hidden, gated, ids, weights, logits = self_gated_shrink(p.x, p.A, bias, scale, top_k, signed)
    scores = hidden.float() + bias
    assert torch.equal(logits, scores if signed else scores.abs())
    assert torch.equal(ids, lowest_first_top_k(logits, top_k))
    assert torch.equal(weights, torch.ones_like(weights))
    gates = torch.zeros(num_tokens, num_columns, device=DEVICE).scatter(1, ids, 1.0) * scale
    truth, expected = column_by_column(gate_by(p.to(torch.float64), gates.double())), plain(gate_by(p, gates))
    assert_close("hidden", hidden, truth[0], expected[0])
    assert_close("gated", gated, truth[1], expected[1])
