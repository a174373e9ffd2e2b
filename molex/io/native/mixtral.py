"""Mixtral, for Llama and Mistral bases: the same decoder layer, with experts w1 (gate), w3 (up) and w2 (down).

Its router always divides by the sum of the k chosen probabilities; there is no dense layer, and no bias anywhere.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

from molex.io.native.blocks import Block, Experts
from molex.io.native.family import (
    TARGETS,
    Family,
    Target,
    activation_reason,
    families,
    first_reason,
    rope_reason,
    window_reason,
)
from molex.io.stream import Entry


@families.register("mixtral")
class Mixtral(Family):
    """Llama's and Mistral's."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    serves = {"llama": TARGETS, "mistral": TARGETS}  # noqa: RUF012 (a constant of the class)
    condition = "no biases; llama.cpp: no sliding window, rope default, linear, yarn or llama3"

    def refusal(self, base: PretrainedConfig, target: Target) -> str | None:
        if getattr(base, "attention_bias", False):
            return "the base has attention_bias, and this architecture has no biases"
        llama_cpp = target == "llama.cpp"
        return first_reason(
            activation_reason(base, target),
            window_reason(base, keeps=not llama_cpp),
            rope_reason(base, target, ("default", "linear", "yarn", "llama3")) if llama_cpp else None,
        )

    def config(self, base: PretrainedConfig, experts: Experts, target: Target) -> dict[str, Any]:
        return {
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "sliding_window": getattr(base, "sliding_window", None),
        }

    def entries(self, block: Block, base: PretrainedConfig) -> Iterator[Entry]:
        moe = f"{block.name}.block_sparse_moe"
        yield block.gate_entry(f"{moe}.gate.weight")
        yield from block.expert_entries(f"{moe}.experts", names=("w1", "w3", "w2"))
