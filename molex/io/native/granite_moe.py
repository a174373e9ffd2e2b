"""GraniteMoE, for Granite bases, and for Llama and Qwen2 bases with biases, its multipliers at their neutral values.

Its router is a softmax over the k chosen logits, the same weights; all of a layer's experts are one tensor. Under
llama.cpp it is the only architecture here that has attention biases and renormalises, so Qwen2 goes there too, with an
o_proj bias of zeros, since biases are on all four projections or on none.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from molex.io.native.blocks import Block, Experts
from molex.io.native.family import (
    TARGETS,
    Family,
    Target,
    activation_reason,
    families,
    first_reason,
    head_dim_is_default,
    rope_reason,
    window_reason,
)
from molex.io.stream import Entry

_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")


@families.register("granitemoe")
class GraniteMoe(Family):
    """Granite's, and of bases with attention biases."""

    model_type = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    serves = {  # noqa: RUF012 (a constant of the class)
        "granite": TARGETS,
        "llama": ("transformers", "llama.cpp"),
        "qwen2": ("transformers", "llama.cpp"),
    }
    fallback = True
    condition = (
        "no sliding window; vLLM, llama.cpp: head_dim = hidden_size / heads; vLLM: no attention bias, rope default; "
        "llama.cpp: rope default, linear or yarn"
    )

    def refusal(self, base: PretrainedConfig, target: Target) -> str | None:
        if target != "transformers" and not head_dim_is_default(base):
            return f"{target} has no head_dim of its own here; export for transformers"
        if target == "vllm" and base.attention_bias:
            return "vllm has no attention biases here; export for transformers"
        known = {"vllm": ("default",), "llama.cpp": ("default", "linear", "yarn")}
        return first_reason(
            activation_reason(base, target),
            window_reason(base, keeps=False),
            rope_reason(base, target, known[target]) if target in known else None,
        )

    def config(self, base: PretrainedConfig, experts: Experts, target: Target) -> dict[str, Any]:
        head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        neutral = dict(zip(_MULTIPLIERS, (1.0, 1.0, 1.0, head_dim**-0.5), strict=True))
        granite = base.model_type == "granite"
        return {
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "attention_bias": base.model_type == "qwen2" or base.attention_bias,
            **{name: getattr(base, name) if granite else value for name, value in neutral.items()},
        }

    def entries(self, block: Block, base: PretrainedConfig) -> Iterator[Entry]:
        moe, num_experts = f"{block.name}.block_sparse_moe", len(block.slots)
        inner, width = block.shape("gate_proj")
        yield block.gate_entry(f"{moe}.router.layer.weight")
        widen = (num_experts, 2 * inner, width)
        yield Entry.of(f"{moe}.input_linear.weight", widen, block.dtype(), partial(_widen, block))
        narrow = (num_experts, width, inner)
        yield Entry.of(f"{moe}.output_linear.weight", narrow, block.dtype(), partial(_narrow, block))
        if base.model_type == "qwen2":
            o_bias = f"{block.name}.self_attn.o_proj.bias"
            yield Entry.of(o_bias, (width,), block.dtype(), partial(torch.zeros, (width,)))


def _widen(block: Block) -> Tensor:
    """(E, 2I, D): each expert's gate, then its up projection."""
    halves = [torch.cat([block.dense("gate_proj", e), block.dense("up_proj", e)]) for e in block.slots]
    return torch.stack(halves)


def _narrow(block: Block) -> Tensor:
    """(E, D, I)."""
    return torch.stack([block.dense("down_proj", e) for e in block.slots])
