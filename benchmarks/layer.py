"""One linear with its experts against its frozen base: forward, backward, both, by every way of computing it.

    python -m benchmarks.layer --device cuda --dtype bfloat16              the grid of docs/kernels.md
    python -m benchmarks.layer --shapes 256x1024x1024 --experts 8x16x2 --rounds 20

Routing is given and the same for all, so that what is compared is the arithmetic. The gradient of x is asked of all,
the base's weight is frozen in all. Times are over the base's, round by round; `contestants.py` says who they are.
On a GPU every call has other tensors than the one before, and the sets together exceed its L2 cache several times; up
to GRAPH_TOKENS tokens there are rows of CUDA graphs too. All must first agree with float64, output and gradients.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings, floor_seconds
from benchmarks.ceilings import measure as measure_ceilings
from benchmarks.contestants import BACKENDS, REFERENCES, SYNCHRONISE, Method, as_kept, contestants, loop
from benchmarks.harness import Prepared, Step, in_graphs, interleave, ratios, rotating, summary, write
from benchmarks.problem import PATTERNS, Layer, Routed
from tests.close import TOLERANCE

SHAPES = "8192x4096x14336,8192x4096x4096,8192x14336x4096,2048x4096x4096,256x4096x14336,16x4096x4096,1x4096x14336"
EXPERTS = "8x16x2,64x1x8,64x16x2"
GRAPH_TOKENS = 256
FEWEST_SETS, MOST_SETS, TIMES_L2 = 4, 16, 5


def tensors(draw: Callable[[int], Layer], device: str) -> list[Layer]:
    """Sets of tensors to rotate through: enough to exceed a GPU's L2 cache several times; one on a CPU."""
    first = draw(0)
    if device == "cpu":
        return [first]
    wanted = math.ceil(TIMES_L2 * torch.cuda.get_device_properties(0).L2_cache_size / first.num_bytes())
    return [first, *(draw(seed) for seed in range(1, min(max(wanted, FEWEST_SETS), MOST_SETS)))]


def check(layer: Layer, found: Mapping[str, Method]) -> None:
    """Refuses to time a method whose output or gradients are wrong: float64, and plain PyTorch in the same dtype."""
    truth, plain = gradients(loop, layer.double()), gradients(loop, layer)
    for name in found.keys() - {*REFERENCES}:
        allowed = 2 if name in BACKENDS else 4  # others may round what they weigh or add up
        for what, got in gradients(found[name], as_kept(name, layer)).items():
            error, usual = _error(got, truth[what]), _error(plain[what], truth[what])
            limit = max(allowed * usual, TOLERANCE[layer.x.dtype])  # the latter for other orders of summation
            assert error <= limit, f"{name} {what}: {error:.2g}, a loop {usual:.2g}"


def _error(got: Tensor, truth: Tensor) -> float:
    """Relative, root mean square."""
    return float((got.double() - truth).norm() / truth.norm())


def gradients(method: Method, layer: Routed) -> dict[str, Tensor]:
    y = method(layer)
    dx, *factors, dweights = torch.autograd.grad(y, layer.leaves(), layer.grad)
    dA, dB = layer.joined(factors)
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB, "dweights": dweights}


def forward(method: Method, layer: Routed) -> Tensor:
    with torch.no_grad():
        return method(layer)


def backward(layer: Routed, y: Tensor) -> object:
    return torch.autograd.grad(y, layer.leaves(), layer.grad, allow_unused=True)


def both(method: Method, layer: Routed) -> object:
    return backward(layer, method(layer))


def steps(sets: list[Layer], found: Mapping[str, Method]) -> Iterator[tuple[str, dict[str, Step]]]:
    """What is timed, by name: "forward" without gradients, as inference has it, and a training step's passes."""
    kept = [{name: as_kept(name, layer) for name in found} for layer in sets]
    kinds: dict[str, Callable[[Method, Routed], Step]] = {
        "forward": lambda method, layer: partial(forward, method, layer),
        "backward": lambda method, layer: Prepared(partial(method, layer), partial(backward, layer)),
        "forward and backward": lambda method, layer: partial(both, method, layer),
    }
    for timed, kind in kinds.items():
        yield timed, rotating([{name: kind(method, own[name]) for name, method in found.items()} for own in kept])
    if sets[0].x.is_cuda and len(sets[0].x) <= GRAPH_TOKENS:
        able = {name: method for name, method in found.items() if name not in SYNCHRONISE}
        for timed, pass_ in (("forward", forward), ("forward and backward", both)):
            graphs = [in_graphs({name: partial(pass_, m, own[name]) for name, m in able.items()}) for own in kept]
            yield f"{timed}, CUDA graph", rotating(graphs)


def measure(shape: str, experts: str, ceilings: Ceilings, arguments: argparse.Namespace) -> None:
    """A row for each of what is timed."""
    sizes: list[tuple[int, ...]] = [tuple(map(int, text.split("x"))) for text in (shape, experts)]
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    draw = partial(Layer.draw, *sizes, device, dtype, arguments.routing)  # type: ignore[arg-type]
    sets = tensors(draw, device)
    found = contestants(sets[0], arguments.compiled)
    check(sets[0], found)
    row = {"device": device, "TxDxO": shape, "ExRxK": experts, "routing": arguments.routing, "dtype": arguments.dtype}
    for timed, named in steps(sets, found):
        times = interleave(named, arguments.rounds, 25 if device == "cuda" else 3, device, arguments.seconds)
        base = times.pop("base")
        floor = floor_seconds(sets[0], timed.partition(",")[0], ceilings)
        write(
            "layer",
            {"timed": timed, **row, "rounds": len(base), "base_microseconds": summary([1e6 * t for t in base])}
            | {"floor_times_base": float(f"{floor / summary(base)['median']:.3g}"), **ceilings.row()}
            | {"times_base": {name: ratios(seconds, base) for name, seconds in times.items()}},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="A linear with experts against its base")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", default=SHAPES, help="TxDxO, separated by commas")
    parser.add_argument("--experts", default=EXPERTS, help="ExRxK, separated by commas")
    parser.add_argument("--routing", default="uniform", choices=[*PATTERNS])
    parser.add_argument("--rounds", type=int, default=100, help="at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row, once there are a few rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also `dense` under torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ceilings = measure_ceilings(arguments.device, getattr(torch, arguments.dtype))
    for shape in arguments.shapes.split(","):
        for experts in arguments.experts.split(","):
            measure(shape, experts, ceilings, arguments)


if __name__ == "__main__":
    main()
