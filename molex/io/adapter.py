"""Adapter: one LoRA for each linear it changes, as it lies on disk or is on its way there; no model is needed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from molex.library import Factors


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """factors: a LoRA for each layer, by the linear's name in the base model, with the scale that its configuration
    means. whole: modules trained and saved whole, as parameters by name. base: the name of the base, "" if unknown.
    config: the rest of what its own configuration says."""

    name: str
    factors: Factors
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    base: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
