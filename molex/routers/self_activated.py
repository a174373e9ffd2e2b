"""MoRAM: rank-1 memories that choose themselves by how strongly their key answers (arXiv 2506.21035).

    z = A x;   n = z / ‖z‖₂ over the ranks;   w = softmax(topk(n, k) / τ);   in evaluation w ← w · 1[n ≥ δ]

The top-k is signed, gradients flow through n, weights are not renormalised after the threshold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from molex.checks import check_range
from molex.errors import ConfigError
from molex.routers.base import Router, RouterConfig, routers
from molex.routing import RouteContext, Routing


@routers.register("self_activated")
@dataclass(frozen=True, kw_only=True)
class SelfActivatedConfig(RouterConfig):
    """temperature τ, threshold δ (evaluation only). A token uses min(top_k, E) ranks."""

    top_k: int = 8
    temperature: float = 0.03
    threshold: float = 0.2

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.temperature <= 0:
            raise ConfigError(f"top_k={self.top_k} must be at least 1, temperature={self.temperature} above 0")
        check_range("threshold", self.threshold, -1, 1)  # a cosine never passes 1

    def build(self, in_features: int, num_experts: int) -> Router:
        return SelfActivatedRouter(self, num_experts)


class SelfActivatedRouter(Router):
    """No parameters of its own."""

    needs_activations = True
    growable = True

    def __init__(self, config: SelfActivatedConfig, num_experts: int):
        super().__init__(num_experts)
        self.config = config

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        assert ctx.activations is not None
        z_TE = ctx.activations.to(torch.promote_types(x.dtype, torch.float32))
        n_TE = z_TE / (z_TE.norm(dim=-1, keepdim=True) + 1e-8)
        n_TK, ids_TK = n_TE.topk(min(self.config.top_k, z_TE.shape[-1]), dim=-1)
        weights_TK = (n_TK / self.config.temperature).softmax(-1)
        if not self.training:
            loud_TK = n_TK >= self.config.threshold
            ids_TK, weights_TK = ids_TK.where(loud_TK, -1), weights_TK * loud_TK
        return Routing(ids_TK, weights_TK, n_TE, z_TE.shape[-1])
