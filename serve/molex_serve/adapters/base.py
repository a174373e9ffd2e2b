"""What an adapter is between disk and device: read, checked against the base, and immutable.

A `Generation` is one content of an alias. Its id is a hash of what was read, so that a reload of the same files is the
same generation, and caches keyed by it never mix two contents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from molex.esft import ExpertWeights
from molex.library import Factors
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
    """factors: a LoRA for each linear that it changes, by name; of a blend, its members' columns side by side."""

    factors: Factors

    @property
    def rank(self) -> int:
        """The largest of all linears."""
        return max(len(lora.A) for lora in self.factors.values())


@dataclass(frozen=True, kw_only=True)
class Routed(HostAdapter):
    """mixture: over a model of its own that shares the served base's weights; in evaluation."""

    mixture: Mixture


@dataclass(frozen=True, kw_only=True)
class ExpertSwap(HostAdapter):
    """experts: for each mixture-of-experts layer, by name, which of its experts are replaced, and by what; in the
    base's dtype."""

    experts: Mapping[str, Mapping[int, ExpertWeights]]
