"""molex: mixtures of LoRA experts, on any dense language model.

import molex
mixture = molex.convert(model, molex.preset("mixlora", num_experts=8, top_k=2, rank=16))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from molex.errors import MolexError

if TYPE_CHECKING:
    from molex import esft
    from molex.allocation import allocate, usage_budget
    from molex.composing import from_peft
    from molex.config import MixtureConfig
    from molex.experts import LoRA
    from molex.gate_init import gates_from_experts, gates_from_prompts
    from molex.io.loading import load
    from molex.io.moe_peft import from_moe_peft
    from molex.io.peft_xlora import from_peft_xlora
    from molex.merging import merge
    from molex.mixture import Mixture
    from molex.presets import preset
    from molex.routing import RouteContext, Routing
    from molex.surgery import convert

__version__ = "0.1.0"

# where each public name lives: loaded when first used, so that `import molex` stays light
_HOMES = {
    "allocate": "molex.allocation",
    "usage_budget": "molex.allocation",
    "MixtureConfig": "molex.config",
    "from_peft": "molex.composing",
    "LoRA": "molex.experts",
    "Mixture": "molex.mixture",
    "preset": "molex.presets",
    "RouteContext": "molex.routing",
    "Routing": "molex.routing",
    "convert": "molex.surgery",
    "from_moe_peft": "molex.io.moe_peft",
    "from_peft_xlora": "molex.io.peft_xlora",
    "gates_from_experts": "molex.gate_init",
    "gates_from_prompts": "molex.gate_init",
    "load": "molex.io.loading",
    "merge": "molex.merging",
}

__all__ = [
    "LoRA",
    "Mixture",
    "MixtureConfig",
    "MolexError",
    "RouteContext",
    "Routing",
    "allocate",
    "convert",
    "esft",
    "from_moe_peft",
    "from_peft",
    "from_peft_xlora",
    "gates_from_experts",
    "gates_from_prompts",
    "load",
    "merge",
    "preset",
    "usage_budget",
]


def __getattr__(name: str) -> Any:
    if name == "esft":  # a part with names of its own: molex.esft.select(...)
        return import_module("molex.esft")
    if name not in _HOMES:
        raise AttributeError(f"module 'molex' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
