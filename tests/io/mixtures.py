"""Mixtures with nothing left at its initial value, so that a tensor lost on the way to disk shows."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import molex
from molex import Mixture
from tests.cases import PRESETS
from tests.models import batch_for, tiny


def scrambled(mixture: Mixture) -> Mixture:
    """Draws every floating-point number of the mixture anew; whole modules it trains get noise. Names the experts."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in mixture.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    for layer in mixture.layers.values():
        layer.experts.names = [f"skill {name}" for name in layer.experts.names]
    return mixture


def of_preset(name: str, model: PreTrainedModel | None = None, **overrides: Any) -> Mixture:
    """A scrambled mixture of a preset, at the small settings of tests.cases."""
    config = molex.preset(name, **{**PRESETS[name].overrides, **overrides})
    return scrambled(molex.convert(tiny("llama") if model is None else model, config))


def logits(mixture: Mixture) -> Tensor:
    """What the model says to a fixed batch whose two sequences are of tasks 0 and 1; evaluation mode.

    Weights move to fresh memory first: the stock loader maps them from the file at odd addresses, where CPU products
    round differently.
    """
    for parameter in mixture.model.parameters():
        parameter.data = parameter.data.clone()
    batch = {k: v for k, v in batch_for(mixture.model.eval()).items() if k != "labels"}
    if mixture.model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    with torch.no_grad(), mixture.using(tasks=[0, 1]):
        return mixture.model(**batch).logits


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit, names and dtypes included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
