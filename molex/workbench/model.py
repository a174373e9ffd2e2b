"""The base: a Llama of 8 layers, small enough to train experts on two CPU cores in a minute.

8 layers, since MoLA's layer shapes need as many; grouped key/value heads, so that k and v differ from q and o
in shape; tied embeddings, so that nearly all parameters are in the linear layers that experts attach to.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from molex.workbench.tokenizer import ASSETS, BOS, EOS, PAD, VOCABULARY_SIZE


def base_config() -> LlamaConfig:
    """The base's architecture, 1.6 M parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def load_base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Load the shipped base (stored in bfloat16) in the given dtype."""
    return LlamaForCausalLM.from_pretrained(ASSETS, dtype=dtype)
