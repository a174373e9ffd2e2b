"""Back through the gates, against autograd in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molex.kernels.triton import gate_backward
from tests.close import assert_close
from tests.kernels.triton.problems import CASES, DTYPES, Case, Problem, column_by_column, embedded, make

MORE = [Case("two tiles of experts", num_tokens=33, ranks=(1, 2) * 35), Case("many columns", ranks=(40,) * 5)]


def by_autograd(p: Problem, hidden: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    gated = hidden * p.gates[:, p.expert_of_column]
    return torch.autograd.grad(gated, [hidden, p.gates], p.grad.to(gated.dtype))


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_autograd(dtype: torch.dtype, case: Case) -> None:
    p = make(case, dtype)
    p = p if case.summed else replace(p, grad=embedded(p.grad))
    hidden = embedded(column_by_column(p)[0])
    truth = by_autograd(p.to(torch.float64), hidden.double())
    expected = by_autograd(p, hidden)
    grad_hidden, grad_gates = gate_backward(p.grad, hidden, p.gates.detach(), p.expert_of_column)
    assert_close("grad_hidden", grad_hidden, truth[0], expected[0])
    assert_close("grad_gates", grad_gates, truth[1], expected[1], products=dtype)


def test_unchosen_experts_have_gradients_too() -> None:
    """What a router would have gained by choosing them: sparse kernels cannot say."""
    p = make(CASES[0], torch.float32)
    hidden = column_by_column(p)[0].detach()
    _, grad_gates = gate_backward(p.grad, hidden, p.gates.detach(), p.expert_of_column)
    assert bool((p.gates == 0).any())
    assert bool((grad_gates[p.gates == 0] != 0).all())
