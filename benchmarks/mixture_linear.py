"""One whole mixture layer (router, experts, base), forward and backward, against its frozen base alone.

    python -m benchmarks.mixture_linear [--dtype bfloat16] [--rounds 100]

The gradient of x is asked of both, as in the middle of a model; the base's weight is frozen in both.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

import molex
from benchmarks.harness import interleave, ratios, summary, write
from molex.layer import MixtureLinear
from tests.close import assert_close

SHAPE = {"num_tokens": 2048, "num_in": 1024, "num_out": 1024, "num_experts": 8, "rank": 16, "top_k": 2}


def build(dtype: torch.dtype) -> tuple[nn.Linear, MixtureLinear]:
    """A frozen base, and a mixture over a copy of it whose experts add something."""
    torch.manual_seed(0)
    base = nn.Linear(SHAPE["num_in"], SHAPE["num_out"]).to(dtype).requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(base))
    settings = {name: SHAPE[name] for name in ("num_experts", "rank", "top_k")}
    molex.convert(model, molex.preset("mola", targets=("0",), allocation=None, dropout=0.0, **settings))
    layer = model[0]
    assert isinstance(layer, MixtureLinear)
    nn.init.normal_(layer.experts.lora_B, std=SHAPE["rank"] ** -0.5)  # type: ignore[arg-type]
    return base, layer


def step(module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward; returns the output."""
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    y = module(x)
    torch.autograd.grad(y, leaves, grad)
    return y.detach()


def check(layer: MixtureLinear, x: Tensor, grad: Tensor) -> None:
    """Refuses to time a wrong layer: the oracle in float64 and in the layer's dtype, under the layer's own routing."""
    y = step(layer, x, grad)
    routing = layer.state.trace[layer.name].routing
    columns, oracle = layer.experts.columns(), molex.kernels.backends["reference"]()  # type: ignore[operator]
    results = []
    for dtype in (torch.float64, x.dtype):
        base, scaled = copy.deepcopy(layer.base).to(dtype), routing.scaled(layer.experts.scale)
        scaled = scaled._replace(weights=scaled.weights.to(torch.promote_types(dtype, torch.float32)))
        results.append(oracle.linear(x.to(dtype), base, columns.to(dtype), scaled).detach())
    assert_close("y", y, results[0], results[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="A mixture layer against its base")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    base, layer = build(dtype)
    x = torch.randn(SHAPE["num_tokens"], SHAPE["num_in"]).to(dtype).requires_grad_()
    grad = torch.randn(SHAPE["num_tokens"], SHAPE["num_out"]).to(dtype)
    check(layer, x, grad)
    modules = {"base": base, "mixture": layer}
    times = interleave({name: lambda m=m: step(m, x, grad) for name, m in modules.items()}, arguments.rounds)
    row = {**SHAPE, "dtype": arguments.dtype, "rounds": arguments.rounds}
    row["milliseconds"] = {name: summary([1e3 * t for t in seconds]) for name, seconds in times.items()}
    write("mixture_linear", {**row, "mixture_over_base": ratios(times["mixture"], times["base"])})


if __name__ == "__main__":
    main()
