"""The expert part alone, forward and backward: our backends against the loops over experts of the papers' code.

    python -m benchmarks.expert_loop [--dtype bfloat16] [--rounds 200]

loop        for each expert: where -> index_select -> A, B -> times the weight -> index_add_   (MixLoRA's code)
mola_loop   for each expert: y[tokens] += weight * B(A(x[tokens]))                             (MoLA's code)
kind_loop   `loop` with the weights applied to the R-wide hidden, which neither code does
No base product and no dropout on either side; master weights are float32 and are cast where the dtype is narrower. For
the loops each expert has parameters of its own, as in both codes.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import interleave, ratios, summary, write
from benchmarks.problem import split
from molex.kernels import Columns, backends, columns_of
from molex.routing import Routing
from tests.close import assert_close


@dataclass(frozen=True)
class Shape:
    num_tokens: int = 1024
    num_in: int = 1024
    num_out: int = 1024
    num_experts: int = 8
    rank: int = 8
    top_k: int = 2


@dataclass(frozen=True)
class Inputs:
    """One layer's tensors: x (T, D), A (C, D), B (O, C), weights and expert_ids (T, K), grad (T, O); for loops, with
    the same numbers, A_of[e] (R, D) and B_of[e] (O, R)."""

    shape: Shape
    x: Tensor
    A: Tensor
    B: Tensor
    weights: Tensor
    expert_ids: Tensor
    grad: Tensor
    A_of: list[Tensor]
    B_of: list[Tensor]

    @staticmethod
    def draw(shape: Shape, x_dtype: torch.dtype, master_dtype: torch.dtype) -> "Inputs":
        """The same numbers for every dtype."""
        s, generator = shape, torch.Generator().manual_seed(0)
        num_columns = s.num_experts * s.rank
        x = torch.randn(s.num_tokens, s.num_in, generator=generator)
        A = torch.randn(num_columns, s.num_in, generator=generator) / s.num_in**0.5
        B = torch.randn(s.num_out, num_columns, generator=generator) / s.rank**0.5
        picked = torch.randn(s.num_tokens, s.num_experts, generator=generator).softmax(-1).topk(s.top_k)
        grad = torch.randn(s.num_tokens, s.num_out, generator=generator)
        leaves = (x.bfloat16().to(x_dtype), A.to(master_dtype), B.to(master_dtype), picked.values.to(master_dtype))
        x, A, B, weights = (leaf.requires_grad_() for leaf in leaves)
        apart = split(A, B, s.rank)
        return Inputs(shape, x, A, B, weights, picked.indices, grad.bfloat16().to(x_dtype), *apart)

    def leaves(self, apart: bool) -> list[Tensor]:
        return [self.x, self.weights, *(self.A_of + self.B_of if apart else [self.A, self.B])]


Method = Callable[[Inputs], Tensor]


def expert_loop(i: Inputs, kind: bool = False) -> Tensor:
    y_TO = i.x.new_zeros(i.shape.num_tokens, i.shape.num_out)
    for expert_id in range(i.shape.num_experts):
        tokens_N, slots_N = torch.where(i.expert_ids == expert_id)
        weights_N = i.weights[tokens_N, slots_N, None].to(i.x.dtype)
        hidden_NR = F.linear(i.x.index_select(0, tokens_N), i.A_of[expert_id].to(i.x.dtype))
        y_NO = F.linear(hidden_NR * weights_N if kind else hidden_NR, i.B_of[expert_id].to(i.x.dtype))
        y_TO.index_add_(0, tokens_N, y_NO if kind else y_NO * weights_N)
    return y_TO


def mola_loop(i: Inputs) -> Tensor:
    y_TO = i.x.new_zeros(i.shape.num_tokens, i.shape.num_out)
    for expert_id in range(i.shape.num_experts):
        tokens_N, slots_N = torch.where(i.expert_ids == expert_id)
        hidden_NR = F.linear(i.x[tokens_N], i.A_of[expert_id].to(i.x.dtype))
        y_NO = F.linear(hidden_NR, i.B_of[expert_id].to(i.x.dtype))
        y_TO[tokens_N] += i.weights[tokens_N, slots_N, None].to(i.x.dtype) * y_NO
    return y_TO


def through(backend: str) -> Method:
    kernel = backends[backend]()

    def delta(i: Inputs) -> Tensor:
        ranks = (i.shape.rank,) * i.shape.num_experts
        columns = Columns(i.A, i.B, ranks, columns_of(ranks)).to(i.x.dtype)
        return kernel.delta(i.x, columns, Routing(i.expert_ids, i.weights, None, i.shape.num_experts))

    return delta


LOOPS: dict[str, Method] = {
    "loop": expert_loop,
    "mola_loop": mola_loop,
    "kind_loop": lambda i: expert_loop(i, kind=True),
}
METHODS = {**LOOPS, "dense": through("dense"), "grouped": through("grouped")}


def step(name: str, i: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward: y and the gradients of the leaves."""
    y = METHODS[name](i)
    return y.detach(), *torch.autograd.grad(y, i.leaves(name in LOOPS), i.grad)


def results(name: str, i: Inputs) -> dict[str, Tensor]:
    y, dx, dweights, *factors = step(name, i)
    half = len(factors) // 2
    return {"y": y, "dx": dx, "dweights": dweights, "dA": torch.cat(factors[:half]), "dB": torch.cat(factors[half:], 1)}


def check(i: Inputs) -> None:
    """Refuses to time a method whose result or gradients are wrong."""
    truth = results("loop", Inputs.draw(i.shape, torch.float64, torch.float64))
    plain = results("kind_loop", i)
    for name in METHODS:
        for what, got in results(name, i).items():
            assert_close(f"{name} {what}", got, truth[what], plain[what], products=i.x.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="The experts alone: backends against loops")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    inputs = Inputs.draw(Shape(), getattr(torch, arguments.dtype), torch.float32)
    check(inputs)
    times = interleave({name: partial(step, name, inputs) for name in METHODS}, arguments.rounds)
    write(
        "expert_loop",
        {
            **vars(inputs.shape),
            "dtype": arguments.dtype,
            "rounds": arguments.rounds,
            "milliseconds": {name: summary([1e3 * t for t in seconds]) for name, seconds in times.items()},
            **{f"{name}_over_dense": ratios(times[name], times["dense"]) for name in LOOPS},
        },
    )


if __name__ == "__main__":
    main()
