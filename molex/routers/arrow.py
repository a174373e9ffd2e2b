"""Arrow: route to pretrained experts without training (arXiv 2405.11157).

    v_e = top right singular vector of B_e A_e;   logit_e = |v_e · x|;   w = softmax(topk(logits, k) / τ)

The singular vector comes from the small core: with Bᵀ's QR factor R_B, the right vectors of B A are those of R_B A.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from molex.errors import ConfigError
from molex.routers.base import Router, RouterConfig, check_top_k, routers
from molex.routing import RouteContext, Routing


@routers.register("arrow")
@dataclass(frozen=True, kw_only=True)
class ArrowConfig(RouterConfig):
    """temperature τ of the softmax over the chosen."""

    top_k: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0")

    def build(self, in_features: int, num_experts: int) -> Router:
        return ArrowRouter(self, in_features, num_experts)


class ArrowRouter(Router):
    """prototypes (E, D), a persistent buffer; zero until an expert is loaded, which nobody is routed to until then."""

    exact = ("prototypes",)
    prototypes: Tensor

    def __init__(self, config: ArrowConfig, in_features: int, num_experts: int):
        check_top_k(config.top_k, num_experts)
        super().__init__(num_experts)
        self.config = config
        self.register_buffer("prototypes", torch.zeros(num_experts, in_features))

    def add_expert(self) -> None:
        self.prototypes = torch.cat([self.prototypes, self.prototypes.new_zeros(1, self.prototypes.shape[1])])
        self.num_experts += 1

    @torch.no_grad()
    def learn_expert(self, expert_id: int, A: Tensor, B: Tensor) -> None:
        """Takes the direction of an expert that was just loaded: A (R, D), B (O, R); one that adds nothing has none."""
        self.prototypes[expert_id] = top_direction(A, B).to(self.prototypes)

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits_TE = (x.to(dtype) @ self.prototypes.to(dtype).T).abs()
        there_E = self.prototypes.any(dim=1)
        best_TK, ids_TK = logits_TE.where(there_E, -1).topk(self.config.top_k, dim=-1)
        chosen_TK = there_E[ids_TK]
        weights_TK = (best_TK / self.config.temperature).masked_fill(~chosen_TK, -math.inf).softmax(-1)
        return Routing(ids_TK.where(chosen_TK, -1), weights_TK.where(chosen_TK, 0), logits_TE, self.num_experts)


def top_direction(A: Tensor, B: Tensor) -> Tensor:
    """The top right singular vector (D,) of B A, float64; zero where B A is. A (R, D), B (O, R)."""
    core_RR = torch.linalg.qr(B.detach().double()).R
    _, sizes, directions = torch.linalg.svd(core_RR @ A.detach().double(), full_matrices=False)
    return directions[0] * (sizes[0] > 0)
