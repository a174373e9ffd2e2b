"""FlexOlmo, for OLMo2 bases: norms after each half of a layer, queries and keys normalised over all heads.

For transformers alone: llama.cpp does not have it, and vLLM's neither renormalises (whatever norm_topk_prob says) nor
reads the last norm's epsilon.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

from molex.io.native.blocks import Block, Experts
from molex.io.native.family import Family, Target, families
from molex.io.stream import Entry


@families.register("flex_olmo")
class FlexOlmo(Family):
    """OLMo2's."""

    model_type = "flex_olmo"
    architecture = "FlexOlmoForCausalLM"
    serves = {"olmo2": ("transformers",)}  # noqa: RUF012 (a constant of the class)
    condition = "none"

    def refusal(self, base: PretrainedConfig, target: Target) -> str | None:
        return None

    def config(self, base: PretrainedConfig, experts: Experts, target: Target) -> dict[str, Any]:
        return {
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "norm_topk_prob": True,
            "attention_bias": base.attention_bias,
        }

    def entries(self, block: Block, base: PretrainedConfig) -> Iterator[Entry]:
        yield block.gate_entry(f"{block.name}.mlp.gate.weight")
        yield from block.expert_entries(f"{block.name}.mlp.experts")
