"""Backends against each other on the device itself: first whether they are right there, then which is fastest.

A kernel that no one has tried on this GPU, with this driver and this Triton, is not trusted: a backend whose output or
gradients are not `dense`'s is out, and so is one that does not run. Factors and x are made up, in the layer's own shape
and over its own base: at the start of training B is zero, and what is wrong could not be seen.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molex.kernels.base import Backend
from molex.kernels.columns import Columns
from molex.routing import Routing

logger = logging.getLogger("molex")

ROUNDS, WARMUP = 10, 3
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-2, torch.float64: 1e-8}  # 32 may be TF32


class Layer(NamedTuple):
    """A linear with experts whose tensors may be used up."""

    x: Tensor
    base: nn.Module
    columns: Columns
    routing: Routing
    grad: Tensor | None  # of the output; None where nobody asks for gradients

    @staticmethod
    def like(x: Tensor, base: nn.Module, columns: Columns, routing: Routing) -> "Layer":
        """Random numbers at the scale of a trained layer, the choice of experts as it is."""
        generator = torch.Generator(x.device).manual_seed(0)

        def normal(like: Tensor, deviation: float) -> Tensor:
            drawn = torch.randn(like.shape, generator=generator, device=like.device).mul_(deviation)
            return drawn.to(like.dtype).requires_grad_(torch.is_grad_enabled())

        num_in, num_out = x.shape[-1], columns.B.shape[0]
        made = columns._replace(A=normal(columns.A, num_in**-0.5), B=normal(columns.B, max(columns.ranks) ** -0.5))
        weights = routing.weights.detach().clone().requires_grad_(torch.is_grad_enabled())
        grad = normal(x.new_empty(*x.shape[:-1], num_out), 1.0).detach() if torch.is_grad_enabled() else None
        return Layer(normal(x, 1.0), base, made, routing._replace(weights=weights), grad)

    def through(self, backend: Backend) -> tuple[Tensor, ...]:
        """The output and the gradients of x, A, B and the weights."""
        y = backend.linear(self.x, self.base, self.columns, self.routing)
        if self.grad is None:
            return (y,)
        return y, *torch.autograd.grad(y, (self.x, self.columns.A, self.columns.B, self.routing.weights), self.grad)


def race(layer: Layer, contestants: Mapping[str, Backend], yardstick: Backend) -> dict[str, float]:
    """Seconds of each that is right here, by name; the others are reported and left out."""
    truth = layer.through(yardstick)
    right = {name: backend for name, backend in contestants.items() if _agrees(name, backend, layer, truth)}
    times: dict[str, list[float]] = {name: [] for name in right}
    for round_number in range(-WARMUP, ROUNDS):
        for name, backend in right.items():
            seconds = _timed(partial(layer.through, backend), layer.x.device)
            if round_number >= 0:
                times[name].append(seconds)
    return {name: statistics.median(own) for name, own in times.items()}


def _agrees(name: str, backend: Backend, layer: Layer, truth: tuple[Tensor, ...]) -> bool:
    try:
        results = layer.through(backend)
    except Exception as error:  # noqa: BLE001 (compilers and drivers have errors of their own; it does not run here)
        logger.warning("backend %s does not run here and is not used: %s", name, str(error).partition("\n")[0])
        return False
    errors = [_distance(got, right) for got, right in zip(results, truth, strict=True)]
    wrong = [error for error in errors if not error <= TOLERANCE[layer.x.dtype]]
    if wrong:
        logger.warning("backend %s computes something else here (off by %.2g) and is not used", name, max(wrong))
    return not wrong


def _distance(got: Tensor, right: Tensor) -> float:
    """Relative, root mean square."""
    wide = right.float()
    return float((got.float() - wide).norm() / wide.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
