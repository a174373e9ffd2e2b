"""FlyLoRA: the frozen sparse projection A x is itself the router (arXiv 2510.08396).

    y = A x;   ids = topk(|y + d|, k);   weight 1 on the chosen

d is a balance bias that takes part in the choice only. The released code chooses by the signed y + d
(`signed=True`); its 16-bit path also stops the gradient from the experts to x, which neither the paper nor molex
does.
"""

from dataclasses import dataclass

from torch import Tensor

from molex.routers.base import BalancedRouter, Router, RouterConfig, check_top_k, routers
from molex.routing import RouteContext, Routing, Rule, SelfTopK


@routers.register("implicit")
@dataclass(frozen=True, kw_only=True)
class ImplicitConfig(RouterConfig):
    """bias_rate: how far d moves after each step."""

    top_k: int = 8
    bias_rate: float = 1e-3
    signed: bool = False

    def build(self, in_features: int, num_experts: int) -> Router:
        return ImplicitRouter(self, num_experts)


class ImplicitRouter(BalancedRouter):
    """No trained parameters; a balance bias (E,)."""

    needs_activations = True

    def __init__(self, config: ImplicitConfig, num_experts: int):
        check_top_k(config.top_k, num_experts)
        super().__init__(num_experts, config.bias_rate)
        self.config = config

    def rule(self) -> Rule | None:
        return self._own_rule() if type(self) is ImplicitRouter else None

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        assert ctx.activations is not None
        return self._own_rule().decide(x, ctx.activations)

    def _own_rule(self) -> SelfTopK:
        return SelfTopK(self.bias, self.config.top_k, self.config.signed)
