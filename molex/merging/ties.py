"""TIES (arXiv 2306.01708): trim, elect a sign for each entry, average what agrees with it.

    X̂_i = X_i, its largest ⌊density · K⌋ entries;   γ = sgn(Σ_i X̂_i);   X = mean of w_i X̂_i over {i : sgn X̂_i = γ}

scope "tensor" counts K entries in each linear, as PEFT does; "model" in all of an adapter's linears together, as the
paper's code does. Weights that are not given are 1, since the mean divides already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from molex.checks import check_choice, check_range
from molex.experts import LoRA
from molex.merging.base import Merger, rules
from molex.merging.core import Core
from molex.merging.elementwise import ElementwiseRule, merge_entries, stacked_factors
from molex.merging.sparsity import Majority, cut, cutoff, disjoint_mean, trim


@rules.register("ties")
@dataclass(frozen=True, kw_only=True)
class TiesRule(ElementwiseRule):
    """density: the share of entries kept. majority: what elects the sign, values or signs."""

    averages: ClassVar[bool] = False
    density: float = 0.5
    majority: Majority = "total"
    scope: Literal["tensor", "model"] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density, 0, 1)
        check_choice("majority", self.majority, ("total", "frequency"))
        check_choice("scope", self.scope, ("tensor", "model"))

    def combine(self, tensors: Tensor, weights: Tensor) -> Tensor:
        return disjoint_mean(trim(tensors, self.density), weights, self.majority)

    def over(self, layers: Mapping[str, Sequence[LoRA]]) -> Merger:
        if self.scope == "tensor" or not layers:
            return self.merge
        entries = [self._entries(loras) for loras in layers.values()]
        cutoffs = [cutoff(own, self.density) for own in zip(*entries, strict=True)]

        def combine(tensors: Tensor, weights: Tensor) -> Tensor:
            return disjoint_mean(cut(tensors, cutoffs), weights, self.majority)

        return lambda loras, weights, layer: merge_entries(combine, self.space, loras, weights)

    def _entries(self, loras: Sequence[LoRA]) -> list[Tensor]:
        """What of each adapter is trimmed in one linear, flat."""
        if self.space == "core":
            return [*Core.of(loras).cores.flatten(1)]
        return [*torch.cat([factors.flatten(1) for factors in stacked_factors(loras)], dim=1)]
