"""SMoRA: every rank is an expert; sigmoid scores with a balance bias choose k of them (arXiv 2501.15103).

    q = sigmoid(W x) + b;   ids = topk(q, k);   w = q / Σ_chosen q

With rank-1 experts of scale alpha the layer adds alpha · Σ w_i b_i (a_i · x), Σ w = 1. `bias_in_weight` is what
the authors' code does: b takes part in the weight as well as in the choice. There AdamW also trains b; here only
the balance rule moves it. `rank_partition` p shares one score between p neighbouring ranks; the choice still falls
on single ranks.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from molex.errors import ConfigError
from molex.routers.base import BalancedRouter, Gate, Router, RouterConfig, check_top_k, routers
from molex.routing import RouteContext, Routing


@routers.register("sigmoid")
@dataclass(frozen=True, kw_only=True)
class SigmoidConfig(RouterConfig):
    """bias_rate: how far b moves after each step (1e-5 in the authors' code)."""

    top_k: int = 8
    bias_rate: float = 1e-5
    bias_in_weight: bool = True
    rank_partition: int = 1
    gate_init: float | Literal["kaiming"] = "kaiming"

    def build(self, in_features: int, num_experts: int) -> Router:
        return SigmoidRouter(self, in_features, num_experts)


class SigmoidRouter(BalancedRouter):
    """A linear gate and a balance bias (E,)."""

    def __init__(self, config: SigmoidConfig, in_features: int, num_experts: int):
        check_top_k(config.top_k, num_experts)
        if config.rank_partition < 1 or num_experts % config.rank_partition:
            raise ConfigError(f"rank_partition={config.rank_partition} must divide num_experts={num_experts}")
        super().__init__(num_experts, config.bias_rate)
        self.config = config
        self.gate = Gate(in_features, num_experts // config.rank_partition, config.gate_init)

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x).repeat_interleave(self.config.rank_partition, dim=-1)
        scores_TE = logits_TE.sigmoid()
        biased_TE = scores_TE + self.bias.to(scores_TE.dtype)
        ids_TK = biased_TE.topk(self.config.top_k, dim=-1).indices
        chosen_TK = (biased_TE if self.config.bias_in_weight else scores_TE).gather(1, ids_TK)
        weights_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=1e-6)
        return Routing(ids_TK, weights_TK, logits_TE, self.num_experts)
