"""y += g Bᵀ in place, against float64."""

import pytest
import torch
from torch import Tensor

from molex.kernels.triton import expand_add
from tests.close import assert_close
from tests.kernels.triton.problems import CASES, DTYPES, Case, Problem, column_by_column, embedded, make

MORE = [
    Case("two tiles of T and O", num_tokens=130, num_out=129, ranks=(8,), top_k=1),
    Case("no column", ranks=(0,), top_k=1),
]


def naive(p: Problem, gated: Tensor) -> Tensor:
    y = p.y.clone()
    for c in range(gated.shape[1]):
        y += gated[:, c, None] * p.B[:, c]
    return y


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_against_float64(dtype: torch.dtype, case: Case) -> None:
    p = make(case, dtype)
    gated = p.grad if case.summed else embedded(p.grad)
    truth = naive(p.to(torch.float64), gated.double())
    expected = torch.addmm(p.y, gated, p.B.T)
    y = embedded(p.y)
    assert expand_add(y, gated, p.B) is y
    assert_close("y", y, truth, expected)


@torch.no_grad()
def test_only_the_rows_of_y_are_written() -> None:
    p = make(CASES[1], torch.float32)
    memory = torch.full((p.y.shape[0] + 1, p.y.shape[1] + 3), torch.nan, device=p.y.device)
    y = memory[:-1, :-3].copy_(p.y)
    expand_add(y, column_by_column(p)[1], p.B)
    assert bool(memory[-1].isnan().all())
    assert bool(memory[:, -3:].isnan().all())


def test_rows_that_are_not_contiguous_are_refused() -> None:
    p = make(CASES[0], torch.float32)
    with pytest.raises(AssertionError, match="contiguous"):
        expand_add(p.y.t().contiguous().t(), p.grad, p.B)
