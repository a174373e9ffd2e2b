"""LoRA-Mixer: first every domain trains its own expert, then a router learns to mix them (arXiv 2507.00029).

stage "hard"   a token's task id is its expert, weight 1
stage "soft"   w = softmax(W x) over all experts in training; the top k, renormalised, in evaluation
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molex.checks import check_choice
from molex.routers.base import Gate, GatedRouter, Router, RouterConfig, check_top_k, routers
from molex.routing import RouteContext, Routing, dense_routing

Stage = Literal["hard", "soft"]


@routers.register("staged")
@dataclass(frozen=True, kw_only=True)
class StagedConfig(RouterConfig):
    """top_k is used in evaluation only (the paper's is 3)."""

    stage: Stage = "soft"
    top_k: int = 3
    gate_init: float | Literal["kaiming"] = "kaiming"

    def __post_init__(self) -> None:
        check_choice("stage", self.stage, ("hard", "soft"))

    def build(self, in_features: int, num_experts: int) -> Router:
        return StagedRouter(self, in_features, num_experts)


class StagedRouter(GatedRouter):
    """One linear gate, unused in the hard stage. `stage` may be switched on a running mixture."""

    def __init__(self, config: StagedConfig, in_features: int, num_experts: int):
        check_top_k(config.top_k, num_experts)
        super().__init__(num_experts)
        self.config = config
        self.stage: Stage = config.stage
        self.gate = Gate(in_features, num_experts, config.gate_init)

    @property
    def num_tasks(self) -> int | None:
        return self.num_experts if self.stage == "hard" else None

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        if self.stage == "hard":
            ids_TK = self.task_ids(ctx)[:, None]
            dtype = torch.promote_types(x.dtype, torch.float32)
            return Routing(ids_TK, torch.ones_like(ids_TK, dtype=dtype), None, self.num_experts)
        logits_TE = self.gate(x)
        probs_TE = logits_TE.softmax(-1)
        if self.training:
            return dense_routing(probs_TE, logits_TE)
        weights_TK, ids_TK = probs_TE.topk(self.config.top_k, dim=-1)
        return Routing(ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True), logits_TE, self.num_experts)
