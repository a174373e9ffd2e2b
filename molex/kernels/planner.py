"""Which backend computes a layer: an explicit choice that must run, or an automatic one that says why.

`auto` goes by the roofline of each plan (`molex.kernels.cost`). On a GPU, plans that it finds close to the best are
raced on the device at the first use of a shape (`molex.kernels.race`), and the fastest that is right there is kept.
Dense-masked is nearly always the plan to beat: the sorted forms read x and touch y once for each of a token's experts.
"""

import logging
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from molex.errors import BackendError
from molex.kernels.base import Backend, Form, backends
from molex.kernels.block import Block, Projection
from molex.kernels.columns import Columns
from molex.kernels.cost import Ceilings, Shape, seconds
from molex.kernels.preload import why_not_plain
from molex.kernels.race import Through, like_block, like_layer, race
from molex.routing import Routing

logger = logging.getLogger("molex")

CLOSE = 1.3  # plans of which the roofline cannot tell which is faster
ENOUGH = 0.95  # of dense's time: below that another plan is worth being chosen unmeasured
COMPILED_TOKENS = 2048  # a compiled graph is for any number

Choice = tuple[str, str]  # a backend's name, and why


class Planner:
    """Picks a backend by shape; `choice` is "auto" or a backend's name. `MOLEX_BACKEND` replaces "auto"."""

    def __init__(self, choice: str = "auto"):
        self.choice = os.environ.get("MOLEX_BACKEND", "auto") if choice == "auto" else choice
        if self.choice != "auto":
            backends[self.choice]
        self._instances: dict[str, Backend] = {}
        self._picked: dict[tuple[object, ...], Backend] = {}
        self._proved: dict[tuple[object, ...], bool] = {}

    def pick(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module, form: Form = "linear") -> Backend:
        """For one linear. Raises BackendError when a backend chosen by name cannot run these shapes."""
        one = Projection(base, columns, routing)
        if self.choice != "auto":
            return self._explicit((one, x))
        if torch.compiler.is_compiling():
            return self._get(self._predict(x, one, COMPILED_TOKENS)[0])
        plain = why_not_plain(base, x) is None
        key = (form, *_shape(x, one), columns.ranks, x.device, torch.is_grad_enabled(), plain)
        if key not in self._picked:
            races = form == "linear" and plain and may_race(x)  # calling another base may do more than compute
            self._keep(key, x, one, self._race(x, one) if races else self._predict(x, one, rounded_tokens(x)))
        return self._picked[key]

    def pick_block(self, x: Tensor, block: Block) -> Backend:
        """For a whole feed-forward block. Raises BackendError when a backend chosen by name cannot run it."""
        inner = x.new_empty(0, block.down.columns.A.shape[1])
        reads = ((block.gate, x), (block.up, x), (block.down, inner))
        if self.choice != "auto":
            return self._explicit(*reads)
        if not may_race(x):
            return self._get("dense")  # without zeros on a processor, as streams side by side in a compiled graph
        plain = all(why_not_plain(one.base, read) is None for one, read in reads)
        kind = (block.activation, block.keep is None, block.routing.normalised)
        key = ("ffn", *kind, *_shape(x, block.gate), block.gate.columns.ranks, x.device, torch.is_grad_enabled(), plain)
        if key not in self._picked:
            able = [name for name in backends if backends[name].has_blocks and self._why_not(name, *reads) is None]
            self._keep(key, x, block.gate, self._fastest(like_block(x, block), able))
        return self._picked[key]

    def trusts(self, x: Tensor, key: tuple[object, ...], proof: Callable[[], bool]) -> bool:
        """Whether a plan that computes more than `pick` has compared is right here: named, or proved once on x's
        device."""
        if self.choice != "auto":
            return True
        key = (x.device, x.dtype, rounded_tokens(x), *key)
        if key not in self._proved and may_race(x):
            self._proved[key] = proof()
        return self._proved.get(key, False)

    def give_back(self, base: nn.Module) -> None:
        """A base as it was before any plan: some lay its weight elsewhere."""
        for backend in self._instances.values():
            backend.give_back(base)

    def _explicit(self, *reads: tuple[Projection, Tensor]) -> Backend:
        reason = self._why_not(self.choice, *reads)
        if reason:
            raise BackendError(f"backend {self.choice!r} cannot run this layer: {reason}; use backend='auto'")
        return self._get(self.choice)

    def _keep(self, key: tuple[object, ...], x: Tensor, one: Projection, choice: Choice) -> None:
        name, reason = choice
        logger.info("T<=%d D=%d O=%d C=%d K=%d %s: backend %s (%s)", *_shape(x, one), name, reason)
        self._picked[key] = self._get(name)

    def _predict(self, x: Tensor, one: Projection, num_tokens: int) -> Choice:
        """The best of the plans that need no race; dense where none is clearly better."""
        told: list[str] = []
        for name, share in self._shares(x, one, num_tokens).items():
            if share > ENOUGH:
                break
            if backends[name].raced:
                continue
            reason = self._why_not(name, (one, x))
            told.append(f"{name} is predicted at {share:.2f} of dense's time" + (f", but {reason}" if reason else ""))
            if reason is None:
                return name, "; ".join(told)
        return "dense", "; ".join(told) or "predicted to be fastest, or nearly"

    def _race(self, x: Tensor, one: Projection) -> Choice:
        shares = self._shares(x, one, rounded_tokens(x))
        able = [name for name in shares if self._why_not(name, (one, x)) is None]
        close = [name for name in able if shares[name] <= CLOSE * shares[able[0]] or name == "dense"]
        return self._fastest(like_layer(x, one), close)

    def _fastest(self, through: Through, names: list[str]) -> Choice:
        """The fastest of the backends that run here and are right."""
        if names == ["dense"]:
            return "dense", "nothing else can run it"
        contestants: Mapping[str, Backend] = {name: self._get(name) for name in names}
        times = race(through, contestants, self._get("dense"))
        if not times:
            return "dense", "there is no memory to compare the others with it"
        ranked = sorted(times, key=times.__getitem__)
        return ranked[0], "microseconds here: " + ", ".join(f"{name} {1e6 * times[name]:.0f}" for name in ranked)

    def _shares(self, x: Tensor, one: Projection, num_tokens: int) -> dict[str, float]:
        """Each plan's predicted time over dense's, the smallest first."""
        shape, ceilings = Shape.of(x, one.columns, one.routing, num_tokens), Ceilings.of(x.device)
        costs: dict[str, float] = {}
        for name in backends:
            steps = self._get(name).steps(shape)
            if steps is not None:
                costs[name] = seconds(steps, shape.itemsize, ceilings)
        return {name: costs[name] / costs["dense"] for name in sorted(costs, key=costs.__getitem__)}

    def _why_not(self, name: str, *reads: tuple[Projection, Tensor]) -> str | None:
        """The first reason why a backend cannot run these linears on these inputs."""
        supports = self._get(name).supports
        reasons = (supports(x, one.columns, one.routing, one.base) for one, x in reads)
        return next((reason for reason in reasons if reason), None)

    def _get(self, name: str) -> Backend:
        if name not in self._instances:
            self._instances[name] = backends[name]()
        return self._instances[name]


def rounded_tokens(x: Tensor) -> int:
    """How many, up to the next power of two: what is found for one number holds for its neighbours."""
    return 1 << max(0, x.shape[:-1].numel() - 1).bit_length()


def may_race(x: Tensor) -> bool:
    """On a GPU that is not being recorded. Who asks for deterministic results gets the same plan every time."""
    if not x.is_cuda or x.numel() == 0 or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _shape(x: Tensor, one: Projection) -> tuple[object, ...]:
    return rounded_tokens(x), x.shape[-1], *one.columns.B.shape, one.routing.expert_ids.shape[1], x.dtype
