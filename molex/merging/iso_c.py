"""Iso-C (arXiv 2502.04959): the sum of the updates, all its singular values set to their mean.

    Σ w_i s_i B_i A_i = L diag(σ) Rᵀ   ->   mean(σ) L Rᵀ

In core space, over the range alone: a full (O, D) update of low rank has arbitrary directions beyond its range, which
its own SVD would raise to the mean too. Weights that are not given are 1, as in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from molex.experts import LoRA
from molex.merging.base import MergeRule, rules
from molex.merging.core import Core, above_zero


@rules.register("iso_c")
@dataclass(frozen=True, kw_only=True)
class IsoCRule(MergeRule):
    """Nothing to set."""

    averages: ClassVar[bool] = False

    def merge(self, loras: Sequence[LoRA], weights: Sequence[float], layer: str = "") -> LoRA:
        core = Core.of(loras)
        merged_PQ = core.sum(weights)
        left_PR, values_R, right_RQ = torch.linalg.svd(merged_PQ, full_matrices=False)
        kept = above_zero(values_R, max(merged_PQ.shape, default=0))
        if not kept.any():
            return core.lora(merged_PQ)
        return core.lora(values_R[kept].mean() * left_PR[:, kept] @ right_RQ[kept])
