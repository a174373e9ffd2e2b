"""One linear with its experts against its frozen base: forward, backward, both, by every way of computing it.

    python -m benchmarks.layer --device cuda --dtype bfloat16              the grid of docs/kernels.md
    python -m benchmarks.layer --shapes 256x1024x1024 --experts 8x16x2 --rounds 20

Routing is given and the same for all, so that what is compared is the arithmetic. The gradient of x is asked of all,
the base's weight is frozen in all. Times are over the base's, round by round.

base            x Wᵀ alone
lora            one PEFT-style LoRA of as many ranks as a token uses (K · r); "lora, C" of as many as there are
loop            MixLoRA's code: for each expert its tokens, two products, weighed at the O-wide end, index_add
every_expert    X-LoRA's and HydraLoRA's code: every expert on every token
compiled        `dense` under torch.compile
and molex's backends, which must first agree with float64, output and gradients.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import interleave, ratios, summary, write
from molex.kernels import Columns, backends, columns_of
from molex.routing import Routing

SHAPES = "8192x4096x14336,8192x4096x4096,8192x14336x4096,2048x4096x4096,256x4096x14336,16x4096x4096"
EXPERTS = "8x16x2,64x1x8,64x16x2"
BACKENDS = ("dense", "preload", "grouped", "triton")


@dataclass(frozen=True)
class Layer:
    """A layer's tensors on one device: x (T, D), W (O, D), A (C, D), B (O, C), gates' weights and ids (T, K)."""

    rank: int
    x: Tensor
    base: nn.Linear
    A: Tensor
    B: Tensor
    weights: Tensor
    expert_ids: Tensor
    grad: Tensor

    @staticmethod
    def draw(shape: tuple[int, int, int], experts: tuple[int, int, int], device: str, dtype: torch.dtype) -> "Layer":
        (num_tokens, num_in, num_out), (num_experts, rank, top_k) = shape, experts
        random = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int, deviation: float = 1.0) -> Tensor:
            return torch.randn(*sizes, generator=random, device=device).mul_(deviation).to(dtype)

        base = nn.Linear(num_in, num_out, bias=False, device=device, dtype=dtype).requires_grad_(False)
        base.weight.copy_(normal(num_out, num_in, deviation=num_in**-0.5))
        scores = torch.randn(num_tokens, num_experts, generator=random, device=device)
        picked = scores.softmax(-1).topk(top_k)
        leaves = (
            normal(num_tokens, num_in),
            normal(num_experts * rank, num_in, deviation=num_in**-0.5),
            normal(num_out, num_experts * rank, deviation=rank**-0.5),
            picked.values / picked.values.sum(-1, keepdim=True),
        )
        x, A, B, weights = (leaf.requires_grad_() for leaf in leaves)
        return Layer(rank, x, base, A, B, weights, picked.indices, normal(num_tokens, num_out))

    def double(self) -> "Layer":
        """The same numbers in float64."""
        base = nn.Linear(*self.base.weight.T.shape, bias=False, device="meta")
        base.weight = nn.Parameter(self.base.weight.double(), requires_grad=False)
        x, A, B, weights = (leaf.detach().double().requires_grad_() for leaf in self.leaves())
        return Layer(self.rank, x, base, A, B, weights, self.expert_ids, self.grad.double())

    def columns(self) -> Columns:
        ranks = (self.rank,) * (len(self.A) // self.rank)
        return Columns(self.A, self.B, ranks, columns_of(ranks).to(self.x.device))

    def routing(self) -> Routing:
        return Routing(self.expert_ids, self.weights, None, len(self.A) // self.rank, normalised=True)

    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.A, self.B, self.weights


Method = Callable[[Layer], Tensor]


def loop(layer: Layer) -> Tensor:
    columns, y_TO = layer.columns(), layer.base(layer.x)
    for expert_id in range(len(columns.ranks)):
        A_RD, B_OR = columns.expert(expert_id)
        tokens_N, slots_N = torch.where(layer.expert_ids == expert_id)
        y_NO = F.linear(F.linear(layer.x[tokens_N], A_RD), B_OR)
        y_TO = y_TO.index_add(0, tokens_N, y_NO * layer.weights[tokens_N, slots_N, None].to(y_NO.dtype))
    return y_TO


def every_expert(layer: Layer) -> Tensor:
    columns, y_TO, gates_TE = layer.columns(), layer.base(layer.x), layer.routing().gates().to(layer.x.dtype)
    for expert_id in range(len(columns.ranks)):
        A_RD, B_OR = columns.expert(expert_id)
        y_TO = y_TO + F.linear(F.linear(layer.x, A_RD), B_OR) * gates_TE[:, expert_id, None]
    return y_TO


def one_lora(num_ranks: int) -> Method:
    def method(layer: Layer) -> Tensor:
        return layer.base(layer.x) + F.linear(F.linear(layer.x, layer.A[:num_ranks]), layer.B[:, :num_ranks])

    return method


def through(name: str) -> Method:
    kernel = backends[name]()
    return lambda layer: kernel.linear(layer.x, layer.base, layer.columns(), layer.routing())


def methods(layer: Layer, compiled: bool) -> dict[str, Method]:
    """All that can run here; every other has its reason printed."""
    top_k = layer.expert_ids.shape[1]
    found: dict[str, Method] = {"base": lambda layer: layer.base(layer.x)}
    found |= {"lora": one_lora(top_k * layer.rank), "lora, C": one_lora(len(layer.A))}
    if len(layer.A) // layer.rank <= 16:  # loops over more experts take seconds, and lose by far
        found |= {"loop": loop, "every_expert": every_expert}
    for name in BACKENDS:
        reason = backends[name]().supports(layer.x, layer.columns(), layer.routing(), layer.base)
        if reason is None:
            found[name] = through(name)
        else:
            print(f"without {name}: {reason}", flush=True)
    if compiled:
        torch.compiler.reset()
        found["compiled"] = torch.compile(through("dense"))
    return found


def check(layer: Layer, found: dict[str, Method]) -> None:
    """Refuses to time a method whose output or gradients are wrong: float64, and plain PyTorch in the same dtype."""
    exact = layer.double()
    truth, plain = gradients(loop, exact), gradients(loop, layer)
    for name in found.keys() & {*BACKENDS, "compiled"}:
        for what, got in gradients(found[name], layer).items():
            error, usual = _error(got, truth[what]), _error(plain[what], truth[what])
            assert error <= 2 * usual + torch.finfo(layer.x.dtype).eps, (
                f"{name} {what}: {error:.2g}, a loop {usual:.2g}"
            )


def _error(got: Tensor, truth: Tensor) -> float:
    """Relative, root mean square."""
    return float((got.double() - truth).norm() / truth.norm())


def gradients(method: Method, layer: Layer) -> dict[str, Tensor]:
    y = method(layer)
    grads = torch.autograd.grad(y, layer.leaves(), layer.grad)
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB", "dweights"), grads, strict=True))}


def steps(layer: Layer, found: dict[str, Method]) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """What is timed, by name: "forward" without gradients, as inference has it, and a training step's two passes."""

    def forward(method: Method) -> object:
        with torch.no_grad():
            return method(layer)

    def both(method: Method, leaves: tuple[Tensor, ...]) -> object:
        return torch.autograd.grad(method(layer), leaves, layer.grad, allow_unused=True)

    yield "forward", {name: partial(forward, method) for name, method in found.items()}
    timed: dict[str, Callable[[], object]] = {"base": partial(both, found["base"], (layer.x,))}
    timed |= {name: partial(both, method, layer.leaves()) for name, method in found.items() if name != "base"}
    yield "forward and backward", timed


