"""The weighted sum, cut to its largest singular values: the nearest LoRA of that rank.

PEFT's "svd" takes the same from the dense update; here it is a few small matrices, and the same to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from molex.experts import LoRA
from molex.merging.base import MergeRule, rules
from molex.merging.core import Core, check_size, truncate


@rules.register("svd")
@dataclass(frozen=True, kw_only=True)
class SVDRule(MergeRule):
    """rank: of the result. energy: the share of the squared norm to keep instead. Without either, the largest rank
    that is merged."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        check_size(self.rank, self.energy)

    def merge(self, loras: Sequence[LoRA], weights: Sequence[float], layer: str = "") -> LoRA:
        core = Core.of(loras)
        rank = self.rank
        if rank is None and self.energy is None:
            rank = max(lora.A.shape[0] for lora in loras)
        return truncate(core.lora(core.sum(weights)), rank, self.energy)[0]
