"""RMM, reversible model merging (arXiv 2510.14163): n experts as a mean, p directions and their coefficients, so that
each can be restored. It compresses a library of experts, as a router over them needs; it does not make one expert.

    for each column of A and each row of B, r numbers x_i in each of n experts:
        μ = mean_i x_i;   U_p = the top p left singular vectors of [x_i − μ];   α_i = U_pᵀ (x_i − μ)
        x̂_i = μ + U_p α_i            stored: (p (r + n) + r) / (r n) of the experts

p = 0 is plain averaging of the factors, p = min(r, n − 1) is exact. A reconstruction: the paper's text was not at hand,
this form is what its abstract and its storage formula leave. The error depends on how each expert is factored, which
the experts themselves do not; `align` first turns their ranks towards each other (orthogonal Procrustes, ours).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molex.errors import ConfigError
from molex.experts import LoRA
from molex.merging.cat import split_scale
from molex.merging.core import result_dtype

_ROUNDS = 10


class Half(NamedTuple):
    """One factor of all experts, F = D or O."""

    mean: Tensor  # (F, R)
    directions: Tensor  # (F, R, P)
    coefficients: Tensor  # (F, P, N)

    def restore(self, expert_id: int) -> Tensor:
        """One expert's factor (F, R)."""
        return self.mean + (self.directions @ self.coefficients[:, :, expert_id, None])[..., 0]


class Reversible(NamedTuple):
    """The experts of one linear, compressed. Ranks are those of the largest, scales are folded in."""

    A: Half
    B: Half
    dtype: torch.dtype

    def restore(self, expert_id: int) -> LoRA:
        """One expert. Raises ConfigError on a wrong id."""
        num_experts = self.A.coefficients.shape[-1]
        if not 0 <= expert_id < num_experts:
            raise ConfigError(f"expert {expert_id} of {num_experts}; ids start at 0")
        return LoRA(self.A.restore(expert_id).T.to(self.dtype), self.B.restore(expert_id).to(self.dtype), 1.0)

    @property
    def storage_ratio(self) -> float:
        """Numbers stored, over those of the experts."""
        stored = sum(tensor.numel() for half in (self.A, self.B) for tensor in half)
        num_experts = self.A.coefficients.shape[-1]
        return stored / (num_experts * (self.A.mean.numel() + self.B.mean.numel()))


def compress(loras: Sequence[LoRA], directions: int, *, align: bool = True) -> Reversible:
    """The experts of one linear as mean + `directions` directions; smaller ranks are padded with zeros.

    Raises ConfigError unless 0 <= directions <= min(r, n).
    """
    rank, num_experts = max(lora.A.shape[0] for lora in loras), len(loras)
    if not isinstance(directions, int) or not 0 <= directions <= min(rank, num_experts):
        raise ConfigError(f"directions={directions!r}; from 0 to {min(rank, num_experts)}, where nothing is lost")
    halves = [_padded(split_scale(lora), rank) for lora in loras]
    A_NRD, B_NOR = torch.stack([half.A for half in halves]), torch.stack([half.B for half in halves])
    if align:
        A_NRD, B_NOR = aligned_ranks(A_NRD, B_NOR)
    A_half, B_half = _half(A_NRD.permute(2, 1, 0), directions), _half(B_NOR.permute(1, 2, 0), directions)
    return Reversible(A_half, B_half, result_dtype(loras))


def aligned_ranks(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same experts with rotated ranks, A -> Q A and B -> B Qᵀ, each nearest to the mean of all.

    Every round rotates all towards the mean, then takes the mean anew; its distance never grows.
    """
    mean_A, mean_B = A[0], B[0]
    for _ in range(_ROUNDS):
        left, _, right = torch.linalg.svd(mean_A @ A.mT + mean_B.T @ B)
        Q_NRR = left @ right
        A, B = Q_NRR @ A, B @ Q_NRR.mT
        mean_A, mean_B = A.mean(0), B.mean(0)
    return A, B


def _half(vectors: Tensor, directions: int) -> Half:
    """vectors (F, R, N): the experts' numbers at each row or column."""
    mean_FR1 = vectors.mean(2, keepdim=True)
    left_FRK, _, _ = torch.linalg.svd(vectors - mean_FR1, full_matrices=False)
    directions_FRP = left_FRK[:, :, :directions]
    return Half(mean_FR1[..., 0], directions_FRP, directions_FRP.mT @ (vectors - mean_FR1))


def _padded(lora: LoRA, rank: int) -> LoRA:
    missing = rank - lora.A.shape[0]
    pad = torch.nn.functional.pad
    return LoRA(pad(lora.A, (0, 0, 0, missing)), pad(lora.B, (0, missing)), lora.scale)
