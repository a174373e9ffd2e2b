"""Softmax over the experts, the k largest kept and renormalised: MixLoRA, MoLA, MeteoRA.

    p = softmax(W x);   (w, ids) = topk(p, k);   w ← w / Σ w

MixLoRA arXiv 2404.15159, MoLA arXiv 2402.08562, MeteoRA arXiv 2405.13053. `renormalise=False` keeps the raw p.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molex.errors import ConfigError
from molex.routers.base import Gate, GatedRouter, Router, RouterConfig, check_top_k, routers
from molex.routing import RouteContext, Routing, Rule, SoftmaxTopK


@routers.register("topk")
@dataclass(frozen=True, kw_only=True)
class TopKConfig(RouterConfig):
    """gate_init: "kaiming" or a standard deviation. temperature divides the logits. jitter: during training the router
    reads x · U(1 − jitter, 1 + jitter); the experts read x itself (MixLoRA's code perturbs both)."""

    top_k: int = 2
    renormalise: bool = True
    temperature: float = 1.0
    jitter: float = 0.0
    gate_init: float | Literal["kaiming"] = "kaiming"

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.jitter < 1:
            raise ConfigError(f"temperature={self.temperature} must be above 0, jitter={self.jitter} in [0, 1)")

    def build(self, in_features: int, num_experts: int) -> Router:
        return TopKRouter(self, in_features, num_experts)


class TopKRouter(GatedRouter):
    """One linear gate."""

    def __init__(self, config: TopKConfig, in_features: int, num_experts: int):
        check_top_k(config.top_k, num_experts)
        super().__init__(num_experts)
        self.config = config
        self.gate = Gate(in_features, num_experts, config.gate_init)

    def rule(self) -> Rule | None:
        if type(self) is not TopKRouter or self.config.temperature != 1:
            return None
        return SoftmaxTopK(self.gate.weight, self.config.top_k, self.config.renormalise)

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        if self.training and self.config.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
        logits_TE = self.gate(x)
        if self.config.temperature != 1:
            logits_TE = logits_TE / self.config.temperature
        if self.config.renormalise:
            kept_TK, ids_TK = logits_TE.topk(self.config.top_k, dim=-1)
            weights_TK = kept_TK.softmax(-1)  # exp(l) / Σ exp(l) over the kept ones: p / Σ p
        else:
            weights_TK, ids_TK = logits_TE.softmax(-1).topk(self.config.top_k, dim=-1)
        return Routing(ids_TK, weights_TK, logits_TE, self.num_experts, normalised=self.config.renormalise)
