"""What the sparse rules are made of: trimming, dropping, electing signs. Tensors hold one adapter each, (N, ...).

trim     keep the ⌊density · K⌋ entries of largest magnitude, of each tensor of K entries
drop     keep each entry with probability density, and divide it by density (DARE, arXiv 2311.03099)
elect    per entry, the sign of the sum of values ("total") or of signs ("frequency"); an even vote is positive
disjoint mean  the mean of those that have the elected sign (TIES, arXiv 2306.01708)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Majority = Literal["total", "frequency"]


def trim(tensors: Tensor, density: float) -> Tensor:
    """Each of N tensors trimmed on its own."""
    flat_NK = tensors.flatten(1)
    kept_NJ = flat_NK.abs().topk(int(density * flat_NK.shape[1]), dim=1).indices
    return torch.zeros_like(flat_NK).scatter(1, kept_NJ, flat_NK.gather(1, kept_NJ)).view(tensors.shape)


def cutoff(tensors: Sequence[Tensor], density: float, extra: int = 0) -> float:
    """The magnitude that keeps ⌊density · K⌋ + extra entries of one adapter's tensors taken together."""
    magnitudes_K = torch.cat([tensor.abs().flatten() for tensor in tensors])
    count = min(int(density * len(magnitudes_K)) + extra, len(magnitudes_K))
    if count == 0:
        return torch.inf
    return float(magnitudes_K.kthvalue(len(magnitudes_K) - count + 1).values)


def cut(tensors: Tensor, cutoffs: Sequence[float]) -> Tensor:
    """Each of N tensors without what is smaller than its cutoff."""
    limits_N = tensors.new_tensor(cutoffs)
    return tensors.where(tensors.abs() >= _beside(limits_N, tensors), 0)


def drop(tensors: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that every device drops the same."""
    kept = torch.bernoulli(torch.full(tensors.shape, density), generator=generator)
    return tensors * kept.to(tensors) / density


def weighted_sum(tensors: Tensor, weights: Tensor) -> Tensor:
    """Σ w_i X_i."""
    return (_beside(weights, tensors) * tensors).sum(0)


def disjoint_mean(tensors: Tensor, weights: Tensor, majority: Majority) -> Tensor:
    """The elected sign is that of the unweighted tensors, as in PEFT; what agrees with it is weighted, and averaged
    over how many agree."""
    votes = tensors.sum(0) if majority == "total" else tensors.sign().sum(0)
    agree = tensors.sign() == torch.where(votes >= 0, 1.0, -1.0).to(tensors)
    return (_beside(weights, tensors) * tensors * agree).sum(0) / agree.sum(0).clamp(min=1)


def _beside(weights: Tensor, tensors: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (tensors.dim() - 1))
