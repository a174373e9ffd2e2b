"""LoRA-LEGO (arXiv 2409.16167): take all experts apart into single ranks, cluster them, keep one of each cluster.

    unit (i, j) = √|w_i s_i| [A_i[j, :], ± B_i[:, j]]      k clusters of units, centroids μ_c
    μ_c <- μ_c · mean_{u in c} ‖u‖_∞ / ‖μ_c‖_∞             (reweight_units: centroids are shorter than their units)
    B A <- √(r / k) B A                                    (reweight_output: variance grows with k)

The order of ranks does not matter. With a cluster for each unit and no reweighting it is the sum of the updates, so
weights that are not given are 1. r is the source rank; where sources differ, which one is not published: here it is
their mean. Units of zero are left out. No code of the authors is known: two re-implementations agree on the above.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from molex.errors import ConfigError
from molex.experts import LoRA
from molex.merging.base import MergeRule, generator_of, rules
from molex.merging.cat import split_scale
from molex.merging.clusters import k_means
from molex.merging.core import result_dtype, zero_lora


@rules.register("lego")
@dataclass(frozen=True, kw_only=True)
class LegoRule(MergeRule):
    """rank: k, by default the sources' mean rank. starts: seeded starts of k-means, the best of which counts."""

    averages: ClassVar[bool] = False
    rank: int | None = None
    reweight_units: bool = True
    reweight_output: bool = True
    starts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rank is not None and self.rank < 1) or self.starts < 1:
            raise ConfigError(f"rank={self.rank}, starts={self.starts}: whole numbers of at least 1")

    def merge(self, loras: Sequence[LoRA], weights: Sequence[float], layer: str = "") -> LoRA:
        num_in, num_out, dtype = loras[0].A.shape[1], loras[0].B.shape[0], result_dtype(loras)
        source_ranks = [lora.A.shape[0] for lora in loras if lora.A.any() and lora.B.any()]
        units_UF = torch.cat([_units(lora, weight) for lora, weight in zip(loras, weights, strict=True)])
        if not len(units_UF):
            return zero_lora(num_in, num_out, 1, dtype, loras[0].A.device)
        mean_rank = fmean(source_ranks)
        rank = min(self.rank or round(mean_rank), len(units_UF))
        centroids_KF = self._centroids(units_UF, rank, layer)
        if self.reweight_output:
            centroids_KF = centroids_KF * (mean_rank / rank) ** 0.25  # on both halves, so √(r / k) on B A
        A_KD, B_KO = centroids_KF.split((num_in, num_out), dim=1)
        return LoRA(A_KD.to(dtype), B_KO.T.to(dtype), 1.0)

    def _centroids(self, units: Tensor, rank: int, layer: str) -> Tensor:
        """The centroids (K, F) of units (U, F), reweighted."""
        cluster_U = k_means(units, rank, generator_of(self.seed, layer), self.starts)
        centroids_KF = torch.stack([units[cluster_U == cluster].mean(0) for cluster in range(rank)])
        if not self.reweight_units:
            return centroids_KF
        longest_U = units.abs().amax(1)
        lengths_K = torch.stack([longest_U[cluster_U == cluster].mean() for cluster in range(rank)])
        own_K = centroids_KF.abs().amax(1).clamp(min=torch.finfo(units.dtype).tiny)  # opposite units cancel
        return centroids_KF * (lengths_K / own_K)[:, None]


def _units(lora: LoRA, weight: float) -> Tensor:
    """The single ranks (R, D + O) that add something."""
    half = split_scale(lora, weight)
    units_RF = torch.cat([half.A, half.B.T], dim=1)
    return units_RF[half.A.any(1) & half.B.any(0)]
