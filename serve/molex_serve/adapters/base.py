"""What an adapter is between disk and device: read, checked against the base, and immutable.

A `Generation` is one content of an alias. Its id is a hash of what was read, so that a reload of the same files is the
same generation, and caches keyed by it never mix two contents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from molex.experts import LoRA
from molex.mixture import Mixture

Kind = Literal["lora", "blend", "mixture", "esft"]


@dataclass(frozen=True, kw_only=True)
class HostAdapter:
    """num_bytes: of its tensors in memory. source: where it came from, for people."""

    kind: Kind
    generation: str
    num_bytes: int
    source: str


@dataclass(frozen=True, kw_only=True)
class LowRank(HostAdapter):
    """loras: for each linear that it changes, by name, its experts and the weight of each: one at 1 for a LoRA, the
    members of a blend at their shares. Every linear lists the same number of experts; one that lacks it has rank 0."""

    loras: Mapping[str, tuple[LoRA, ...]]
    weights: tuple[float, ...] = (1.0,)
    names: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each expert, the largest of all linears."""
        experts = zip(*self.loras.values(), strict=True)
        return tuple(max(lora.A.shape[0] for lora in own) for own in experts)


@dataclass(frozen=True, kw_only=True)
class Routed(HostAdapter):
    """mixture: over a base without memory; its banks and routers are real, and in evaluation."""

    mixture: Mixture


class ExpertWeights(NamedTuple):
    """One expert that replaces the base's."""

    gate_up: Tensor  # (2I, H)
    down: Tensor  # (H, I)


@dataclass(frozen=True, kw_only=True)
class ExpertSwap(HostAdapter):
    """experts: for each mixture-of-experts layer, by name, which of its experts are replaced, and by what."""

    experts: Mapping[str, Mapping[int, ExpertWeights]] = field(default_factory=dict)


def dtype_of(loras: Mapping[str, tuple[LoRA, ...]]) -> torch.dtype:
    """The widest of an adapter's factors."""
    found = torch.bfloat16
    for own in loras.values():
        for lora in own:
            found = torch.promote_types(found, lora.A.dtype)
    return found
