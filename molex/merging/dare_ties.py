"""DARE's random dropping before TIES' election of signs (as PEFT and mergekit have it).

X̂_i = m_i ⊙ X_i / density;   X = mean of w_i X̂_i over those whose sign is that of Σ_i X̂_i
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from molex.checks import check_choice
from molex.merging.base import rules
from molex.merging.dare import DareRule
from molex.merging.sparsity import Majority, disjoint_mean


@rules.register("dare_ties")
@dataclass(frozen=True, kw_only=True)
class DareTiesRule(DareRule):
    """majority: what elects the sign, values or signs."""

    averages: ClassVar[bool] = False
    majority: Majority = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("majority", self.majority, ("total", "frequency"))

    def combine(self, tensors: Tensor, weights: Tensor) -> Tensor:
        return disjoint_mean(tensors, weights, self.majority)
