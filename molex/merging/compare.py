"""Which merge of a mixture loses least: the loss of base, mixture and each candidate, on the same batches.

Nothing is folded: while a candidate is measured, the mixture is off and each base linear adds the merged update to its
output, so the base's weights are never touched and no copy of them is made. A fold into 16-bit weights rounds besides.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from molex.experts import LoRA
from molex.library import Factors
from molex.merging.base import MergeRule, rules
from molex.merging.evaluating import mean_loss
from molex.merging.of_mixture import merge_experts
from molex.merging.weights import Weights
from molex.mixture import Mixture


def compare_merges(
    mixture: Mixture,
    candidates: Iterable[str | MergeRule],
    batches: Iterable[Mapping[str, Any]],
    weights: Weights | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> dict[str, float]:
    """Losses by name: "base", "mixture", and each candidate, a rule or its name, merged with these weights and limits.

    batches: what the model takes, with labels. The mixture stays as it is. Raises as `merge_experts` does.
    """
    kept: Sequence[Mapping[str, Any]] = list(batches)
    losses = {"mixture": mean_loss(mixture.model, kept)}
    with mixture.disabled():
        losses = {"base": mean_loss(mixture.model, kept), **losses}
    for candidate in candidates:
        merged = merge_experts(mixture, candidate, weights, rank=rank, energy=energy)
        name = candidate if isinstance(candidate, str) else _label(candidate)
        with added(mixture, merged.factors):
            losses[name] = mean_loss(mixture.model, kept)
    return losses


@contextmanager
def added(mixture: Mixture, factors: Factors) -> Iterator[None]:
    """The base with one LoRA for each layer beside it, in the mixture's place."""
    with ExitStack() as stack:
        stack.enter_context(mixture.disabled())
        for name, lora in factors.items():
            handle = mixture.layers[name].base.register_forward_hook(partial(_add, lora))
            stack.callback(handle.remove)
        yield


def _add(lora: LoRA, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = inputs[0]
    hidden = F.linear(x, lora.A.to(x))
    return output + lora.scale * F.linear(hidden, lora.B.to(x))


def _label(rule: MergeRule) -> str:
    """A rule's name with the settings that are not its defaults."""
    name, usual = rules.name_of(type(rule)), type(rule)()
    own = [f"{key}={value}" for key, value in vars(rule).items() if value != getattr(usual, key)]
    return f"{name} ({', '.join(own)})" if own else name
