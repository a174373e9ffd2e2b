"""Adapters as PEFT itself writes them, with weights that do something."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.models import tiny


def peft_model(model: nn.Module | None = None, seed: int = 0, **settings: Any) -> PeftModel:
    """A PEFT model over a tiny one, in evaluation mode, whose LoRAs and whole modules have random weights."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings})
    adapted = get_peft_model(tiny("llama") if model is None else model, config).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return adapted


def write_peft(folder: Path, model: nn.Module | None = None, seed: int = 0, **settings: Any) -> Path:
    """Saves one into FOLDER; returns it."""
    peft_model(model, seed, **settings).save_pretrained(folder)
    return folder
