"""Which experts a task needs: how much of its tokens' routing goes to each, layer by layer.

    gate   g[e] = 1/T Σ_t w[t, e]          the average weight that the router gives expert e
    token  r[e] = 1/(T K) Σ_t [e in top-K(t)]          the share of choices that fall on it

ESFT (arXiv 2407.01906) trains, in each layer, the experts with the largest scores until they sum to p. A layer's ratios
sum to 1, its gate scores to what a token's weights sum to: 1 where the router renormalises them, about 0.35 in
DeepSeek-V2-Lite, for which the paper takes p = 0.1 (and 0.2 for ratios).
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molex.checks import check_choice
from molex.errors import ConfigError, StateError
from molex.esft.layers import ExpertLayer, find_layers
from molex.modes import evaluating

Score = Literal["gate", "token"]
PUBLISHED: dict[str, float] = {"gate": 0.1, "token": 0.2}  # p
ROUNDING = 1e-6  # of a sum of scores


@dataclass(frozen=True)
class Selection:
    """The chosen experts of each decoder layer, by its number, the best first; and the scores of all its experts, where
    they were measured."""

    experts: Mapping[int, tuple[int, ...]]
    scores: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.experts.values()))


def select(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, score: Score = "token", p: float | None = None
) -> Selection:
    """Runs a task's batches through the model and chooses each layer's experts. The paper's sample is 131,072 tokens.

    batches: the model's arguments; tokens with 0 in their attention_mask do not count. p: by default as in the paper.
    Raises TargetError where the model has no mixture-of-experts layers, ConfigError where p is out of reach.
    """
    check_choice("score", score, tuple(PUBLISHED))
    measured = measure(model, batches)
    scores = {number: getattr(layer, score)() for number, layer in measured.items()}
    p = PUBLISHED[score] if p is None else p
    for number, own in scores.items():
        if not 0 < p <= sum(own) + ROUNDING:
            total = f"the {score} scores of layer {number} sum to {sum(own):.4g}"
            raise ConfigError(f"p={p}; {total}: give more than 0, and no more than that")
    return Selection({number: choose(own, p) for number, own in scores.items()}, scores)


def choose(scores: Sequence[float], p: float) -> tuple[int, ...]:
    """Experts by descending score, the first of equals first, until the sum of those taken reaches p; none at 0."""
    chosen: list[int] = []
    reached = 0.0
    for expert in sorted(range(len(scores)), key=lambda expert: -scores[expert]):
        if reached >= p or scores[expert] == 0:
            break
        chosen.append(expert)
        reached += scores[expert]
    return tuple(chosen)


class Usage:
    """What one layer's router has done so far, summed in float64."""

    def __init__(self, num_experts: int):
        self.weights_E = torch.zeros(num_experts, dtype=torch.float64)
        self.chosen_E = torch.zeros(num_experts, dtype=torch.float64)
        self.num_tokens = 0

    def add(self, ids_TK: Tensor, weights_TK: Tensor) -> None:
        ids_N, weights_N = ids_TK.reshape(-1).cpu(), weights_TK.reshape(-1).double().cpu()
        self.weights_E.index_add_(0, ids_N, weights_N)
        self.chosen_E.index_add_(0, ids_N, torch.ones_like(weights_N))
        self.num_tokens += len(ids_TK)

    def gate(self) -> tuple[float, ...]:
        """The average gate score of each expert."""
        return tuple((self.weights_E / self.num_tokens).tolist())

    def token(self) -> tuple[float, ...]:
        """The token selection ratio of each expert."""
        return tuple((self.chosen_E / self.chosen_E.sum()).tolist())


def measure(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[int, Usage]:
    """How often and how strongly each layer's experts are used. Raises StateError where no token was seen."""
    layers = find_layers(model)
    watch = _Watch(layers)
    device = next(iter(layers.values())).gate_up.device
    hooks = [layer.module.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers.values()]
    try:
        with evaluating(model):
            for batch in batches:
                there = {
                    name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
                }
                watch.mask = there.get("attention_mask")
                model(**there)
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [number for number, usage in watch.usage.items() if not usage.num_tokens]
    if unseen:
        raise StateError(f"layers {unseen} saw no token: give batches with tokens in them")
    return watch.usage


class _Watch:
    """A hook on every layer: reads what the router chose."""

    def __init__(self, layers: Mapping[int, ExpertLayer]):
        self.usage = {number: Usage(layer.num_experts) for number, layer in layers.items()}
        self.number_of = {layer.module: number for number, layer in layers.items()}
        self.mask: Tensor | None = None  # (B, S), of the batch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        _, x_TH, ids_TK, weights_TK = bound.arguments.values()
        if self.mask is not None:
            real_T = self.mask.reshape(-1).bool()
            if len(real_T) != len(x_TH):
                raise StateError(f"attention_mask is of {len(real_T)} tokens, the experts saw {len(x_TH)}: give (B, S)")
            ids_TK, weights_TK = ids_TK[real_T], weights_TK[real_T]
        self.usage[self.number_of[module]].add(ids_TK, weights_TK)
