"""X-LoRA: a head on the model's own last hidden states scales every adapter in every layer (arXiv 2402.07148).

    pass 1   hidden states of the model with the experts off
    head     depth 1: Linear;   deeper: (Linear, ReLU, Dropout) × (depth − 1), Linear;   logits (T, L, E)
    w = softmax(logits / τ);   pass 2   the model with w[:, l] in layer l        (softmax=False: w = logits)

Model scope: it runs before the model (see molex.model_scope) and leaves a Routing for each layer. `layerwise=False`
shares one set of weights between all layers. `top_k` keeps the largest without renormalising; `softmax_top_k` then
takes a softmax over the kept weights, as PEFT does.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex.errors import ConfigError
from molex.routers.base import Router, RouterConfig, check_top_k, routers
from molex.routing import RouteContext, Routing, dense_routing


@routers.register("scalings")
@dataclass(frozen=True, kw_only=True)
class ScalingsConfig(RouterConfig):
    """depth, hidden_size, head_dropout: the head. top_k None = every expert."""

    model_scope: ClassVar[bool] = True

    depth: int = 1
    hidden_size: int = 2048
    head_dropout: float = 0.2
    temperature: float = 1.0
    softmax: bool = True
    layerwise: bool = False
    top_k: int | None = None
    softmax_top_k: bool = False
    global_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.depth < 1 or self.hidden_size < 1 or self.temperature <= 0:
            raise ConfigError(
                f"depth={self.depth} and hidden_size={self.hidden_size} must be at least 1, "
                f"temperature={self.temperature} above 0"
            )
        if not 0 <= self.head_dropout < 1:
            raise ConfigError(f"head_dropout={self.head_dropout} must be in [0, 1)")

    def build(self, in_features: int, num_experts: int) -> Router:
        raise ConfigError("an X-LoRA head is built for a whole model: build_head")

    def build_head(self, in_features: int, num_experts: int, num_layers: int) -> "ScalingsRouter":
        return ScalingsRouter(self, in_features, num_experts, num_layers)


class ScalingsRouter(Router):
    """`head`: Linear layers with bias, PEFT's order of modules."""

    def __init__(self, config: ScalingsConfig, in_features: int, num_experts: int, num_layers: int):
        check_top_k(num_experts if config.top_k is None else config.top_k, num_experts)
        super().__init__(num_experts)
        self.config, self.num_layers = config, num_layers
        num_out = num_experts * (num_layers if config.layerwise else 1)
        sizes = [in_features] + [config.hidden_size] * (config.depth - 1)
        blocks: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            blocks += [_WideLinear(size_in, size_out), nn.ReLU(), nn.Dropout(config.head_dropout)]
        self.head = nn.Sequential(*blocks, _WideLinear(sizes[-1], num_out))

    def rows(self) -> Tensor:
        if len(self.head) > 1:
            raise ConfigError(f"a head of depth {self.config.depth} has no rows to set; use depth=1")
        return self.head[0].get_parameter("weight").unflatten(0, (-1, self.num_experts))

    @torch.no_grad()
    def add_expert(self) -> None:
        last, experts = self.head[-1], self.num_experts
        for name, parameter in list(last.named_parameters()):
            rows = parameter.unflatten(0, (-1, experts))
            wider = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1).flatten(0, 1)
            setattr(last, name, nn.Parameter(wider, parameter.requires_grad))
        self.num_experts += 1

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        """The first layer's routing; `decide` gives all of them."""
        return self.decide(x)[0]

    def decide(self, hidden: Tensor) -> list[Routing]:
        """hidden (T, D) -> a Routing per layer, in the order of mixture.layers."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.head(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
        logits_TLE = logits.unflatten(-1, (-1, self.num_experts)).expand(-1, self.num_layers, -1)
        return [self._route(logits_TE) for logits_TE in logits_TLE.unbind(1)]

    def _route(self, logits_TE: Tensor) -> Routing:
        weights_TE = (logits_TE / self.config.temperature).softmax(-1) if self.config.softmax else logits_TE
        chosen = dense_routing(weights_TE, logits_TE)
        if self.config.top_k is not None:
            weights_TK, ids_TK = weights_TE.topk(self.config.top_k, dim=-1)
            chosen = Routing(ids_TK, weights_TK, logits_TE, self.num_experts)
        weights_TK = _softmax_of_nonzero(chosen.weights) if self.config.softmax_top_k else chosen.weights
        return chosen._replace(weights=weights_TK * self.config.global_weight)


def _softmax_of_nonzero(weights_TK: Tensor) -> Tensor:
    """As in PEFT, a weight of 0 stays 0: a sharp first softmax rounds small weights to it."""
    zero_TK = weights_TK == 0
    lowest = torch.finfo(weights_TK.dtype).min  # -inf would give nan gradients where all are 0
    return weights_TK.masked_fill(zero_TK, lowest).softmax(-1).masked_fill(zero_TK, 0)


class _WideLinear(nn.Linear):
    """Computes in its input's dtype, whatever its own: a 16-bit head still gives float32 logits. A module of its own,
    since ZeRO-3 gathers parameters only while their module's forward runs."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))
