"""Layers whose router is part of the backend's kernels: in a decoding step the router's launches cost more than it.

A router says by a rule what it does in evaluation (`Router.rule`); a backend that can do the same inside its kernels
is a `RoutesItself`. It must choose the same experts, of equal ones any. `auto` first compares them on the device.
"""

import logging
from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor, nn

from molex.kernels.base import backends
from molex.kernels.block import Projection
from molex.kernels.columns import Columns
from molex.kernels.planner import Planner
from molex.kernels.race import TOLERANCE, Made, distance
from molex.routing import Routing, Rule, SoftmaxTopK

logger = logging.getLogger("molex")

PROBED = 64  # made-up tokens, at least, by which routing in kernels is compared with plain torch
ALIKE = 0.9  # of them must choose alike: where two scores are nearly equal either may come first


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
    if not isinstance(backend, RoutesItself) or not backend.routes(x, columns, rule):
        return None, None
    key = (type(rule), *rule[1:], columns.A.shape, columns.B.shape, columns.ranks, len(scale))
    if not planner.trusts(x, key, partial(_is_right, backend, x, base, columns, rule, scale)):
        return None, None
    return backend.route_linear(x, base, columns, rule, scale)


@torch.no_grad()
def _is_right(backend: RoutesItself, x: Tensor, base: nn.Module, columns: Columns, rule: Rule, scale: Tensor) -> bool:
    """Whether a backend decides and computes here as plain torch does, on made-up tokens by a made-up rule."""
    made = Made(x.device)
    made_columns = made.projection(Projection(base, columns, _of_the_shape(x, columns, rule, scale))).columns
    factor = made.normal(rule[0], rule[0].shape[-1] ** -0.5)
    rule = rule._replace(weight=factor) if isinstance(rule, SoftmaxTopK) else rule._replace(bias=factor)
    chosen_alike, errors = [], []
    for _ in range(-(-PROBED // x.shape[:-1].numel())):
        rows_TD = made.normal(x.reshape(-1, x.shape[-1]), 1.0)
        try:
            y_TO, routing = backend.route_linear(rows_TD, base, made_columns, rule, scale)
        except Exception as error:  # noqa: BLE001 (compilers and drivers have errors of their own)
            logger.warning("routing in kernels does not run here and is not used: %s", str(error).partition("\n")[0])
            return False
        truth = rule.decide(rows_TD, made_columns.shrink(rows_TD))
        wanted_TO = backends["dense"]().linear(rows_TD, base, made_columns, truth.scaled(scale))
        alike_T = (routing.expert_ids == truth.expert_ids).all(1)
        chosen_alike.append(alike_T.float().mean())
        errors.append(distance(y_TO[alike_T], wanted_TO[alike_T]))
    right = float(torch.stack(chosen_alike).mean()) >= ALIKE and max(errors) <= TOLERANCE[x.dtype]
    if not right:
        logger.warning("routing in kernels chooses or computes something else here and is not used")
    return right


def _of_the_shape(x: Tensor, columns: Columns, rule: Rule, scale: Tensor) -> Routing:
    """A decision to plan with before there is one: views of what is there, since planners go by its shape."""
    shape, apart = (x.shape[:-1].numel(), rule.top_k), len(columns.expert_of_column) // rule.top_k
    ids_K = columns.expert_of_column[: apart * rule.top_k : apart]
    return Routing(ids_K.expand(shape), scale[: rule.top_k].expand(shape), None, len(columns.ranks))
