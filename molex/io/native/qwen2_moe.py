"""Qwen2-MoE, for Qwen2 and Qwen2.5 bases: biases on queries, keys and values, layers that may stay dense.

The architecture adds a shared expert behind a sigmoid to every token. The base has none, so it is written narrow and
zero: it adds exactly 0. Not for llama.cpp, which never renormalises in this architecture and makes such a shared expert
NaN; GraniteMoE is the way there.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from molex.io.native.blocks import PROJECTIONS, Block, Experts
from molex.io.native.family import (
    Family,
    Target,
    activation_reason,
    families,
    first_reason,
    head_dim_is_default,
    window_reason,
)
from molex.io.stream import Entry

SHARED_WIDTH = 64  # divides over up to 64 ranks of tensor parallelism


@families.register("qwen2_moe")
class Qwen2Moe(Family):
    """Qwen2's."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    serves = {"qwen2": ("transformers", "vllm")}  # noqa: RUF012 (a constant of the class)
    keeps_dense = ("transformers", "vllm")
    condition = "vLLM: head_dim = hidden_size / heads, no sliding window"

    def refusal(self, base: PretrainedConfig, target: Target) -> str | None:
        if target == "transformers":
            return None
        if not head_dim_is_default(base):
            return "vllm has no head_dim of its own here; export for transformers"
        return first_reason(activation_reason(base, target), window_reason(base, keeps=False))

    def config(self, base: PretrainedConfig, experts: Experts, target: Target) -> dict[str, Any]:
        return {
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "norm_topk_prob": True,
            "moe_intermediate_size": base.intermediate_size,
            "shared_expert_intermediate_size": SHARED_WIDTH,
            "mlp_only_layers": experts.dense_layers,
            "qkv_bias": True,
            "use_sliding_window": base.sliding_window is not None,
            "sliding_window": base.sliding_window,
            "layer_types": base.layer_types,
        }

    def entries(self, block: Block, base: PretrainedConfig) -> Iterator[Entry]:
        moe = f"{block.name}.mlp"
        yield block.gate_entry(f"{moe}.gate.weight")
        yield from block.expert_entries(f"{moe}.experts")
        width = base.hidden_size
        shapes = ((SHARED_WIDTH, width), (SHARED_WIDTH, width), (width, SHARED_WIDTH))
        for projection, shape in zip(PROJECTIONS, shapes, strict=True):
            name = f"{moe}.shared_expert.{projection}.weight"
            yield Entry.of(name, shape, block.dtype(), partial(torch.zeros, shape))
        yield Entry.of(f"{moe}.shared_expert_gate.weight", (1, width), block.dtype(), partial(torch.zeros, (1, width)))
