"""Every expert at weight 1 for every token: with one expert, ordinary LoRA (arXiv 2106.09685)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molex.routers.base import Router, RouterConfig, routers
from molex.routing import RouteContext, Routing, dense_routing


@routers.register("constant")
@dataclass(frozen=True, kw_only=True)
class ConstantConfig(RouterConfig):
    """Nothing to set."""

    def build(self, in_features: int, num_experts: int) -> Router:
        return ConstantRouter(num_experts)


class ConstantRouter(Router):
    """No parameters."""

    def add_expert(self) -> None:
        self.num_experts += 1

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return dense_routing(torch.ones(x.shape[0], self.num_experts, device=x.device, dtype=dtype), None)
