"""Random LoRAs of one linear, and the dense float64 formulas that rules are compared with, written from the papers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from molex.experts import LoRA

IN, OUT = 14, 11


def random_lora(rank: int = 3, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    A_RD = torch.randn(rank, IN, generator=generator, dtype=torch.float64)
    return LoRA(A_RD.to(dtype), torch.randn(OUT, rank, generator=generator, dtype=torch.float64).to(dtype), scale)


def some(ranks: Sequence[int] = (2, 3, 1)) -> list[LoRA]:
    return [random_lora(rank, seed, 0.5 + seed) for seed, rank in enumerate(ranks)]


def dense(lora: LoRA) -> Tensor:
    """s B A (O, D) in float64."""
    return lora.scale * lora.B.double() @ lora.A.double()


def trimmed(X: Tensor, count: int) -> Tensor:
    """The `count` entries of largest magnitude."""
    order = sorted(range(X.numel()), key=lambda i: -abs(float(X.flatten()[i])))
    kept = torch.zeros(X.numel(), dtype=X.dtype)
    for i in order[:count]:
        kept[i] = X.flatten()[i]
    return kept.view(X.shape)


def ties_of(parts: Sequence[Tensor], weights: Sequence[float], frequency: bool = False) -> Tensor:
    """TIES after trimming, entry by entry."""
    out = torch.zeros_like(parts[0]).flatten()
    for j in range(out.numel()):
        values = [float(part.flatten()[j]) for part in parts]
        votes = sum((v > 0) - (v < 0) for v in values) if frequency else sum(values)
        sign = 1 if votes >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        out[j] = sum(agreeing) / max(len(agreeing), 1)
    return out.view(parts[0].shape)


def core_bases(loras: Sequence[LoRA]) -> tuple[Tensor, Tensor]:
    """U (O, P) and V (D, Q): left singular vectors of the factors side by side, by one dense SVD each."""
    B, A = torch.cat([lora.B.double() for lora in loras], 1), torch.cat([lora.A.double() for lora in loras])
    U, s, _ = torch.linalg.svd(B, full_matrices=False)
    V, t, _ = torch.linalg.svd(A.T, full_matrices=False)
    return U[:, s > 1e-10], V[:, t > 1e-10]
