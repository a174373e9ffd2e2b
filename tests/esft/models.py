"""Tiny random mixture-of-experts models, one for each architecture that ESFT is promised for: 3 layers, hidden size 32.

Weights are large, so that every logit tells which experts computed it, and the same every time.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_DEEPSEEK = {
    **_COMMON,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**_COMMON, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_COMMON,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {**_COMMON, "num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}


def moe(name: str, **overrides: Any) -> PreTrainedModel:
    """In evaluation mode and float32. Neither depends on the global seed nor changes it."""
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for module in model.modules():
            if type(module).__name__.endswith(("TopKRouter", "TopkRouter")):  # DeepSeek's starts at zero
                module.weight.data.normal_(std=0.2)
    return model


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """(B, S) of random ids."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
