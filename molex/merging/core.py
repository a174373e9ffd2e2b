"""Core space: the LoRAs of one linear as small matrices over two shared bases, without loss (arXiv 2509.17786).

    U (O, P) spans all B_i,   V (D, Q) spans all A_iᵀ,   M_i = Uᵀ (s_i B_i A_i) V  (P, Q),   s_i B_i A_i = U M_i Vᵀ

P and Q are at most the sum of the ranks, so that a rule over M_i costs next to nothing, and the dense (O, D) update is
never formed. The bases are left singular vectors of the factors side by side, as the paper has it: rotating an
expert's ranks, A -> R A, B -> B Rᵀ, changes nothing. Everything is float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molex.checks import check_range
from molex.errors import ConfigError
from molex.experts import LoRA


class Core(NamedTuple):
    """U and V have orthonormal columns; none where every LoRA is zero. dtype: what results are given in."""

    U: Tensor  # (O, P)
    V: Tensor  # (D, Q)
    cores: Tensor  # (N, P, Q)
    dtype: torch.dtype

    @classmethod
    def of(cls, loras: Sequence[LoRA]) -> "Core":
        alive = [lora.A.any(1) & lora.B.any(0) for lora in loras]  # a rank that adds nothing must not turn the bases
        U_OP = basis(torch.cat([lora.B[:, own].double() for lora, own in zip(loras, alive, strict=True)], dim=1))
        V_DQ = basis(torch.cat([lora.A[own].double() for lora, own in zip(loras, alive, strict=True)]).T)
        cores = [lora.scale * (U_OP.T @ lora.B.double()) @ (lora.A.double() @ V_DQ) for lora in loras]
        return cls(U_OP, V_DQ, torch.stack(cores), result_dtype(loras))

    def sum(self, weights: Sequence[float]) -> Tensor:
        """Σ w_i M_i (P, Q)."""
        return torch.einsum("n,npq->pq", self.cores.new_tensor(weights), self.cores)

    def lora(self, core: Tensor, rank: int | None = None) -> LoRA:
        """U M Vᵀ as a LoRA, its singular values shared between A and B; of the `rank` largest, or of all above zero."""
        left_PR, values_R, right_RQ = torch.linalg.svd(core, full_matrices=False)
        kept = above_zero(values_R, max(core.shape, default=0))[:rank]
        if not kept.any():
            return zero_lora(self.V.shape[0], self.U.shape[0], 1, self.dtype, self.U.device)
        kept = kept.nonzero()[:, 0]
        root_R = values_R[kept].sqrt()
        A_RD = root_R[:, None] * (right_RQ[kept] @ self.V.T)
        B_OR = (self.U @ left_PR[:, kept]) * root_R
        return LoRA(A_RD.to(self.dtype), B_OR.to(self.dtype), 1.0)


def basis(columns: Tensor) -> Tensor:
    """An orthonormal basis (O, P) of the span of columns (O, C), by falling share; P is their numerical rank."""
    Q_OC, R_CC = torch.linalg.qr(columns)
    left_CC, values_C, _ = torch.linalg.svd(R_CC, full_matrices=False)
    return Q_OC @ left_CC[:, above_zero(values_C, max(columns.shape))]


def above_zero(values: Tensor, size: int) -> Tensor:
    """Which singular values of a float64 matrix of this size are more than rounding."""
    largest = values.max() if len(values) else values.new_zeros(())
    return (values > largest * size * torch.finfo(torch.float64).eps) & (values > 0)


def result_dtype(loras: Sequence[LoRA]) -> torch.dtype:
    """float32, or wider where one of the factors is."""
    dtype = torch.float32
    for lora in loras:
        dtype = torch.promote_types(torch.promote_types(dtype, lora.A.dtype), lora.B.dtype)
    return dtype


def zero_lora(
    in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device | None = None
) -> LoRA:
    """What an adapter is in a linear that it does not change."""
    A_RD = torch.zeros(rank, in_features, dtype=dtype, device=device)
    return LoRA(A_RD, torch.zeros(out_features, rank, dtype=dtype, device=device), 1.0)


def norm(lora: LoRA) -> float:
    """‖s B A‖ (Frobenius), from the factors."""
    return float(Core.of([lora]).cores.norm())


def distance(lora: LoRA, other: LoRA) -> float:
    """‖s B A − s' B' A'‖ (Frobenius), from the factors."""
    return float(Core.of([lora, other]).sum([1, -1]).norm())


def check_size(rank: int | None, energy: float | None) -> None:
    """Raises ConfigError unless at most one of the two is given, and within its range."""
    if rank is not None and energy is not None:
        raise ConfigError(f"rank={rank} and energy={energy} both say how much to keep; give one")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"rank={rank!r}; give a whole number of at least 1")
    if energy is not None:
        if isinstance(energy, bool) or not isinstance(energy, int | float):
            raise ConfigError(f"energy={energy!r}; give a number above 0, at most 1")
        check_range("energy", energy, 1e-12, 1)


def truncate(lora: LoRA, rank: int | None = None, energy: float | None = None) -> tuple[LoRA, float]:
    """The nearest LoRA of lower rank, and its relative Frobenius error, both from core space.

    rank: the largest there may be. energy: the share of the squared norm to keep, with as few ranks as that takes.
    Without either the LoRA is returned as it is. Raises ConfigError as `check_size` does.
    """
    check_size(rank, energy)
    if rank is None and energy is None:
        return lora, 0.0
    core = Core.of([lora])
    squared = torch.linalg.svdvals(core.cores[0]).square()
    total = float(squared.sum())
    if total == 0:
        return core.lora(core.cores[0]), 0.0
    if energy is not None:
        lost = total - squared.cumsum(0)
        rank = 1 + int((lost > (1 - energy + 1e-12) * total).sum())
    return core.lora(core.cores[0], rank), float(squared[rank:].sum() / total) ** 0.5
