"""Mixtures to export, with nothing at a neutral value, and what plain transformers makes of the exported folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import molex
from molex import Mixture
from tests.models import VOCABULARY, tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LAYER_1 = tuple(f"layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj"))


def mixture_on(base: str, fields: dict[str, Any] | None = None, **overrides: Any) -> Mixture:
    """A mixture of mixlora's shape; fields of the base's config, overrides of the preset."""
    settings = {"num_experts": 4, "top_k": 2, "rank": 4, "dropout": 0.0, **overrides}
    if settings.get("router") == "soft":
        del settings["top_k"]
    model = tiny(base, **{"num_hidden_layers": 3, **(fields or {})})
    mixture = molex.convert(model, molex.preset("mixlora", **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in mixture.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                tensor += (1.0 if ".router." in name else 0.1) * noise
    return mixture


def tokens(length: int = 24) -> Tensor:
    """Two random texts, longer than the sliding windows of tests.models."""
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(9))


def said(mixture: Mixture) -> Tensor:
    """The mixture's logits."""
    with torch.no_grad():
        return mixture.model(input_ids=tokens()).logits


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """The folder's model as transformers loads it, every tensor found and none left over, and its logits."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        return model, model.eval()(input_ids=tokens()).logits
