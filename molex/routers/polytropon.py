"""Poly and MHR: each task learns which skills it is made of (Poly arXiv 2202.13914, MHR arXiv 2211.03831).

    z = logits[task] (heads, skills);   training: z ← RelaxedBernoulli(z, τ = 1);   evaluation: z ← sigmoid(z)
    w = z / (Σ_skills z + 1e-12), per head

`relaxed=False` uses the sigmoid in training too, as the authors' released configurations do. Poly is one head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molex.errors import ConfigError
from molex.routers.base import Router, RouterConfig, routers
from molex.routing import RouteContext, Routing, dense_routing


@routers.register("polytropon")
@dataclass(frozen=True, kw_only=True)
class PolytroponConfig(RouterConfig):
    """num_tasks: rows of the table. num_heads must agree with the experts' (the preset sets both)."""

    num_tasks: int = 1
    num_heads: int = 1
    relaxed: bool = True

    def __post_init__(self) -> None:
        if self.num_tasks < 1 or self.num_heads < 1:
            raise ConfigError(f"num_tasks={self.num_tasks} and num_heads={self.num_heads} must be at least 1")

    def build(self, in_features: int, num_experts: int) -> Router:
        return PolytroponRouter(self, num_experts)


class PolytroponRouter(Router):
    """task_logits (tasks, heads · E), U(±1e-3) at the start. Routes over heads · E entries, head-major."""

    def __init__(self, config: PolytroponConfig, num_experts: int):
        super().__init__(config.num_heads * num_experts)
        self.config = config
        self.task_logits = nn.Parameter(torch.empty(config.num_tasks, self.num_experts).uniform_(-1e-3, 1e-3))

    @property
    def num_tasks(self) -> int:
        return self.config.num_tasks

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        tasks_T = self.task_ids(ctx)
        logits_TE = self.task_logits.to(torch.promote_types(x.dtype, torch.float32))[tasks_T]
        noisy = self.training and self.config.relaxed
        scores_TE = (logits_TE + _logistic_noise(logits_TE, ctx)).sigmoid() if noisy else logits_TE.sigmoid()
        scores_THE = scores_TE.unflatten(-1, (self.config.num_heads, -1))
        weights_THE = scores_THE / (scores_THE.sum(-1, keepdim=True) + 1e-12)
        return dense_routing(weights_THE.flatten(1), logits_TE)


def _logistic_noise(logits: Tensor, ctx: RouteContext) -> Tensor:
    """What makes a sigmoid a relaxed Bernoulli draw: (T, E), one draw per sequence, which its tokens share."""
    sequence_T = ctx.sequence_of_token(logits.device)
    num_draws = logits.shape[0] if ctx.segment_ids is not None else ctx.shape[0]
    uniform_BE = torch.rand(num_draws, logits.shape[1], device=logits.device, dtype=logits.dtype)
    uniform_BE = uniform_BE.clamp(1e-6, 1 - 1e-6)
    return (uniform_BE.log() - (-uniform_BE).log1p())[sequence_T]
