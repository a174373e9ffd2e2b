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

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from molex.kernels.base import Backend
from molex.kernels.block import Block, Projection
from molex.routing import Routing

logger = logging.getLogger("molex")

ROUNDS, WARMUP = 10, 3
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-2, torch.float64: 1e-8}  # 32 may be TF32


Through = Callable[
    [Backend], tuple[Tensor, ...]
]  # through a backend: the output, and all gradients if any are asked for


def like_layer(x: Tensor, one: Projection) -> Through:
    """A linear with experts at the scale of a trained one, the choice of experts as it is."""
    made = Made(x.device)
    x, one = made.normal(x, 1.0), made.projection(one)

    def through(backend: Backend) -> tuple[Tensor, ...]:
        return made.results(backend.linear(x, one.base, one.columns, one.routing))

    return through


def like_block(x: Tensor, block: Block) -> Through:
    """The same for a feed-forward block."""
    made = Made(x.device)
    x, gate, up, down = made.normal(x, 1.0), *(made.projection(one) for one in (block.gate, block.up, block.down))
    block = block._replace(gate=gate, up=up, down=down, routing=made.routing(block.routing))

    def through(backend: Backend) -> tuple[Tensor, ...]:
        return made.results(backend.ffn(x, block))

    return through


class Made:
    """Random tensors, and the gradients that a backend gives them."""

    def __init__(self, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(0)
        self.leaves: list[Tensor] = []
        self.grad: Tensor | None = None

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        return self._leaf(
            torch.randn(like.shape, generator=self.generator, device=like.device).mul_(deviation).to(like.dtype)
        )

    def routing(self, routing: Routing) -> Routing:
        return routing._replace(weights=self._leaf(routing.weights.detach().clone()))

    def projection(self, one: Projection) -> Projection:
        columns = one.columns
        A = self.normal(columns.A, columns.A.shape[1] ** -0.5)
        B = self.normal(columns.B, max(columns.ranks) ** -0.5)
        return Projection(one.base, columns._replace(A=A, B=B), self.routing(one.routing))

    def results(self, y: Tensor) -> tuple[Tensor, ...]:
        if not y.requires_grad:
            return (y,)
        if self.grad is None:
            self.grad = torch.randn(y.shape, generator=self.generator, device=y.device).to(y.dtype)
        return y, *torch.autograd.grad(y, self.leaves, self.grad, materialize_grads=True)

    def _leaf(self, tensor: Tensor) -> Tensor:
        self.leaves.append(tensor.requires_grad_(torch.is_grad_enabled()))
        return tensor


def race(through: Through, contestants: Mapping[str, Backend], yardstick: Backend) -> dict[str, float]:
    """Seconds of each that is right here, by name; the others are reported and left out. Of nobody where there is no
    memory for it."""
    # a checkpoint around the layer must not take what is saved here for its own
    with saved_tensors_hooks(_as_it_is, _as_it_is):
        return _race(through, contestants, yardstick)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _race(through: Through, contestants: Mapping[str, Backend], yardstick: Backend) -> dict[str, float]:
    try:
        truth = through(yardstick)
    except torch.OutOfMemoryError:
        return {}
    right = {name: backend for name, backend in contestants.items() if _agrees(name, backend, through, truth)}
    times: dict[str, list[float]] = {name: [] for name in right}
    for round_number in range(-WARMUP, ROUNDS):
        for name, backend in right.items():
            seconds = _timed(partial(through, backend), truth[0].device)
            if round_number >= 0:
                times[name].append(seconds)
    return {name: statistics.median(own) for name, own in times.items()}


def _agrees(name: str, backend: Backend, through: Through, truth: tuple[Tensor, ...]) -> bool:
    try:
        results = through(backend)
    except Exception as error:  # noqa: BLE001 (compilers and drivers have errors of their own; it does not run here)
        logger.warning("backend %s does not run here and is not used: %s", name, str(error).partition("\n")[0])
        return False
    errors = [distance(got, right) for got, right in zip(results, truth, strict=True)]
    wrong = [error for error in errors if not error <= TOLERANCE[truth[0].dtype]]
    if wrong:
        logger.warning("backend %s computes something else here (off by %.2g) and is not used", name, max(wrong))
    return not wrong


def distance(got: Tensor, right: Tensor) -> float:
    """How far off, relative, root mean square."""
    wide = right.float()
    return float((got.float() - wide).norm() / wide.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    with torch.cuda.device(device):  # of a model over several GPUs, the current one may be another
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3
