"""One whole mixture layer (router, experts, base), forward and backward, against its frozen base alone.

    python -m benchmarks.mixture_linear [--dtype bfloat16] [--rounds 100]

The gradient of x is asked of both, as in the middle of a model; the base's weight is frozen in both.
"""

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import molex
from benchmarks.harness import interleave, ratios, summary, write
from molex.layer import MixtureLinear
from molex.routing import Routing
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


def step(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward, by name."""
    leaves = {"x": x, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
    y = module(x)
    grads = torch.autograd.grad(y, [*leaves.values()], grad)
    return {"y": y.detach(), **dict(zip([f"d {name}" for name in leaves], grads, strict=True))}


class Oracle(nn.Module):
    """The layer by the reference backend, its experts chosen already: p = softmax(W x), w = p / Σ p over the chosen."""

    def __init__(self, layer: MixtureLinear, expert_ids: Tensor):
        super().__init__()
        self.base, self.experts, self.router = layer.base, layer.experts, layer.router
        self.expert_ids = expert_ids

    def forward(self, x: Tensor) -> Tensor:
        gate: Any = self.router.gate.weight  # type: ignore[union-attr]
        probs_TE = F.linear(x.to(gate.dtype), gate).softmax(-1)
        picked_TK = probs_TE.gather(1, self.expert_ids)
        weights_TK = picked_TK / picked_TK.sum(-1, keepdim=True)
        routing = Routing(self.expert_ids, weights_TK, None, len(gate), normalised=True).scaled(self.experts.scale)
        columns = self.experts.columns().to(x.dtype)  # type: ignore[operator]
        return molex.kernels.backends["reference"]().linear(x, self.base, columns, routing)


def check(layer: MixtureLinear, x: Tensor, grad: Tensor) -> None:
    """Refuses to time a layer whose result or gradients are wrong: the oracle in float64 and in the layer's dtype, with
    the experts that the layer chooses."""
    found = step(layer, x, grad)
    plain = Oracle(layer, layer.state.trace[layer.name].routing.expert_ids)
    truth = step(copy.deepcopy(plain).double(), x.detach().double().requires_grad_(), grad.double())
    in_dtype = step(plain, x, grad)
    for what, got in found.items():
        assert_close(what, got, truth[what], in_dtype[what], products=x.dtype)


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
