"""Poly and MHR: each task learns which skills it is made of (Poly arXiv 2202.13914, MHR arXiv 2211.03831).

    z = logits[task] (heads, skills);   training: z ← RelaxedBernoulli(z, τ = 1);   evaluation: z ← sigmoid(z)
    w = z / (Σ_skills z + 1e-12), per head

`relaxed=False` uses the sigmoid in training too, as the authors' released configurations do. Poly is one head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molex.routers.base import Router, RouterConfig, routers
from molex.routing import RouteContext, Routing, dense_routing


@routers.register("polytropon")
@dataclass(frozen=True, kw_only=True)
class PolytroponConfig(RouterConfig):
    """num_tasks: rows of the table. num_heads must agree with the experts' (the preset sets both)."""

    num_tasks: int = 1
    num_heads: int = 1
    relaxed: bool = True

    def build(self, in_features: int, num_experts: int) -> Router:
        return PolytroponRouter(self, num_experts)


class PolytroponRouter(Router):
    """task_logits (tasks, heads · E), U(±1e-3) at the start. Routes over heads · E entries, head-major."""

    needs_tasks = True

    def __init__(self, config: PolytroponConfig, num_experts: int):
        super().__init__(config.num_heads * num_experts)
        self.config = config
        self.task_logits = nn.Parameter(torch.empty(config.num_tasks, self.num_experts).uniform_(-1e-3, 1e-3))

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        tasks_T = self.task_ids(ctx, self.config.num_tasks)
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits_SE = self.task_logits.to(dtype)
        scores_TE = self._sample(logits_SE, tasks_T, ctx) if self.training and self.config.relaxed else None
        if scores_TE is None:
            scores_TE = logits_SE.sigmoid()[tasks_T]
        per_head = scores_TE.unflatten(-1, (self.config.num_heads, -1))
        weights_TE = (per_head / (per_head.sum(-1, keepdim=True) + 1e-12)).flatten(1)
        return dense_routing(weights_TE, logits_SE[tasks_T])

    def _sample(self, logits_SE: Tensor, tasks_T: Tensor, ctx: RouteContext) -> Tensor:
        """One draw per sequence: the tokens of a sequence share their skills."""
        length = ctx.shape[1] if ctx.segment_ids is None else 1
        logits_BE = logits_SE[tasks_T[::length]]
        uniform_BE = torch.rand_like(logits_BE).clamp(1e-6, 1 - 1e-6)
        noise_BE = uniform_BE.log() - (-uniform_BE).log1p()
        return (logits_BE + noise_BE).sigmoid().repeat_interleave(length, dim=0)
