"""Qwen3-MoE, for Qwen3 bases: queries and keys normalised per head, layers that may stay dense (mlp_only_layers).

It divides by the sum of the chosen probabilities only where norm_topk_prob says so; llama.cpp always does, and knows no
dense layers.
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


@families.register("qwen3_moe")
class Qwen3Moe(Family):
    """Qwen3's."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    serves = {"qwen3": TARGETS}  # noqa: RUF012 (a constant of the class)
    keeps_dense = ("transformers", "vllm")
    condition = "vLLM, llama.cpp: no attention bias, no sliding window; llama.cpp: rope default, linear or yarn"

    def refusal(self, base: PretrainedConfig, target: Target) -> str | None:
        if base.attention_bias and target != "transformers":
            return f"the base has attention_bias, and {target} has no bias on o_proj here; export for transformers"
        return first_reason(
            activation_reason(base, target),
            window_reason(base, keeps=target == "transformers"),
            rope_reason(base, target, ("default", "linear", "yarn")) if target == "llama.cpp" else None,
        )

    def config(self, base: PretrainedConfig, experts: Experts, target: Target) -> dict[str, Any]:
        return {
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "norm_topk_prob": True,
            "moe_intermediate_size": base.intermediate_size,
            "mlp_only_layers": experts.dense_layers if target in self.keeps_dense else [],
            "attention_bias": base.attention_bias,
            "use_sliding_window": base.sliding_window is not None,
            "sliding_window": base.sliding_window,
        }

    def entries(self, block: Block, base: PretrainedConfig) -> Iterator[Entry]:
        yield block.gate_entry(f"{block.name}.mlp.gate.weight")
        yield from block.expert_entries(f"{block.name}.mlp.experts")
