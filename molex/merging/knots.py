"""KnOTS (arXiv 2410.19735): align the updates by one SVD, merge what is left of each entry by entry.

    [Δ_1 ... Δ_n] = L diag(σ) [W_1ᵀ ... W_nᵀ]   ->   L · merge(diag(σ) W_1ᵀ, ..., diag(σ) W_nᵀ)

L (O, P) is shared, the aligned parts are (P, D). The SVD is that of [M_1 ... M_n] in core space, P ≤ Σ r_i.
merge is "sum", "ties" or "dare_ties". As in the authors' code, "ties" keeps ⌊density · K⌋ + 1 entries of each adapter,
and counts over all linears together (scope "model"); scope "tensor" counts within each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from molex.checks import check_choice, check_range
from molex.experts import LoRA
from molex.merging.base import Merger, MergeRule, generator_of, rules
from molex.merging.core import Core, above_zero, zero_lora
from molex.merging.sparsity import Majority, cut, cutoff, disjoint_mean, drop, weighted_sum


@rules.register("knots")
@dataclass(frozen=True, kw_only=True)
class KnotsRule(MergeRule):
    """merging: what merges the aligned parts. density, majority, scope, seed: of "ties" and "dare_ties"."""

    merging: Literal["sum", "ties", "dare_ties"] = "ties"
    density: float = 0.3
    majority: Majority = "total"
    scope: Literal["tensor", "model"] = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("merging", self.merging, ("sum", "ties", "dare_ties"))
        check_choice("majority", self.majority, ("total", "frequency"))
        check_choice("scope", self.scope, ("tensor", "model"))
        check_range("density", self.density, 1e-6, 1)

    def default_weights(self, num_loras: int) -> tuple[float, ...]:
        return (1 / num_loras if self.merging == "sum" else 1.0,) * num_loras

    def merge(self, loras: Sequence[LoRA], weights: Sequence[float], layer: str = "") -> LoRA:
        return self._merge(loras, weights, layer, None)

    def over(self, layers: Mapping[str, Sequence[LoRA]]) -> Merger:
        if self.merging != "ties" or self.scope == "tensor" or not layers:
            return self.merge
        parts = [aligned(Core.of(loras))[1] for loras in layers.values()]
        return partial(self._merge, cutoffs=[cutoff(own, self.density, 1) for own in zip(*parts, strict=True)])

    def _merge(
        self, loras: Sequence[LoRA], weights: Sequence[float], layer: str, cutoffs: Sequence[float] | None
    ) -> LoRA:
        core = Core.of(loras)
        shared_OP, parts_NPD = aligned(core)
        if shared_OP.shape[1] == 0:
            return zero_lora(core.V.shape[0], core.U.shape[0], 1, core.dtype, core.U.device)
        if self.merging == "ties":
            own = [cutoff([part], self.density, 1) for part in parts_NPD] if cutoffs is None else cutoffs
            parts_NPD = cut(parts_NPD, own)
        elif self.merging == "dare_ties":
            parts_NPD = drop(parts_NPD, self.density, generator_of(self.seed, layer))
        weights_N = parts_NPD.new_tensor(weights)
        if self.merging == "sum":
            merged_PD = weighted_sum(parts_NPD, weights_N)
        else:
            merged_PD = disjoint_mean(parts_NPD, weights_N, self.majority)
        return LoRA(merged_PD.to(core.dtype), shared_OP.to(core.dtype), 1.0)


def aligned(core: Core) -> tuple[Tensor, Tensor]:
    """The shared directions (O, P), and each LoRA's part over them (N, P, D)."""
    side_by_side = core.cores.movedim(0, 1).flatten(1)  # [M_1 ... M_n] (P, N Q)
    left_PR, values_R, right_RC = torch.linalg.svd(side_by_side, full_matrices=False)
    kept = above_zero(values_R, max(side_by_side.shape, default=0))
    parts_RNQ = (values_R[kept, None] * right_RC[kept]).unflatten(1, (len(core.cores), -1))
    return core.U @ left_PR[:, kept], parts_RNQ.movedim(1, 0) @ core.V.T
