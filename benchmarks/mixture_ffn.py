"""A MixLoRA feed-forward block, forward and backward: ours against the way MixLoRA's code computes it.

    python -m benchmarks.mixture_ffn [--dtype bfloat16] [--rounds 50]

shared    MixLoRA's code: the base's gate and up once for all tokens; then, expert by expert, act(gate + Δ) * (up + Δ)
          on its tokens and the base's down projection of these: K times over all tokens
textbook  every chosen expert is a whole block: gate, up and down of its tokens, all K times
dense, preload    molex's widen and narrow, with these backends: every base projection once

Routing is given, and the same for all. `base` is the frozen block alone. `flops` counts multiplications of the
products, forward and backward with the gradient of x, over those of molex
that are not zero.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import interleave, ratios, summary, write
from molex.kernels import Columns, backends, columns_of
from molex.routing import Routing
from tests.close import assert_close


@dataclass(frozen=True)
class Shape:
    num_tokens: int = 1024
    hidden: int = 512
    inner: int = 1536
    num_experts: int = 8
    rank: int = 8
    top_k: int = 2


class Block(nn.Module):
    """A frozen SwiGLU block, factors of its experts (A and B of gate, up, down), and a routing."""

    expert_ids: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        columns = shape.num_experts * shape.rank
        sizes = {
            "gate": (shape.hidden, shape.inner),
            "up": (shape.hidden, shape.inner),
            "down": (shape.inner, shape.hidden),
        }
        self.base = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, (num_in, num_out) in sizes.items():
            weight = torch.randn(num_out, num_in, generator=generator) / num_in**0.5
            self.base[name].weight = nn.Parameter(weight, requires_grad=False)
            self.A[name] = nn.Parameter(torch.randn(columns, num_in, generator=generator) / num_in**0.5)
            self.B[name] = nn.Parameter(torch.randn(num_out, columns, generator=generator) / shape.rank**0.5)
        scores = torch.randn(shape.num_tokens, shape.num_experts, generator=generator)
        picked = scores.topk(shape.top_k)
        self.chosen = nn.Parameter(picked.values)  # scores: weights sum to 1, which makes the forms equal
        self.register_buffer("expert_ids", picked.indices)

    @property
    def weights(self) -> Tensor:
        return self.chosen.softmax(-1)

    def expert(self, name: str, expert_id: int, x: Tensor) -> Tensor:
        """What one expert adds to one projection."""
        own = slice(expert_id * self.shape.rank, (expert_id + 1) * self.shape.rank)
        return F.linear(F.linear(x, self.A[name][own]), self.B[name][:, own])


def base_alone(block: Block, x: Tensor) -> Tensor:
    return block.base["down"](F.silu(block.base["gate"](x)) * block.base["up"](x))


def shared(block: Block, x: Tensor, textbook: bool = False) -> Tensor:
    y_TD, weights_TK = torch.zeros_like(x), block.weights
    all_tokens = None if textbook else (block.base["gate"](x), block.base["up"](x))
    for expert_id in range(block.shape.num_experts):
        tokens_N, slots_N = torch.where(block.expert_ids == expert_id)
        own_ND = x[tokens_N]
        if all_tokens is None:
            gate_NI, up_NI = block.base["gate"](own_ND), block.base["up"](own_ND)
        else:
            gate_NI, up_NI = all_tokens[0][tokens_N], all_tokens[1][tokens_N]
        gate_NI = gate_NI + block.expert("gate", expert_id, own_ND)
        inner_NI = F.silu(gate_NI) * (up_NI + block.expert("up", expert_id, own_ND))
        out_ND = block.base["down"](inner_NI) + block.expert("down", expert_id, inner_NI)
        y_TD.index_add_(0, tokens_N, out_ND * weights_TK[tokens_N, slots_N, None].to(out_ND.dtype))
    return y_TD


def molex_block(block: Block, x: Tensor, backend: str) -> Tensor:
    kernel, shape = backends[backend](), block.shape
    ranks = (shape.rank,) * shape.num_experts
    owners = columns_of(ranks)
    columns = {name: Columns(block.A[name], block.B[name], ranks, owners) for name in block.base}
    routing = Routing(block.expert_ids, block.weights, None, shape.num_experts, normalised=True)
    everyone = routing._replace(weights=torch.ones_like(routing.weights))
    gate_KTI = kernel.widen(x, block.base["gate"], columns["gate"], everyone)
    up_KTI = kernel.widen(x, block.base["up"], columns["up"], everyone)
    return kernel.narrow(F.silu(gate_KTI) * up_KTI, block.base["down"], columns["down"], routing, routing.weights)


METHODS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "base": base_alone,
    "shared": shared,
    "textbook": lambda block, x: shared(block, x, textbook=True),
    "dense": lambda block, x: molex_block(block, x, "dense"),
    "preload": lambda block, x: molex_block(block, x, "preload"),
}

OURS = ("dense", "preload")


def step(method: Callable[[Block, Tensor], Tensor], block: Block, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward, by name."""
    leaves = {"x": x, **{n: p for n, p in block.named_parameters() if p.requires_grad}}
    if method is base_alone:
        leaves = {"x": x}
    y = method(block, x)
    grads = torch.autograd.grad(y, [*leaves.values()], grad)
    return {"y": y.detach(), **dict(zip([f"d {name}" for name in leaves], grads, strict=True))}


def products(shape: Shape, base_units: int) -> float:
    """Multiplications a token: `base_units` projections forward and for dx, K experts forward and twice backward."""
    base = 2 * base_units * shape.hidden * shape.inner
    return base + 3 * shape.top_k * 3 * shape.rank * (shape.hidden + shape.inner)


def check(shape: Shape, x: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
    """Refuses to time a block whose result or gradients are wrong."""
    truth = step(METHODS["textbook"], Block(shape).double(), x.detach().double().requires_grad_(), grad.double())
    plain = step(METHODS["textbook"], Block(shape).to(dtype), x, grad)
    for name in OURS:
        for what, got in step(METHODS[name], Block(shape).to(dtype), x, grad).items():
            assert_close(f"{name} {what}", got, truth[what], plain[what])


def main() -> None:
    parser = argparse.ArgumentParser(description="A MixLoRA block against the way its code computes it")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    for size in fields(Shape):
        parser.add_argument(f"--{size.name}", type=int, default=size.default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, shape = getattr(torch, arguments.dtype), Shape(**{f.name: getattr(arguments, f.name) for f in fields(Shape)})
    x = torch.randn(shape.num_tokens, shape.hidden).to(dtype).requires_grad_()
    grad = torch.randn(shape.num_tokens, shape.hidden).to(dtype)
    check(shape, x, grad, dtype)
    block = Block(shape).to(dtype)
    steps = {name: lambda method=method: step(method, block, x, grad) for name, method in METHODS.items()}
    times = interleave(steps, arguments.rounds)
    ours = products(shape, 3)
    row = {**vars(shape), "dtype": arguments.dtype, "rounds": arguments.rounds}
    row["milliseconds"] = {name: summary([1e3 * t for t in seconds]) for name, seconds in times.items()}
    row["flops"] = {
        "shared": round(products(shape, 2 + shape.top_k) / ours, 3),
        "textbook": round(products(shape, 3 * shape.top_k) / ours, 3),
    }
    for own in OURS:
        row |= {f"{name}_over_{own}": ratios(times[name], times[own]) for name in ("shared", "textbook")}
        row[f"{own}_over_base"] = ratios(times[own], times["base"])
    write("mixture_ffn", row)


if __name__ == "__main__":
    main()
