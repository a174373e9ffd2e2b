"""What a merge rule is: settings, and a method that makes one LoRA of the LoRAs of one linear.

    merge([(A_1, B_1, s_1), ...], [w_1, ...]) -> (A, B, 1)

A rule is one file with a frozen dataclass under `@rules.register`. It never forms a dense (O, D) update: what is
elementwise runs on the small matrices of core space (`molex.merging.core`), or on A and B apart.
"""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from molex.checks import check_settings, near_and_known
from molex.errors import ConfigError
from molex.experts import LoRA
from molex.registry import Registry

Merger = Callable[[Sequence[LoRA], Sequence[float], str], LoRA]


@dataclass(frozen=True, kw_only=True)
class MergeRule(ABC):
    """averages: whether weights that are not given are 1/n each, as for a sum of updates, or 1 each, as for rules that
    set the size of their result themselves."""

    averages: ClassVar[bool] = True

    @abstractmethod
    def merge(self, loras: Sequence[LoRA], weights: Sequence[float], layer: str = "") -> LoRA:
        """One LoRA of scale 1, float32 or wider, from those of one linear; layer: its name, which seeds what is random.

        Raises ConfigError where a rule cannot take these LoRAs together.
        """

    def over(self, layers: Mapping[str, Sequence[LoRA]]) -> Merger:
        """`merge` for the layers of one model, which a rule may look at together first."""
        return self.merge

    def default_weights(self, num_loras: int) -> tuple[float, ...]:
        return (1 / num_loras if self.averages else 1.0,) * num_loras


rules: Registry[type[MergeRule]] = Registry("merge rule")


def make_rule(rule: str | MergeRule, parameters: Mapping[str, Any] | None = None) -> MergeRule:
    """A rule from itself, or from its name and settings. Raises ConfigError on unknown names and wrong values."""
    given = dict(parameters or {})
    if isinstance(rule, MergeRule):
        if given:
            raise ConfigError(f"{rule!r} has its settings already; leave parameters={given} out")
        return rule
    kind = rules[rule]
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            ending = near_and_known(name, known) if known else "; it has no settings"
            raise ConfigError(f"merge rule {rule!r} has no setting {name!r}{ending}")
    check_settings(kind, given)
    return kind(**given)


def generator_of(seed: int, layer: str) -> torch.Generator:
    """Random numbers of one layer: the same whatever other layers are merged, and in whatever order."""
    digest = hashlib.sha256(f"{seed} {layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
