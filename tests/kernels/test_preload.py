"""preload reads the base's weight, so only over a plain base; it saves nothing O wide and computes nothing in vain."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import molex
from molex.errors import BackendError
from molex.kernels import backends
from molex.kernels.preload import why_not_plain
from tests.kernels.cases import CASES, Case, make
from tests.kernels.test_backends import base_of


class Scaled(nn.Linear):
    """A linear that is not W x."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def hooked(base: nn.Linear) -> nn.Linear:
    base.register_forward_hook(lambda *call: None)
    return base


def patched(base: nn.Linear) -> nn.Linear:
    base.forward = lambda input: input  # as accelerate's offloading does
    return base


def bias_trains(base: nn.Linear) -> nn.Linear:
    base.bias = nn.Parameter(torch.zeros(base.out_features))
    return base


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "has hooks"),
        (patched, "or changed"),
        (lambda base: Scaled(24, 40).requires_grad_(False), "is a Scaled"),
        (lambda base: base.bfloat16(), "bfloat16 on cpu, its input torch.float32"),
        (lambda base: base.requires_grad_(True), "the base trains"),
        (bias_trains, "the base trains"),
    ],
)
def test_other_bases_are_refused(change: Callable[[nn.Linear], nn.Module], reason: str) -> None:
    p = make(CASES[0], "linear", torch.float32)
    assert why_not_plain(base_of(p), p.x) is None
    assert reason in str(why_not_plain(change(base_of(p)), p.x))


def test_a_mixture_says_why_it_cannot_have_it() -> None:
    model = nn.Sequential(Scaled(8, 8))
    molex.convert(model, molex.preset("lora", targets=("0",), rank=2, backend="preload"))
    with pytest.raises(BackendError, match="'preload' cannot run this layer: the base is a Scaled"):
        model(torch.randn(2, 8))


def test_only_columns_and_gates_are_saved_beside_x() -> None:
    p = make(Case("wide", num_out=96), "linear", torch.float32)
    base, shapes = base_of(p), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and all(tensor is not own for own in (p.A, p.B, base.weight)):
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backends["preload"]().linear(p.x, base, p.columns(), p.routing())
    num_tokens = len(p.x)
    assert sorted(shapes) == sorted([(num_tokens, 24), (num_tokens, len(p.ranks)), (num_tokens, sum(p.ranks))])


def test_frozen_experts_get_no_gradient_and_gates_get_theirs() -> None:
    p = make(CASES[0], "linear", torch.float32)
    p.A.requires_grad_(False)
    p.B.requires_grad_(False)
    y = backends["preload"]().linear(p.x, base_of(p), p.columns(), p.routing())
    got = torch.autograd.grad(y, [p.weights, p.x], p.grad)
    oracle = backends["reference"]().linear(p.x, base_of(p), p.columns(), p.routing())
    for mine, true in zip(got, torch.autograd.grad(oracle, [p.weights, p.x], p.grad), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)
