"""Magnitude pruning: each adapter's largest entries, then the weighted sum (PEFT's "magnitude_prune").

Trimmed tensor by tensor: ⌊density · K⌋ of K entries stay.
"""

from dataclasses import dataclass

from torch import Tensor

from molex.checks import check_range
from molex.merging.base import rules
from molex.merging.elementwise import ElementwiseRule
from molex.merging.sparsity import trim, weighted_sum


@rules.register("magnitude")
@dataclass(frozen=True, kw_only=True)
class MagnitudeRule(ElementwiseRule):
    """density: the share of entries kept."""

    density: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density, 0, 1)

    def combine(self, tensors: Tensor, weights: Tensor) -> Tensor:
        return weighted_sum(trim(tensors, self.density), weights)
