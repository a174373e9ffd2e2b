"""Learned weights that no token changes: w_e for each expert of each layer (LoRA Soups' CAT, arXiv 2410.13025).

    y = base(x) + Σ_e w_e s_e B_e A_e x        w (E,) trained, without constraint

Experts that were trained apart are mixed by a few examples; what comes out folds into one LoRA without loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molex.routers.base import Router, RouterConfig, routers
from molex.routing import RouteContext, Routing, dense_routing


@routers.register("static")
@dataclass(frozen=True, kw_only=True)
class StaticConfig(RouterConfig):
    """initial_weight: of every expert; by default 1/E, the mean."""

    initial_weight: float | None = None

    def build(self, in_features: int, num_experts: int) -> Router:
        return StaticRouter(self, num_experts)


class StaticRouter(Router):
    """weights (E,), float32 or wider."""

    def __init__(self, config: StaticConfig, num_experts: int):
        super().__init__(num_experts)
        initial = 1 / num_experts if config.initial_weight is None else config.initial_weight
        self.weights = nn.Parameter(torch.full((num_experts,), float(initial)))

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        weights_E = self.weights.to(torch.promote_types(x.dtype, torch.float32))
        return dense_routing(weights_E.expand(x.shape[0], -1), None)

    @torch.no_grad()
    def add_expert(self) -> None:
        """One more expert, of weight 0 until it is trained."""
        self.weights = nn.Parameter(torch.cat([self.weights, self.weights.new_zeros(1)]), self.weights.requires_grad)
        self.num_experts += 1
