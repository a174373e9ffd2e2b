"""How many experts each layer gets.

MoLA (arXiv 2402.08562) found that layers need different numbers of experts and named five shapes over four equal
groups of layers, lowest first. `usage_budget` splits a total by how much a trained mixture really used:
experts in proportion to exp(entropy of the layer's load), its effective number of experts.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from molex.errors import ConfigError

SHAPES: dict[str, tuple[int, int, int, int]] = {
    "rectangle": (5, 5, 5, 5),
    "triangle": (8, 6, 4, 2),
    "inverted_triangle": (2, 4, 6, 8),
    "hourglass": (8, 2, 2, 8),
    "diamond": (2, 8, 8, 2),
}


def allocate(num_layers: int, num_experts: int, allocation: str | Sequence[int] | None = None) -> list[int]:
    """Experts per layer, lowest layer first.

    allocation: None (num_experts everywhere), the name of a MoLA shape (its own counts, 20 per four layers), four
    counts (one per group; where num_layers is not divisible by 4 the first groups get one layer more), or one
    count per layer. Raises ConfigError on anything else.
    """
    if allocation is None:
        return [num_experts] * num_layers
    counts = _named_shape(allocation) if isinstance(allocation, str) else tuple(allocation)
    if any(not isinstance(count, int) or count < 1 for count in counts):
        raise ConfigError(f"allocation={allocation!r}: every layer needs a whole number of experts, at least 1")
    if len(counts) == num_layers:
        return list(counts)
    if len(counts) == 4 and num_layers >= 4:
        return [counts[group] for group in _groups(num_layers)]
    raise ConfigError(
        f"allocation has {len(counts)} entries, the model has {num_layers} layers; "
        f"give one per layer, four (one per group of layers), or a shape: {', '.join(SHAPES)}"
    )


def _named_shape(name: str) -> tuple[int, ...]:
    if name not in SHAPES:
        raise ConfigError(f"unknown allocation {name!r}; shapes: {', '.join(SHAPES)}, or a list of counts")
    return SHAPES[name]


def _groups(num_layers: int) -> list[int]:
    sizes = [num_layers // 4 + (group < num_layers % 4) for group in range(4)]
    ends = list(accumulate(sizes))
    return [next(group for group, end in enumerate(ends) if layer < end) for layer in range(num_layers)]


def usage_budget(loads: Sequence[Tensor], total: int) -> list[int]:
    """Splits `total` experts over layers by measured load: loads[l] (E_l,) are token counts or shares.

    Largest remainder on exp(entropy), at least 1 per layer. Raises ConfigError when total < number of layers.
    """
    if total < len(loads):
        raise ConfigError(f"a budget of {total} experts cannot give each of {len(loads)} layers one")
    needs = [_effective_experts(load) for load in loads]
    spare = total - len(loads)
    shares = [spare * need / sum(needs) for need in needs]
    counts = [1 + math.floor(share) for share in shares]
    by_remainder = sorted(range(len(loads)), key=lambda layer: math.floor(shares[layer]) - shares[layer])
    for layer in by_remainder[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def _effective_experts(load: Tensor) -> float:
    share = load.double() / load.sum()
    if not share.isfinite().all():
        raise ConfigError("a layer's measured load is empty or not finite; run some batches first")
    return float((-(share * share.clamp(min=1e-300).log()).sum()).exp())
