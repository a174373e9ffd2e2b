"""Which backend computes a layer: an explicit choice that must run, or an automatic one that says why.

`auto` goes by the roofline of each plan (`molex.kernels.cost`). On a GPU, plans that it finds close to the best are
raced on the device at the first use of a shape (`molex.kernels.race`), and the fastest that is right there is kept.
Dense-masked is nearly always the plan to beat: the sorted forms read x and touch y once for each of a token's experts.
"""

import logging
import os

import torch
from torch import Tensor, nn

from molex.errors import BackendError
from molex.kernels.base import Backend, Form, backends
from molex.kernels.columns import Columns
from molex.kernels.cost import Ceilings, Shape, seconds
from molex.kernels.preload import why_not_plain
from molex.kernels.race import Layer, race
from molex.routing import Routing

logger = logging.getLogger("molex")

CLOSE = 1.3  # plans of which the roofline cannot tell which is faster
ENOUGH = 0.95  # of dense's time: below that another plan is worth being chosen unmeasured
COMPILED_TOKENS = 2048  # a compiled graph is for any number

Key = tuple[object, ...]


class Planner:
    """Picks a backend by shape; `choice` is "auto" or a backend's name. `MOLEX_BACKEND` replaces "auto"."""

    def __init__(self, choice: str = "auto"):
        self.choice = os.environ.get("MOLEX_BACKEND", "auto") if choice == "auto" else choice
        if self.choice != "auto":
            backends[self.choice]
        self._instances: dict[str, Backend] = {}
        self._picked: dict[Key, Backend] = {}

    def pick(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module, form: Form = "linear") -> Backend:
        """Raises BackendError when a backend chosen by name cannot run these shapes."""
        if self.choice != "auto":
            return self._explicit(x, columns, routing, base)
        if torch.compiler.is_compiling():
            return self._get(self._predict(x, columns, routing, base, COMPILED_TOKENS)[0])
        num_tokens = 1 << (x.shape[:-1].numel() - 1).bit_length()  # up to the next power of two
        plain, sizes = why_not_plain(base, x) is None, (columns.B.shape, routing.expert_ids.shape[1])
        key = (form, num_tokens, x.shape[-1], *sizes, columns.ranks, x.dtype, x.device, torch.is_grad_enabled(), plain)
        if key not in self._picked:
            name, reason = self._decide(x, columns, routing, base, form, num_tokens)
            shape = (num_tokens, x.shape[-1], *columns.B.shape, routing.expert_ids.shape[1], x.dtype)
            logger.info("T<=%d D=%d O=%d C=%d K=%d %s: backend %s (%s)", *shape, name, reason)
            self._picked[key] = self._get(name)
        return self._picked[key]

    def _explicit(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> Backend:
        backend = self._get(self.choice)
        reason = backend.supports(x, columns, routing, base)
        if reason:
            raise BackendError(f"backend {self.choice!r} cannot run this layer: {reason}; use backend='auto'")
        return backend

    def _decide(
        self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module, form: Form, num_tokens: int
    ) -> tuple[str, str]:
        if form == "linear" and _may_race(x):
            return self._race(x, columns, routing, base, num_tokens)
        return self._predict(x, columns, routing, base, num_tokens)

    def _predict(
        self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module, num_tokens: int
    ) -> tuple[str, str]:
        """The best of the plans that need no race; dense where none is clearly better."""
        told: list[str] = []
        for name, share in self._shares(x, columns, routing, num_tokens).items():
            if share > ENOUGH:
                break
            if self._get(name).raced:
                continue
            reason = self._get(name).supports(x, columns, routing, base)
            told.append(f"{name} is predicted at {share:.2f} of dense's time" + (f", but {reason}" if reason else ""))
            if reason is None:
                return name, "; ".join(told)
        return "dense", "; ".join(told) or "predicted to be fastest, or nearly"

    def _race(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module, num_tokens: int) -> tuple[str, str]:
        """The fastest of the plans that run here and are right."""
        shares = self._shares(x, columns, routing, num_tokens)
        able = [name for name in shares if self._get(name).supports(x, columns, routing, base) is None]
        close = [name for name in able if shares[name] <= CLOSE * shares[able[0]] or name == "dense"]
        contestants = {name: self._get(name) for name in close}
        times = race(Layer.like(x, base, columns, routing), contestants, self._get("dense"))
        ranked = sorted(times, key=times.__getitem__)
        return ranked[0], "microseconds here: " + ", ".join(f"{name} {1e6 * times[name]:.0f}" for name in ranked)

    def _shares(self, x: Tensor, columns: Columns, routing: Routing, num_tokens: int) -> dict[str, float]:
        """Each plan's predicted time over dense's, the smallest first."""
        shape, ceilings = Shape.of(x, columns, routing, num_tokens), Ceilings.of(x.device)
        costs: dict[str, float] = {}
        for name in backends:
            steps = self._get(name).steps(shape)
            if steps is not None:
                costs[name] = seconds(steps, shape.itemsize, ceilings)
        return {name: costs[name] / costs["dense"] for name in sorted(costs, key=costs.__getitem__)}

    def _get(self, name: str) -> Backend:
        if name not in self._instances:
            self._instances[name] = backends[name]()
        return self._instances[name]


def _may_race(x: Tensor) -> bool:
    """On a GPU that is not being recorded. Who asks for deterministic results gets the same plan every time."""
    if not x.is_cuda or x.numel() == 0 or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()
