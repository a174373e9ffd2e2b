"""Shrink and gate: both outputs and every gradient against float64, by name."""

import pytest
import torch
from torch import Tensor

from molex.kernels.triton import shrink_extend, shrink_gate
from molex.kernels.triton.shrink import shrink_tile
from molex.kernels.triton.tiles import split
from tests.close import assert_close
from tests.kernels.triton.problems import CASES, DEVICE, DTYPES, Case, Problem, column_by_column, make, plain


def run(p: Problem) -> tuple[Tensor, Tensor]:
    return shrink_gate(p.x, p.A, p.gates, p.expert_of_column, p.row_of_column)


def results(outputs: tuple[Tensor, Tensor], p: Problem, grads: list[Tensor | None]) -> dict[str, Tensor]:
    """The outputs, and the leaves' gradients for these of the outputs (None: not used)."""
    used = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    leaves = [getattr(p, name) for name in p.LEAVES]
    back = torch.autograd.grad([out for out, _ in used], leaves, [g for _, g in used], materialize_grads=True)
    named = dict(zip([f"d{name}" for name in p.LEAVES], back, strict=True))
    return {"hidden": outputs[0].detach(), "gated": outputs[1].detach(), **named}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients(dtype: torch.dtype, case: Case) -> None:
    p = make(case, dtype)
    p64, same = p.to(torch.float64), p.to(dtype)
    truth = results(column_by_column(p64), p64, [None, p64.grad])
    expected = results(plain(same), same, [None, p.grad])
    for what, got in results(run(p), p, [None, p.grad]).items():
        assert_close(what, got, truth[what], expected[what], products=dtype)


@pytest.mark.parametrize("used", ["hidden", "both"])
def test_gradients_through_hidden(used: str) -> None:
    """Routers that go by A x send gradients through it."""
    p = make(CASES[0], torch.float32)
    grads = [torch.randn_like(p.grad), p.grad if used == "both" else None]
    p64, same = p.to(torch.float64), p.to(torch.float32)
    truth = results(column_by_column(p64), p64, [None if g is None else g.double() for g in grads])
    expected = results(plain(same), same, grads)
    for what, got in results(run(p), p, grads).items():
        assert_close(what, got, truth[what], expected[what])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extended(dtype: torch.dtype, case: Case) -> None:
    """[x | gated | 0], x bit for bit."""
    p = make(case, dtype)
    num_in, used = case.num_in, case.num_in + sum(case.ranks)
    width = -(-used // 8) * 8
    with torch.no_grad():
        hidden, extended = shrink_extend(p.x, p.A, p.gates, p.expert_of_column, p.row_of_column, width)
        truth, expected = column_by_column(p.to(torch.float64)), plain(p)
    assert extended.shape == (case.num_tokens, width)
    assert torch.equal(extended[:, :num_in], p.x)
    assert bool((extended[:, used:] == 0).all())
    assert_close("hidden", hidden, truth[0], expected[0])
    assert_close("gated", extended[:, num_in:used], truth[1], expected[1])


def test_columns_of_x_that_are_apart() -> None:
    p = make(CASES[0], torch.float32)
    x = p.x.detach().t().contiguous().t()
    assert x.stride(1) != 1
    for got, expected in zip(shrink_gate(x, p.A, p.gates, p.expert_of_column), run(p), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="depends on the GPU's size")
def test_the_cases_reach_the_split() -> None:
    deep = next(case for case in CASES if case.name == "one token, deep")
    BLOCK_T, BLOCK_C = shrink_tile(deep.num_tokens, sum(deep.ranks), torch.float32)
    num_tiles = -(-deep.num_tokens // BLOCK_T) * -(-sum(deep.ranks) // BLOCK_C)
    assert split(deep.num_in, num_tiles, DEVICE, at_least=256) == (2, 512)


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    """As on a GPU, and not cut off, as the interpreter's own conversion does: sums of kernels would drift."""
    x, A = torch.randn(2000, 1, device=DEVICE).bfloat16(), torch.randn(1, 1, device=DEVICE).bfloat16()
    gates, expert_of_column = torch.rand(2000, 1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    exact = x.float() * A.float()
    hidden, gated = shrink_gate(x, A, gates, expert_of_column)
    assert torch.equal(hidden, exact.bfloat16())
    assert torch.equal(gated, (exact * gates).bfloat16())
