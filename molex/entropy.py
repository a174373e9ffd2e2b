"""How evenly something is spread: a router's probabilities, or the load of the experts."""

import math

import torch
from torch import Tensor

from molex.errors import ConfigError


def shannon_entropy(shares: Tensor) -> Tensor:
    """−Σ p log p of shares (E,) that sum to 1, float64; an expert without a share adds nothing."""
    return -(shares * shares.clamp(min=1e-300).log()).sum()


def normalised_entropy(probs: Tensor, q: float, eps: float = 1e-5) -> Tensor:
    """Tsallis entropy of probs (..., E) over its maximum, so in [0, 1]; q = 1 is Shannon's.

    S_q = (1 − Σ (p + eps)^q) / (q − 1),   S_max = (1 − E^(1−q)) / (q − 1)
    """
    num_experts = probs.shape[-1]
    if num_experts == 1:
        return torch.zeros_like(probs[..., 0])
    shifted = probs + eps
    if q == 1:
        return -(shifted * shifted.log()).sum(-1) / math.log(num_experts)
    return (1 - shifted.pow(q).sum(-1)) / (1 - num_experts ** (1 - q))


def check_entropy_index(name: str, q: float) -> None:
    """Raises ConfigError unless 0 < q <= 2. Beside q = 1 the entropy's eps, divided by q − 1, would be all there is."""
    if not 0 < q <= 2 or 0 < abs(q - 1) < 0.01:
        raise ConfigError(f"{name}={q} must be above 0 and at most 2, and 1 itself or 0.01 away from it")
