"""What one step adds to the base, at its linears and in its feed-forward blocks.

While the same requests go on decoding, one step is as the last one was, and its plan is the same too: what is looked up
for a linear is looked up once.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from molex_serve.errors import BadAdapter
from molex_serve.model.columns import ColumnPool, Part
from molex_serve.model.linear import Adds, Block, Current
from molex_serve.model.routed import RoutedAdapter
from molex_serve.model.step import Step


class Own(NamedTuple):
    """A routed adapter and its tokens in the step."""

    adapter: RoutedAdapter
    rows: Tensor  # (N,)


class Plan(Adds):
    """Of one step. Tokens of adapters that are not in it, and padding, are the base's."""

    def __init__(self, step: Step, pool: ColumnPool, routed: Mapping[int, RoutedAdapter]):
        self.step, self.pool, self.routed = step, pool, routed
        self.batches = pool.batches(step)
        self.own = {handle: Own(routed[handle], step.rows_of(handle)) for handle in step.present if handle in routed}
        self._parts: dict[str, tuple[Part, ...]] = {}  # by linear
        self._without: dict[frozenset[int], Plan] = {}

    def suits(self, step: Step) -> bool:
        """Whether this is that step's plan too, as long as the same adapters are attached."""
        return self.step.spans == step.spans and len(self.step.handles) == len(step.handles)

    @cached_property
    def is_base(self) -> bool:
        return not self.batches and not self.own

    def begin(self, first_pass: Callable[[], Tensor] | None) -> None:
        """Before the model's forward. first_pass: gives the base's last hidden states (..., D), should a head ask."""
        for handle, own in self.own.items():
            own.adapter.begin(len(own.rows), self.step.tasks_of(handle))
        looking = [own for own in self.own.values() if own.adapter.head is not None]
        if looking:
            assert first_pass is not None, "who cannot do a first pass refuses such adapters when it reads them"
            hidden_TD = first_pass().flatten(0, -2)
            for own in looking:
                own.adapter.decide(hidden_TD[own.rows])

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        if len(x) != len(self.step.handles):
            return self._over_cache(name, x, y)
        if name not in self._parts:
            self._parts[name] = self.pool.parts(name, self.batches)
        for part in self._parts[name]:
            part.add(x, y)
        for adapter, rows in self.own.values():
            if name in adapter.layers:
                y[rows] = adapter.add(name, x[rows], y[rows])
        return y

    def block(self, name: str, base: Block, x: Tensor, current: Current) -> Tensor:
        """A feed-forward block, x (T, D): the tokens of adapters that have experts in it through theirs, the others
        through the base's."""
        own = {handle: owner for handle, owner in self.own.items() if name in owner.adapter.blocks}
        if not own:
            return base(x[None])[0]
        parts = [(rows, adapter.blocks[name](x[rows][None])[0]) for adapter, rows in own.values()]
        others = self.without(frozenset(own))
        rest = self.step.rows_without(frozenset(own))
        if len(rest):
            with current.replaced(None if others.is_base else others):
                parts.append((rest, base(x[rest][None])[0]))
        y = parts[0][1].new_empty(len(x), parts[0][1].shape[1])
        return y.index_copy_(0, torch.cat([rows for rows, _ in parts]), torch.cat([part for _, part in parts]))

    def _over_cache(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Latent attention may expand all that it has cached again: every row is the step's one request's. Raises
        BadAdapter for a mixture, whose routers decided when those tokens came."""
        (span,) = self.step.spans
        if span.handle in self.own and name in self.own[span.handle].adapter.layers:
            raise BadAdapter(f"{name} is computed over cached tokens again, for which nobody routes: serve it in pages")
        whole = Step.of((span._replace(start=0, stop=len(x)),), x.device)
        return Plan(whole, self.pool, {}).add(name, x, y)

    def without(self, handles: frozenset[int]) -> "Plan":
        """The plan of the other tokens alone."""
        if handles not in self._without:
            self._without[handles] = Plan(self.step.without(handles), self.pool, self.routed)
        return self._without[handles]
