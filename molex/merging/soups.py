"""LoRA Soups (arXiv 2410.13025): learn how much of each adapter goes into each linear, on a few examples.

    y = base(x) + Σ_i α_i^l s_i B_i^l A_i^l x        α^l learned, A and B frozen

The adapters become the experts of a mixture with the router "static", which is α; what is learned are weights, and
`molex.merge(model, adapters, "linear", weights)` folds them without loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from molex.composing import from_peft
from molex.errors import ConfigError
from molex.merging.adapters import Source, read_sources
from molex.merging.of_mixture import constant_weights
from molex.mixture import Mixture
from molex.modes import evaluating


def learn_soup(
    model: nn.Module,
    adapters: Mapping[str, Source],
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int = 100,
    learning_rate: float = 1e-2,
) -> dict[str, dict[str, float]]:
    """Trains the weights over batches (with labels) in turn, and returns them by adapter and linear.

    The model ends as it was. Weights start at 1/n; the optimizer is AdamW without decay. Raises ConfigError where there
    is nothing to learn from, and on adapters with modules trained whole.
    """
    read = read_sources(adapters)
    if not batches or steps < 1:
        raise ConfigError(f"steps={steps}, {len(batches)} batches: a soup is learned on at least one of each")
    if any(adapter.whole for adapter in read):
        raise ConfigError("a soup mixes LoRAs; adapters with modules trained whole are not learned over")
    mixture = from_peft(model, {adapter.name: adapter for adapter in read}, router="static")
    try:
        with evaluating(model), torch.enable_grad():  # no dropout: so few numbers need no regularisation
            _train(mixture, batches, steps, learning_rate)
        learned = {name: constant_weights(mixture, name) or [] for name in mixture.layers}
    finally:
        mixture.revert()
    return {adapter.name: {name: weights[i] for name, weights in learned.items()} for i, adapter in enumerate(read)}


def _train(mixture: Mixture, batches: Sequence[Mapping[str, Any]], steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(mixture.trainable_parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        mixture.model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
