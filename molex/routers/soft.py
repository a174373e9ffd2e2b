"""Softmax over all experts, none dropped:  w = softmax(W x).

LoRAMoE (arXiv 2312.09979), HydraLoRA (arXiv 2404.19245).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from molex.routers.base import Gate, GatedRouter, Router, RouterConfig, routers
from molex.routing import RouteContext, Routing, dense_routing


@routers.register("soft")
@dataclass(frozen=True, kw_only=True)
class SoftConfig(RouterConfig):
    """gate_init: "kaiming" or a standard deviation."""

    gate_init: float | Literal["kaiming"] = "kaiming"

    def build(self, in_features: int, num_experts: int) -> Router:
        return SoftRouter(self, in_features, num_experts)


class SoftRouter(GatedRouter):
    """One linear gate."""

    def __init__(self, config: SoftConfig, in_features: int, num_experts: int):
        super().__init__(num_experts)
        self.gate = Gate(in_features, num_experts, config.gate_init)

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x)
        return dense_routing(logits_TE.softmax(-1), logits_TE, normalised=True)
