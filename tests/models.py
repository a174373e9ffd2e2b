"""Tiny random transformers models, one for each architecture that molex promises to convert, and mixtures of them.

tiny("llama")   tiny("gpt2", num_hidden_layers=4)   tiny("bert_classifier")

Two layers of hidden size 32 and a vocabulary of 64, float32, in evaluation mode, the same weights every time. Overrides
are the fields of the architecture's own config; `num_hidden_layers` works for all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import molex
from molex.mixture import Mixture

VOCABULARY = 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TRANSFORMER = {**_SIZES, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
_GROUPED = {**_TRANSFORMER, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
_GPT2 = {**_SIZES, "n_head": 4, "n_inner": 48, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
_OPT = {**_TRANSFORMER, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
_MAMBA = {**_SIZES, "intermediate_size": 64, "state_size": 8, "time_step_rank": 4}
_MAMBA2 = {**_SIZES, "num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 2, "chunk_size": 8}
_BERT = {**_TRANSFORMER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5 = {**_SIZES, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0}

# name -> transformers' model_type, config fields
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 16}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", _GEMMA),
    "phi3": ("phi3", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "granite": ("granite", _GROUPED),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _TRANSFORMER),
    "opt": ("opt", _OPT),
    "mamba": ("mamba", _MAMBA),
    "mamba2": ("mamba2", _MAMBA2),
    "bert": ("bert", _BERT),
    "bert_classifier": ("bert", {**_BERT, "num_labels": 3}),
    "t5": ("t5", {**_T5, "feed_forward_proj": "relu"}),
    "t5_gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}

CAUSAL = tuple(name for name in ARCHITECTURES if not name.startswith(("bert", "t5")))
STATE_SPACE = ("mamba", "mamba2")
ENCODER_DECODER = ("t5", "t5_gated")
WITH_FFN = tuple(name for name in ARCHITECTURES if name not in STATE_SPACE)


def tiny(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of one of ARCHITECTURES. Its weights do not depend on the global seed, nor change it."""
    kind, fields = ARCHITECTURES[model_type]
    if kind == "t5":
        overrides.setdefault("num_decoder_layers", overrides.get("num_hidden_layers", 2))
    config = AutoConfig.for_model(kind, **{**fields, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _auto_class(model_type).from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at zero, which would hide a lost one
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch_for(model: PreTrainedModel, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Random inputs with labels, no padding: what one training step of this model takes."""
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    if type(model).__name__.endswith("SequenceClassification"):
        return {"input_ids": ids_BS, "labels": torch.arange(rows) % 3}
    if model.config.is_encoder_decoder:
        return {"input_ids": ids_BS, "labels": torch.randint(3, VOCABULARY, (rows, 5), generator=generator)}
    return {"input_ids": ids_BS, "labels": ids_BS}


SMALL = {"num_experts": 3, "rank": 4, "dropout": 0.0}


def mixture_of(name: str = "llama", method: str = "mola", num_hidden_layers: int = 2, **overrides: Any) -> Mixture:
    """A small mixture whose experts do something."""
    model = tiny(name, num_hidden_layers=num_hidden_layers)
    mixture = molex.convert(model, molex.preset(method, **{**SMALL, **overrides}))
    wake_experts(model)
    return mixture


def wake_experts(model: nn.Module) -> None:
    """B starts at zero; a trained one is not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "pool_B")):
                parameter.normal_(std=0.1)


def _auto_class(model_type: str) -> Any:
    if model_type in ENCODER_DECODER:
        return AutoModelForSeq2SeqLM
    return {"bert": AutoModelForMaskedLM, "bert_classifier": AutoModelForSequenceClassification}.get(
        model_type, AutoModelForCausalLM
    )
