"""Concatenation: the weighted sum exactly, factors side by side, rank Σ r_i (FLoRA, arXiv 2409.05976; PEFT's "cat").

A = [√|w_i s_i| A_i] over the rows,   B = [± √|w_i s_i| B_i] over the columns
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from molex.experts import LoRA
from molex.merging.base import MergeRule, rules
from molex.merging.core import result_dtype


@rules.register("cat")
@dataclass(frozen=True, kw_only=True)
class CatRule(MergeRule):
    """Nothing to set."""

    def merge(self, loras: Sequence[LoRA], weights: Sequence[float], layer: str = "") -> LoRA:
        halves = [split_scale(lora, weight) for lora, weight in zip(loras, weights, strict=True)]
        dtype = result_dtype(loras)
        A_CD, B_OC = torch.cat([half.A for half in halves]), torch.cat([half.B for half in halves], dim=1)
        return LoRA(A_CD.to(dtype), B_OC.to(dtype), 1.0)


def split_scale(lora: LoRA, weight: float = 1.0) -> LoRA:
    """The same update, float64, with weight and scale shared evenly by A and B; a negative sign goes to B."""
    factor = weight * lora.scale
    root = abs(factor) ** 0.5
    return LoRA(root * lora.A.double(), (-root if factor < 0 else root) * lora.B.double(), 1.0)
