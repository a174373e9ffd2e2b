"""A MixLoRA feed-forward block, forward and backward: ours against the way MixLoRA's code computes it.

    python -m benchmarks.mixture_ffn [--device cuda] [--dtype bfloat16] [--rounds 50]
    python -m benchmarks.mixture_ffn --num_tokens 256 --hidden 4096 --inner 11008 --rank 16 --threads 1

The ways are in `blocks.py`. Routing is given, and the same for all. `flops` counts multiplications of the products,
forward and backward with the gradient of x, over those of molex that are not zero.
"""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.blocks import NAMES, OURS, THEIRS, Apart, Block, Method, base_alone, contestants, owners, textbook
from benchmarks.harness import interleave, ratios, summary, write
from benchmarks.problem import side_by_side, split
from tests.close import assert_close


@dataclass(frozen=True)
class Shape:
    num_tokens: int = 1024
    hidden: int = 512
    inner: int = 1536
    num_experts: int = 8
    rank: int = 8
    top_k: int = 2

    def products(self, base_units: int) -> float:
        """Multiplications a token: base_units projections forward and for dx, K experts forward and twice backward."""
        base = 2 * base_units * self.hidden * self.inner
        return base + 3 * self.top_k * 3 * self.rank * (self.hidden + self.inner)

    def flops(self) -> dict[str, float]:
        """Of the others, over ours."""
        units = {"shared": 2 + self.top_k, "textbook": 3 * self.top_k}
        return {name: round(self.products(count) / self.products(3), 3) for name, count in units.items()}


class Parameters(nn.Module):
    """A block's tensors, as ours keeps them. The leaves are the factors and the chosen experts' scores."""

    expert_ids: Tensor
    owners: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        num_columns, self.rank = shape.num_experts * shape.rank, shape.rank
        self.base, self.A, self.B = nn.ModuleDict(), nn.ParameterDict(), nn.ParameterDict()
        for name in NAMES:
            wide = (shape.hidden, shape.inner)
            num_in, num_out = wide if name != "down" else wide[::-1]
            self.base[name] = nn.Linear(num_in, num_out, bias=False, device="meta")
            weight = torch.randn(num_out, num_in, generator=generator) / num_in**0.5
            self.base[name].weight = nn.Parameter(weight, requires_grad=False)
            self.A[name] = nn.Parameter(torch.randn(num_columns, num_in, generator=generator) / num_in**0.5)
            self.B[name] = nn.Parameter(torch.randn(num_out, num_columns, generator=generator) / shape.rank**0.5)
        picked = torch.randn(shape.num_tokens, shape.num_experts, generator=generator).topk(shape.top_k)
        self.chosen = nn.Parameter(picked.values)  # scores: weights sum to 1, which makes the forms equal
        self.register_buffer("expert_ids", picked.indices)
        self.register_buffer("owners", owners(shape.num_experts, shape.rank))

    def block(self) -> Block:
        weights = self.chosen.softmax(-1)
        base = dict(self.base.items())
        return Block(base, weights, self.expert_ids, self.rank, dict(self.A), dict(self.B), self.owners)


class ApartParameters(nn.Module):
    """The same, with parameters for each expert."""

    expert_ids: Tensor

    def __init__(self, of: Parameters):
        super().__init__()
        self.base, self.chosen, self.A, self.B = of.base, of.chosen, nn.ModuleDict(), nn.ModuleDict()
        self.register_buffer("expert_ids", of.expert_ids)
        for name in NAMES:
            parts = split(of.A[name], of.B[name], of.rank)
            self.A[name], self.B[name] = (nn.ParameterList(own) for own in parts)

    def block(self) -> Apart:
        A, B = ({name: [*own] for name, own in factors.items()} for factors in (self.A, self.B))  # type: ignore[misc]
        return Apart(dict(self.base.items()), self.chosen.softmax(-1), self.expert_ids, A, B)


AnyParameters = Parameters | ApartParameters


def step(method: Method, parameters: AnyParameters, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward, by name."""
    leaves = {"x": x, **{n: p for n, p in parameters.named_parameters() if p.requires_grad}}
    if method is base_alone:
        leaves = {"x": x}
    y = method(parameters.block(), x)
    grads = torch.autograd.grad(y, [*leaves.values()], grad)
    return {"y": y.detach(), **dict(zip([f"d {name}" for name in leaves], grads, strict=True))}


def check(found: Mapping[str, Method], kept: Mapping[str, AnyParameters], x: Tensor, grad: Tensor) -> None:
    """Refuses to time a block whose result or gradients are wrong. kept: the parameters of each."""
    exact = (x.detach().double().requires_grad_(), grad.double())
    truth = side_by_side(step(textbook, copy.deepcopy(kept["textbook"]).double(), *exact))
    plain = side_by_side(step(textbook, kept["textbook"], x, grad))
    for name in found.keys() - {"base", "textbook"}:
        got = side_by_side(step(found[name], kept[name], x, grad))
        assert got.keys() == truth.keys(), f"{name}: {got.keys() ^ truth.keys()}"
        for what, value in got.items():
            assert_close(f"{name} {what}", value, truth[what], plain[what])


def main() -> None:
    parser = argparse.ArgumentParser(description="A MixLoRA block against the way its code computes it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=50, help="at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="once there are a few rounds")
    parser.add_argument("--threads", type=int, default=2)
    for size in fields(Shape):
        parser.add_argument(f"--{size.name}", type=int, default=size.default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, shape = getattr(torch, arguments.dtype), Shape(**{f.name: getattr(arguments, f.name) for f in fields(Shape)})
    like = {"device": arguments.device, "dtype": dtype}
    x, grad = (torch.randn(shape.num_tokens, shape.hidden).to(**like) for _ in range(2))
    x.requires_grad_()
    parameters = Parameters(shape).to(**like)
    found, apart = contestants(parameters.block(), x), ApartParameters(parameters)
    kept = {name: apart if name in THEIRS else parameters for name in found}
    check(found, kept, x, grad)
    steps = {name: partial(step, method, kept[name], x, grad) for name, method in found.items()}
    warmup = 10 if arguments.device == "cuda" else 1
    times = interleave(steps, arguments.rounds, warmup, arguments.device, arguments.seconds)
    row = {
        **asdict(shape),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "rounds": len(times["base"]),
        "flops": shape.flops(),
    }
    row["milliseconds"] = {name: summary([1e3 * t for t in seconds]) for name, seconds in times.items()}
    for own in found.keys() & OURS.keys():
        row |= {f"{name}_over_{own}": ratios(times[name], times[own]) for name in THEIRS}
        row[f"{own}_over_base"] = ratios(times[own], times["base"])
    write("mixture_ffn", row)


if __name__ == "__main__":
    main()
