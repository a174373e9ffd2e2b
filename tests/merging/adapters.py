"""Adapters over tiny models, and a base's folder, as merging takes them."""

from pathlib import Path

import torch
from torch import nn

from molex.experts import LoRA
from molex.io.adapter import Adapter
from molex.linears import features
from tests.models import tiny


def adapter_for(model: nn.Module, ends: tuple[str, ...], name: str = "a", rank: int = 3, seed: int = 0) -> Adapter:
    """Random LoRAs on the linears with these last names."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer, module in model.named_modules():
        size = features(module)
        if size and layer.split(".")[-1] in ends:
            A_RD = torch.randn(rank, size[0], generator=generator)
            factors[layer] = LoRA(A_RD, 0.1 * torch.randn(size[1], rank, generator=generator), 0.5 + seed)
    return Adapter(name=name, factors=factors)


def saved_base(folder: Path, kind: str = "llama", **overrides: object) -> Path:
    """A tiny base's folder, with files beside the weights."""
    model = tiny(kind, **overrides)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
