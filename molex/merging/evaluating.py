"""Measuring a model: evaluation mode and no gradients for a while, and its loss over batches."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from molex.errors import ConfigError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module trains or not as it did."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """The model's own loss over batches that have `labels`, each in proportion to its labels that count.

    Raises ConfigError where there are none.
    """
    total = count = 0.0
    with evaluating(model):
        for batch in batches:
            labels = float((batch["labels"] != -100).sum())
            total += labels * float(model(**batch).loss)
            count += labels
    if count == 0:
        raise ConfigError("a loss is measured on batches with labels, and there are none")
    return total / count
