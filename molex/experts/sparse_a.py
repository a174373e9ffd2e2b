"""FlyLoRA's experts: rank-1, A frozen and sparse, B trained:  s · b_e (a_e · x)  (arXiv 2510.08396).

Each row of A has exactly D // (E / k) non-zeros at random columns, drawn from N(0, 1/E²), E = the total rank, k = the
number of experts a token uses. A random sparse projection nearly preserves distances, so A x both feeds
the experts and routes (the router reads the activations), and nothing but B is trained.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from molex.errors import ConfigError
from molex.experts.base import ExpertBank, ExpertsConfig, LayerShape, expert_kinds
from molex.experts.lora import LoRABank


@expert_kinds.register("sparse_a")
@dataclass(frozen=True, kw_only=True)
class SparseAConfig(ExpertsConfig):
    """density: share of non-zeros in a row of A; the paper's is k / E = 8 / 32."""

    density: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density}: a share of non-zeros, above 0 and at most 1")

    def build(self, shape: LayerShape) -> ExpertBank:
        return SparseABank(shape, self.density)


class SparseABank(LoRABank):
    """lora_A (C, D) frozen, lora_B (O, C) trained."""

    def __init__(self, shape: LayerShape, density: float):
        self.density = density
        super().__init__(shape)
        self.lora_A.requires_grad_(False)

    @torch.no_grad()
    def reset_A(self) -> None:
        num_rows, num_in = self.lora_A.shape
        kept = max(1, int(self.density * num_in + 1e-9))
        columns = torch.rand(num_rows, num_in, device=self.lora_A.device).topk(kept, dim=1).indices
        values: Tensor = torch.randn(num_rows, kept, device=self.lora_A.device) / num_rows
        self.lora_A.zero_().scatter_(1, columns, values.to(self.lora_A.dtype))
