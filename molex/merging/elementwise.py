"""Rules that act entry by entry, on the core matrices or on A and B apart.

space "core"     entries of M_i = Uᵀ s_i B_i A_i V, so that the result does not depend on how a LoRA is factored
space "factors"  entries of A_i and of B_i, weighted by √|w_i s_i| each and the sign on A: PEFT's variants without
                 "_svd". The product then holds cross terms B_i A_j; ranks must agree
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molex.checks import check_choice
from molex.errors import ConfigError
from molex.experts import LoRA
from molex.merging.base import MergeRule
from molex.merging.core import Core, result_dtype

Space = Literal["core", "factors"]
Combine = Callable[[Tensor, Tensor], Tensor]  # (N, ...), weights (N,) -> (...)


@dataclass(frozen=True, kw_only=True)
class ElementwiseRule(MergeRule):
    """See the module's text."""

    space: Space = "core"

    def __post_init__(self) -> None:
        check_choice("space", self.space, ("core", "factors"))

    @abstractmethod
    def combine(self, tensors: Tensor, weights: Tensor) -> Tensor:
        """One tensor of N (N, ...) with weights (N,)."""

    def merge(self, loras: Sequence[LoRA], weights: Sequence[float], layer: str = "") -> LoRA:
        return merge_entries(self.combine, self.space, loras, weights)


def merge_entries(combine: Combine, space: Space, loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """Applies `combine` to the core matrices, or to A and then to B."""
    if space == "core":
        core = Core.of(loras)
        return core.lora(combine(core.cores, core.cores.new_tensor(weights)))
    A_NRD, B_NOR = stacked_factors(loras)
    signed_N = A_NRD.new_tensor([weight * lora.scale for weight, lora in zip(weights, loras, strict=True)])
    root_N = signed_N.abs().sqrt()
    A_RD, B_OR = combine(A_NRD, torch.where(signed_N < 0, -root_N, root_N)), combine(B_NOR, root_N)
    dtype = result_dtype(loras)
    return LoRA(A_RD.to(dtype), B_OR.to(dtype), 1.0)


def stacked_factors(loras: Sequence[LoRA]) -> tuple[Tensor, Tensor]:
    """A (N, R, D) and B (N, O, R), float64. Raises ConfigError where ranks differ."""
    ranks = sorted({lora.A.shape[0] for lora in loras})
    if len(ranks) > 1:
        raise ConfigError(f"space='factors' takes LoRAs of one rank, these have {ranks}; use space='core'")
    return torch.stack([lora.A.double() for lora in loras]), torch.stack([lora.B.double() for lora in loras])
