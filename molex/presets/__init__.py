"""Every published method as a preset: its paper's defaults, and how ours deviates, if it does.

    molex.preset("mixlora", num_experts=8, top_k=2, rank=16)

A preset is a function without arguments that returns the whole configuration; its docstring is the method and its
paper, the equation, and every deviation from paper or code. Overrides are the flat settings of molex.config.
"""

from molex.presets import blocks, ranks, adapters, sharing  # noqa: F401, I001 (registers the presets, in this order)
from molex.presets.base import preset, presets

__all__ = ["preset", "presets"]
