"""MTLoRA: the token's task chooses its expert (CVPR 2024).

    mode "sum"     y = base(x) + s_0 B_0 A_0 x + s_t B_t A_t x     expert 0 is shared, expert 1 + t belongs to task t
    mode "matrix"  y = base(x) + s_t B_t A_t x                     a token with task id 0 uses the shared expert alone

The released vision code has one stream per task and calls these "matrixv2" and "matrix" (its default); a language
model has one stream, so "sum" is the default here. In mode "matrix" tasks count from 0 = shared.
Not mtLoRA (arXiv 2603.01526).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molex.checks import check_choice
from molex.errors import ConfigError
from molex.routers.base import Router, RouterConfig, routers
from molex.routing import RouteContext, Routing


@routers.register("task")
@dataclass(frozen=True, kw_only=True)
class TaskConfig(RouterConfig):
    """See the module's text."""

    mode: Literal["sum", "matrix"] = "sum"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("sum", "matrix"))

    def build(self, in_features: int, num_experts: int) -> Router:
        return TaskRouter(self, num_experts)


class TaskRouter(Router):
    """No parameters; task ids come with the tokens."""

    growable = True

    def __init__(self, config: TaskConfig, num_experts: int):
        if config.mode == "sum" and num_experts < 2:
            raise ConfigError("mtlora needs a shared expert and at least one task: num_experts >= 2")
        super().__init__(num_experts)
        self.config = config

    @property
    def num_tasks(self) -> int:
        return self.num_experts - (self.config.mode == "sum")

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        if self.config.mode == "sum":
            own_T = 1 + self.task_ids(ctx)
            ids_TK = torch.stack([torch.zeros_like(own_T), own_T], dim=1)
        else:
            ids_TK = self.task_ids(ctx)[:, None]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return Routing(ids_TK, torch.ones_like(ids_TK, dtype=dtype), None, self.num_experts)
