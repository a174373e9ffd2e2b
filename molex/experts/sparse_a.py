"""FlyLoRA's experts: rank-1, A frozen and sparse, B trained:  s · b_e (a_e · x)  (arXiv 2510.08396).

Each row of A has exactly D // (E / k) non-zeros at random columns, drawn from N(0, 1/E²), E = the total rank, k = the
number of experts a token uses. A random sparse projection nearly preserves distances, so A x both feeds
the experts and routes (the router reads the activations), and nothing but B is trained.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from molex.checks import check_range
from molex.errors import ConfigError
from molex.experts.base import ExpertBank, ExpertsConfig, LayerShape, expert_kinds
from molex.experts.lora import LoRABank


@expert_kinds.register("sparse_a")
@dataclass(frozen=True, kw_only=True)
class SparseAConfig(ExpertsConfig):
    """top_k: how many experts a token uses, which sets how sparse A is; the router has a setting of the same name."""

    top_k: int = 8

    def __post_init__(self) -> None:
        check_range("top_k", self.top_k, 1)

    def build(self, shape: LayerShape) -> ExpertBank:
        return SparseABank(shape, self.top_k)


class SparseABank(LoRABank):
    """lora_A (C, D) frozen, lora_B (O, C) trained."""

    def __init__(self, shape: LayerShape, top_k: int):
        if top_k > len(shape.ranks):
            raise ConfigError(f"top_k={top_k} of {len(shape.ranks)} experts; A has D · top_k / E non-zeros in a row")
        self.top_k = top_k
        super().__init__(shape)
        self.lora_A.requires_grad_(False)

    @torch.no_grad()
    def reset_A(self) -> None:
        num_rows, num_in = self.lora_A.shape
        kept = max(1, num_in * self.top_k // num_rows)
        columns = torch.rand(num_rows, num_in, device=self.lora_A.device).topk(kept, dim=1).indices
        values: Tensor = torch.randn(num_rows, kept, device=self.lora_A.device) / num_rows
        self.lora_A.zero_().scatter_(1, columns, values.to(self.lora_A.dtype))
