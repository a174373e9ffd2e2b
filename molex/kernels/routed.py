"""Layers whose router is part of the backend's kernels: in a decoding step the router's launches cost more than it.

A router says by a rule what it does in evaluation (`Router.rule`); a backend that can do the same inside its kernels
is a `RoutesItself`. It must choose the same experts, of equal ones any.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from molex.kernels.base import backends
from molex.kernels.columns import Columns
from molex.kernels.planner import Planner
from molex.routing import Routing, Rule


class RoutesItself(ABC):
    """A backend that routes and computes a single linear at once, without gradients."""

    @abstractmethod
    def routes(self, x: Tensor, columns: Columns, rule: Rule) -> bool:
        """Whether it can here, and whether that is faster."""

    @abstractmethod
    def route_linear(
        self, x: Tensor, base: nn.Module, columns: Columns, rule: Rule, scale: Tensor
    ) -> tuple[Tensor, Routing]:
        """(..., D) -> (..., O), and the decision by the rule, its weights before the experts' scale (E,)."""


def may_route(planner: Planner, device: torch.device) -> bool:
    """Whether a layer there can have such a backend at all: asked at every token, so it looks at nothing else."""
    if planner.choice == "auto":
        return device.type == "cuda"
    return issubclass(backends[planner.choice], RoutesItself)


def routed_linear(
    planner: Planner, x: Tensor, base: nn.Module, columns: Columns, rule: Rule, scale: Tensor
) -> tuple[Tensor, Routing] | tuple[None, None]:
    """y and the decision by the backend that the planner picks; None where that one leaves routing to the router."""
    backend = planner.pick(x, columns, _of_the_shape(x, columns, rule, scale), base)
    if isinstance(backend, RoutesItself) and backend.routes(x, columns, rule):
        return backend.route_linear(x, base, columns, rule, scale)
    return None, None


def _of_the_shape(x: Tensor, columns: Columns, rule: Rule, scale: Tensor) -> Routing:
    """A decision to plan with before there is one: views of what is there, since planners go by its shape."""
    shape, apart = (x.shape[:-1].numel(), rule.top_k), len(columns.expert_of_column) // rule.top_k
    ids_K = columns.expert_of_column[: apart * rule.top_k : apart]
    return Routing(ids_K.expand(shape), scale[: rule.top_k].expand(shape), None, len(columns.ranks))
