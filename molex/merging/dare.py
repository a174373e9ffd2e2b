"""DARE (arXiv 2311.03099): drop entries at random, rescale what stays, then sum.

    X = Σ w_i m_i ⊙ X_i / density,   m_i ~ Bernoulli(density)

The masks of a linear come from the seed and its name, so they do not depend on what else is merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from molex.checks import check_range
from molex.experts import LoRA
from molex.merging.base import generator_of, rules
from molex.merging.elementwise import ElementwiseRule, merge_entries
from molex.merging.sparsity import drop, weighted_sum


@rules.register("dare")
@dataclass(frozen=True, kw_only=True)
class DareRule(ElementwiseRule):
    """density: the share of entries kept."""

    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density, 1e-6, 1)

    def merge(self, loras: Sequence[LoRA], weights: Sequence[float], layer: str = "") -> LoRA:
        generator = generator_of(self.seed, layer)

        def combine(tensors: Tensor, weights_N: Tensor) -> Tensor:
            return self.combine(drop(tensors, self.density, generator), weights_N)

        return merge_entries(combine, self.space, loras, weights)

    def combine(self, tensors: Tensor, weights: Tensor) -> Tensor:
        return weighted_sum(tensors, weights)
