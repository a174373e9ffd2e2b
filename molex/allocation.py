"""How many experts each layer gets.

MoLA (arXiv 2402.08562) found that layers need different numbers of experts and named five shapes over four equal
groups of layers, lowest first. `usage_budget` splits a total by how much a trained mixture really used:
experts in proportion to exp(entropy of the layer's load), its effective number of experts.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from molex.architectures import by_block
from molex.entropy import shannon_entropy
from molex.errors import ConfigError
from molex.stats import LayerStats

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
    if isinstance(allocation, str):
        return _by_group(_named_shape(allocation), num_layers)
    counts = tuple(allocation)
    if any(not isinstance(count, int) or count < 1 for count in counts):
        raise ConfigError(f"allocation={allocation!r}: every layer needs a whole number of experts, at least 1")
    if len(counts) == num_layers:
        return list(counts)
    if len(counts) == 4 and num_layers > 4:
        return _by_group(counts, num_layers)
    raise ConfigError(
        f"allocation has {len(counts)} entries, the model has {num_layers} layers; "
        f"give one per layer, four (one per group of layers), or a shape: {', '.join(SHAPES)}"
    )


def _named_shape(name: str) -> tuple[int, ...]:
    if name not in SHAPES:
        raise ConfigError(f"unknown allocation {name!r}; shapes: {', '.join(SHAPES)}, or a list of counts")
    return SHAPES[name]


def _by_group(counts: Sequence[int], num_layers: int) -> list[int]:
    sizes = [num_layers // 4 + (group < num_layers % 4) for group in range(4)]
    return [count for count, size in zip(counts, sizes, strict=True) for _ in range(size)]


def usage_budget(usage: Mapping[str, LayerStats] | Sequence[Tensor], total: int) -> list[int]:
    """Splits `total` experts over layers by measured load; the result is an allocation.

    usage: `mixture.stats()` (the linears of a transformer block count as one layer, with the mean of their needs; plain
    LoRAs do not count), or each layer's token counts or shares (E_l,). Largest remainder on exp(entropy), at least 1
    per layer. Raises ConfigError when total < number of layers, or where a load is empty or not finite.
    """
    needs = _needs_of_blocks(usage) if isinstance(usage, Mapping) else [_effective_experts(load) for load in usage]
    if not isinstance(total, int) or not needs:
        raise ConfigError(f"total={total!r} experts over {len(needs)} layers; give a whole number and measured layers")
    if total < len(needs):
        raise ConfigError(f"a budget of {total} experts cannot give each of {len(needs)} layers one")
    spare = total - len(needs)
    shares = [spare * need / sum(needs) for need in needs]
    counts = [1 + math.floor(share) for share in shares]
    by_remainder = sorted(range(len(needs)), key=lambda layer: math.floor(shares[layer]) - shares[layer])
    for layer in by_remainder[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def _needs_of_blocks(stats: Mapping[str, LayerStats]) -> list[float]:
    if not stats:
        raise ConfigError("no usage was measured: run some batches, then pass mixture.stats()")
    routed = [[stats[name].counts for name in names] for names in by_block(stats).values()]
    needs = [[_effective_experts(counts) for counts in block if len(counts) > 1] for block in routed]
    return [sum(block) / len(block) if block else 1.0 for block in needs]


def _effective_experts(load: Tensor) -> float:
    share = load.double() / load.sum()
    if not share.isfinite().all():
        raise ConfigError("a layer's measured load is empty or not finite; run some batches first")
    return float(shannon_entropy(share).exp())
