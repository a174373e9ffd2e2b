"""HydraLoRA's experts: one A for all, a B each:  s · B_e A x  (arXiv 2404.19245).

Every expert's column r reads row r of the shared A, so the layer computes A x once, in the same kernels. The paper's
code computes it once per expert with dropout masks of their own; equal in expectation, identical in evaluation.
"""

from dataclasses import dataclass

import torch

from molex.errors import ConfigError
from molex.experts.base import ExpertBank, ExpertsConfig, LayerShape, LoRA, expert_kinds
from molex.experts.lora import LoRABank


@expert_kinds.register("shared_a")
@dataclass(frozen=True, kw_only=True)
class SharedAConfig(ExpertsConfig):
    """One A row per rank, shared by all experts."""

    def build(self, shape: LayerShape) -> ExpertBank:
        return SharedABank(shape)


class SharedABank(LoRABank):
    """lora_A (R, D), lora_B (O, E·R)."""

    def __init__(self, shape: LayerShape):
        if len(set(shape.ranks)) > 1:
            raise ConfigError(f"experts that share A need one rank, got {shape.ranks}")
        super().__init__(shape)
        self.row_of_column = torch.arange(sum(self.ranks), device=shape.device) % self.ranks[0]

    def check_expert(self, expert_id: int, lora: LoRA) -> None:
        raise ConfigError("these experts share one A, a pretrained LoRA has its own: load it into experts='lora'")

    def _rows(self) -> int:
        return self.ranks[0]
