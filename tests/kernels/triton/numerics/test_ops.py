"""The operators as torch sees them: schemas, fakes, gradients, and one graph under torch.compile."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molex.kernels.triton import (
    expand_add,
    gate_backward,
    ops,
    shrink_extend,
    shrink_gate,
    skinny_wgrad,
    tile_tokens,
)
from tests.kernels.triton.problems import CASES, DEVICE, Case, Problem, make

SHARED = next(case for case in CASES if case.share_A)


def calls(p: Problem) -> dict[str, tuple[Callable, tuple]]:
    x, A, gates, hidden = p.x.detach(), p.A.detach(), p.gates.detach(), torch.randn_like(p.grad)
    scale = torch.ones(len(A), device=DEVICE)
    tiles = tile_tokens(p.expert_ids, p.expert_of_column, p.gates.shape[1])
    return {
        "shrink_gate": (shrink_gate, (p.x, p.A, p.gates, p.expert_of_column, p.row_of_column)),
        "shrink_extend": (shrink_extend, (x, A, gates, p.expert_of_column, p.row_of_column, 64)),
        "gate_backward": (gate_backward, (p.grad, hidden, gates, p.expert_of_column)),
        "skinny_wgrad": (skinny_wgrad, (p.grad, x)),
        "expand_add": (ops._expand_add, (p.y, p.grad, p.B)),
        "expand_add_tiles": (ops._expand_add_tiles, (p.y, p.grad, p.B, *tiles)),
        "route_shrink": (
            ops._route_shrink,
            (x, A, x.new_ones(5, 24).float(), scale[:5], p.expert_of_column, p.row_of_column, 2, True),
        ),
        "self_gated_shrink": (ops._self_gated_shrink, (x, A, scale, scale, 2, False)),
    }


@pytest.mark.parametrize("name", list(calls(make(CASES[0], torch.float32))))
@pytest.mark.parametrize("case", [CASES[0], SHARED], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, case: Case, name: str) -> None:
    operator, arguments = calls(make(case, dtype))[name]
    torch.library.opcheck(operator, arguments)


def whole(x: Tensor, A: Tensor, gates: Tensor, B: Tensor, y: Tensor, expert_of_column: Tensor) -> Tensor:
    """A layer's forward and the pieces of its backward."""
    hidden, gated = shrink_gate(x, A, gates, expert_of_column)
    grad_hidden, _ = gate_backward(gated.detach(), hidden.detach(), gates.detach(), expert_of_column)
    added = expand_add(y.clone(), gated.detach(), B)
    return gated.sum() + hidden.square().sum() + added.sum() + skinny_wgrad(grad_hidden, x.detach()).sum()


def test_one_graph_with_the_gradients_of_eager() -> None:
    p = make(CASES[0], torch.float32)
    rest = (p.B, p.y, p.expert_of_column)
    leaves = [p.x, p.A, p.gates]
    torch._dynamo.reset()
    eager = whole(*leaves, *rest)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")(*leaves, *rest)
    torch.testing.assert_close(compiled, eager)
    for got, expected in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_other_numbers_of_tokens_need_no_other_graph() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, backend=counter, dynamic=True)
    for num_tokens in (37, 20, 5):
        p = make(replace(CASES[0], num_tokens=num_tokens), torch.float32)
        apart = [t.detach().clone().requires_grad_(t.requires_grad) for t in (p.x, p.A, p.gates, p.B, p.y)]
        compiled(*apart, p.expert_of_column)
    assert counter.frame_count == 1


def test_factors_of_different_or_unknown_dtypes_are_refused() -> None:
    """A kernel would convert or refuse them in its own words, and the interpreter would multiply them."""
    p = make(CASES[0], torch.float32)
    with pytest.raises(AssertionError, match="different dtypes"):
        shrink_gate(p.x.bfloat16(), p.A, p.gates, p.expert_of_column)
    with pytest.raises(AssertionError, match="float64"):
        skinny_wgrad(p.x.double(), p.x.double())
