"""How much of each adapter goes into each linear. A weight is

    0.5                                            a number
    [0.2, 1.0, 0.2]                                a gradient: interpolated over the depth of the blocks, first to last
    [{filter: "mlp.*", value: 0.8}, {value: 0.3}]  numbers or gradients by pattern, the first match; no filter: all
    {"model.layers.0.mlp.up_proj": 0.4, ...}       a number for each linear by its name: what is learned or measured

Patterns are those of `molex.architectures`: dotted suffixes of a linear's name, each part a shell pattern.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molex.architectures import block_of, matches
from molex.checks import near_and_known
from molex.errors import ConfigError

Weight = float | Sequence[float] | Sequence[Mapping[str, Any]] | Mapping[str, float]
Weights = Sequence[Weight] | Mapping[str, Weight]  # in the adapters' order, or by their names


class Depths:
    """Where each linear lies between the first block (0) and the last (1) of its stack."""

    def __init__(self, names: Iterable[str]):
        """names: of all modules of the base, so that blocks without an adapter count too."""
        self.last: dict[str, int] = {}
        for name in names:
            stack, number = _place(name)
            if number is not None:
                self.last[stack] = max(number, self.last.get(stack, 0))

    def of(self, layer: str) -> float:
        """Raises ConfigError for a linear outside the blocks."""
        stack, number = _place(layer)
        if number is None:
            raise ConfigError(f"{layer} lies in no block, so that a gradient means nothing there; give it a number")
        return number / self.last[stack] if self.last.get(stack) else 0.0


def _place(name: str) -> tuple[str, int | None]:
    """The stack of blocks a module lies in, and its block's number."""
    stack, _, number = block_of(name).rpartition(".")
    return stack, int(number) if number else None


def by_adapter(weights: Weights, names: Sequence[str]) -> list[Weight]:
    """One weight for each adapter, in order. Raises ConfigError where one is missing, unknown, or no weight."""
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                raise ConfigError(f"weights name an adapter {name!r}{near_and_known(name, names)}")
        missing = [name for name in names if name not in weights]
        if missing:
            raise ConfigError(f"weights leave out {', '.join(missing)}; give every adapter a weight")
        found = [weights[name] for name in names]
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        found = list(weights)
    else:
        raise ConfigError(f"weights={weights!r}; give a list in the adapters' order, or a mapping by their names")
    if len(found) != len(names):
        raise ConfigError(f"{len(found)} weights for {len(names)} adapters: {', '.join(names)}")
    for name, weight in zip(names, found, strict=True):
        _check(name, weight)
    return found


def weights_in(layer: str, weights: Sequence[Weight], depths: Depths) -> list[float]:
    """The adapters' weights in one linear. Raises ConfigError where one has none there."""
    return [_value(weight, layer, depths) for weight in weights]


def check_filters(weights: Iterable[Weight], layers: Sequence[str]) -> None:
    """Raises ConfigError on a filter, or a linear's name, that no merged linear has."""
    for weight in weights:
        if isinstance(weight, Mapping):
            unknown = [name for name in weight if name not in layers]
            if unknown:
                raise ConfigError(f"a weight is given for {unknown[0]!r}{near_and_known(unknown[0], layers)}")
        elif not isinstance(weight, int | float):
            for pattern in (entry.get("filter") for entry in weight if isinstance(entry, Mapping)):
                if pattern is not None and not any(matches(layer, pattern) for layer in layers):
                    ends = sorted({layer.split(".")[-1] for layer in layers})
                    raise ConfigError(f"filter {pattern!r} matches no merged linear{near_and_known(pattern, ends)}")


def _value(weight: Weight, layer: str, depths: Depths) -> float:
    if isinstance(weight, int | float):
        return float(weight)
    if isinstance(weight, Mapping):
        if layer not in weight:
            raise ConfigError(f"weights by linear leave out {layer}")
        return float(weight[layer])
    if not isinstance(weight[0], Mapping):
        return _interpolated([float(point) for point in weight], depths.of(layer))  # type: ignore[arg-type]
    for entry in weight:
        assert isinstance(entry, Mapping)
        if entry.get("filter") is None or matches(layer, entry["filter"]):
            return _value(entry["value"], layer, depths)
    raise ConfigError(f"no filter matches {layer}; end the list with {{value: ...}} for all others")


def _interpolated(points: Sequence[float], depth: float) -> float:
    """Piecewise linear through points that are evenly spaced over 0..1."""
    place = depth * (len(points) - 1)
    left = min(int(place), len(points) - 2) if len(points) > 1 else 0
    right = min(left + 1, len(points) - 1)
    return points[left] + (place - left) * (points[right] - points[left])


def _check(name: str, weight: object) -> None:
    """Raises ConfigError unless a weight has one of the forms above."""
    if _is_number(weight) or _is_gradient(weight):
        return
    if isinstance(weight, Mapping) and weight and all(map(_is_number, weight.values())):
        return
    entries = list(weight) if isinstance(weight, Sequence) and not isinstance(weight, str) else []
    if entries and all(isinstance(entry, Mapping) for entry in entries):
        for entry in entries:
            for key in entry:
                if key not in ("filter", "value"):
                    raise ConfigError(f"the weight of {name} has {key!r}{near_and_known(key, ('filter', 'value'))}")
            value, pattern = entry.get("value"), entry.get("filter")
            if not (_is_number(value) or _is_gradient(value)) or not isinstance(pattern, str | None):
                raise ConfigError(f"the weight of {name}: {entry!r}; give filter: a pattern, value: number or list")
        return
    raise ConfigError(
        f"the weight of {name} is {weight!r}; give a number, a list of numbers over the depth, a list of "
        "{filter, value}, or a number for each linear by name"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_gradient(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(map(_is_number, value))