def measure(shape: str, experts: str, arguments: argparse.Namespace) -> None:
    """A row for each of what is timed."""
    sizes: list[tuple[int, ...]] = [tuple(map(int, text.split("x"))) for text in (shape, experts)]
    layer = Layer.draw(*sizes, arguments.device, getattr(torch, arguments.dtype))  # type: ignore[arg-type]
    found = methods(layer, arguments.compiled)
    check(layer, found)
    for what, timed in steps(layer, found):
        times = interleave(timed, arguments.rounds, device=arguments.device)
        over = {name: ratios(seconds, times["base"]) for name, seconds in times.items() if name != "base"}
        row = {"timed": what, "TxDxO": shape, "ExRxK": experts, "dtype": arguments.dtype, "rounds": arguments.rounds}
        row["base_microseconds"] = summary([1e6 * t for t in times["base"]])
        write("layer", {**row, "times_base": over})


def main() -> None:
    parser = argparse.ArgumentParser(description="A linear with experts against its base")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", default=SHAPES, help="TxDxO, separated by commas")
    parser.add_argument("--experts", default=EXPERTS, help="ExRxK, separated by commas")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also `dense` under torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for shape in arguments.shapes.split(","):
        for experts in arguments.experts.split(","):
            measure(shape, experts, arguments)


if __name__ == "__main__":
    main()
