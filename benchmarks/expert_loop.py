"""The expert part alone, forward and backward: our backends against the loops over experts of the papers' code.

    python -m benchmarks.expert_loop [--dtype bfloat16] [--rounds 200]

loop        for each expert: where -> index_select -> A, B -> times the weight -> index_add_   (MixLoRA's code)
mola_loop   for each expert: y[tokens] += weight * B(A(x[tokens]))                             (MoLA's code)
kind_loop   `loop` with the weights applied to the R-wide hidden, which neither code does
No base product and no dropout on either side; master weights are float32 and are cast where the dtype is narrower.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import interleave, ratios, summary, write
from molex.kernels import Columns, backends, columns_of
from molex.routing import Routing
from tests.close import assert_close

LEAVES = ("x", "A", "B", "weights")


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
    """One layer's tensors: x (T, D), A (C, D), B (O, C), weights and expert_ids (T, K), grad (T, O)."""

    shape: Shape
    x: Tensor
    A: Tensor
    B: Tensor
    weights: Tensor
    expert_ids: Tensor
    grad: Tensor

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
        return Inputs(shape, x, A, B, weights, picked.indices, grad.bfloat16().to(x_dtype))


Method = Callable[[Inputs], Tensor]


def expert_loop(i: Inputs, kind: bool = False) -> Tensor:
    A_ERD, B_EOR = i.A.unflatten(0, (-1, i.shape.rank)), i.B.unflatten(1, (-1, i.shape.rank)).movedim(1, 0)
    y_TO = i.x.new_zeros(i.shape.num_tokens, i.shape.num_out)
    for expert_id in range(i.shape.num_experts):
        tokens_N, slots_N = torch.where(i.expert_ids == expert_id)
        weights_N = i.weights[tokens_N, slots_N, None].to(i.x.dtype)
        hidden_NR = F.linear(i.x.index_select(0, tokens_N), A_ERD[expert_id].to(i.x.dtype))
        y_NO = F.linear(hidden_NR * weights_N if kind else hidden_NR, B_EOR[expert_id].to(i.x.dtype))
        y_TO.index_add_(0, tokens_N, y_NO if kind else y_NO * weights_N)
    return y_TO


def mola_loop(i: Inputs) -> Tensor:
    A_ERD, B_EOR = i.A.unflatten(0, (-1, i.shape.rank)), i.B.unflatten(1, (-1, i.shape.rank)).movedim(1, 0)
    y_TO = i.x.new_zeros(i.shape.num_tokens, i.shape.num_out)
    for expert_id in range(i.shape.num_experts):
        tokens_N, slots_N = torch.where(i.expert_ids == expert_id)
        hidden_NR = F.linear(i.x[tokens_N], A_ERD[expert_id].to(i.x.dtype))
        y_NO = F.linear(hidden_NR, B_EOR[expert_id].to(i.x.dtype))
        y_TO[tokens_N] += i.weights[tokens_N, slots_N, None].to(i.x.dtype) * y_NO
    return y_TO


def through(backend: str) -> Method:
    kernel = backends[backend]()

    def delta(i: Inputs) -> Tensor:
        ranks = (i.shape.rank,) * i.shape.num_experts
        columns = Columns(i.A, i.B, ranks, columns_of(ranks)).to(i.x.dtype)
        return kernel.delta(i.x, columns, Routing(i.expert_ids, i.weights, None, i.shape.num_experts))

    return delta


METHODS: dict[str, Method] = {
    "loop": expert_loop,
    "mola_loop": mola_loop,
    "kind_loop": lambda i: expert_loop(i, kind=True),
    "dense": through("dense"),
    "grouped": through("grouped"),
}


def step(method: Method, i: Inputs) -> dict[str, Tensor]:
    """Forward and backward."""
    y = method(i)
    grads = torch.autograd.grad(y, [getattr(i, leaf) for leaf in LEAVES], i.grad)
    return {"y": y.detach(), **dict(zip([f"d{leaf}" for leaf in LEAVES], grads, strict=True))}


def check(i: Inputs) -> None:
    """Refuses to time a method whose result or gradients are wrong."""
    truth = step(expert_loop, Inputs.draw(i.shape, torch.float64, torch.float64))
    plain = step(METHODS["kind_loop"], i)
    for name in ("dense", "grouped"):
        for what, got in step(METHODS[name], i).items():
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
    steps = {name: lambda method=method: step(method, inputs) for name, method in METHODS.items()}
    times = interleave(steps, arguments.rounds)
    write(
        "expert_loop",
        {
            **vars(inputs.shape),
            "dtype": arguments.dtype,
            "rounds": arguments.rounds,
            "milliseconds": {name: summary([1e3 * t for t in seconds]) for name, seconds in times.items()},
            **{f"{name}_over_dense": ratios(times[name], times["dense"]) for name in METHODS if "loop" in name},
        },
    )


if __name__ == "__main__":
    main()
