"""Measuring a model: its loss over batches."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from molex.errors import ConfigError
from molex.modes import evaluating


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
