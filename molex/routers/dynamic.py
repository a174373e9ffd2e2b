"""DynMoLE: how many experts a token gets depends on how uncertain its router is (arXiv 2504.00661).

    p = softmax(W x);   H = Tsallis entropy of p, normalised to [0, 1]
    H > threshold: all experts.   Otherwise: the largest p whose running sum stays within top_p, at least keep_top_k.
    weights = p on the kept experts, not renormalised

The expert that crosses top_p is left out (nucleus sampling keeps it). The paper text was not available to us; this
follows the authors' released code, whose test vectors it reproduces.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from molex.entropy import check_entropy_index, normalised_entropy
from molex.errors import ConfigError
from molex.routers.base import Gate, GatedRouter, Router, RouterConfig, check_top_k, routers
from molex.routing import RouteContext, Routing


@routers.register("dynamic")
@dataclass(frozen=True, kw_only=True)
class DynamicConfig(RouterConfig):
    """entropy_threshold in [0, 1]: 1 never routes softly. entropy_index q: 1 is Shannon's entropy."""

    entropy_threshold: float = 0.9
    entropy_index: float = 1.1
    top_p: float = 0.75
    keep_top_k: int = 2
    gate_init: float | Literal["kaiming"] = "kaiming"

    def __post_init__(self) -> None:
        check_entropy_index("entropy_index", self.entropy_index)
        if not (0 <= self.entropy_threshold <= 1 and 0 <= self.top_p <= 1):
            raise ConfigError(f"entropy_threshold={self.entropy_threshold} and top_p={self.top_p} are shares in [0, 1]")

    def build(self, in_features: int, num_experts: int) -> Router:
        return DynamicRouter(self, in_features, num_experts)


class DynamicRouter(GatedRouter):
    """One linear gate; K == E slots, the dropped ones nobody's."""

    def __init__(self, config: DynamicConfig, in_features: int, num_experts: int):
        check_top_k(config.keep_top_k, num_experts)
        super().__init__(num_experts)
        self.config = config
        self.gate = Gate(in_features, num_experts, config.gate_init)

    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x)
        probs_TK, ids_TK = logits_TE.softmax(-1).sort(-1, descending=True)
        kept_TK = probs_TK.cumsum(-1) <= self.config.top_p
        kept_TK[:, : self.config.keep_top_k] = True
        if self.config.entropy_threshold < 1:
            entropy_T = normalised_entropy(probs_TK, self.config.entropy_index)
            kept_TK = kept_TK | (entropy_T > self.config.entropy_threshold)[:, None]
        return Routing(ids_TK.where(kept_TK, -1), probs_TK * kept_TK, logits_TE, self.num_experts)
