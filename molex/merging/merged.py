"""Many adapters into one: a rule over each linear that any of them changes, then the cut to a rank, if asked for.

An adapter that does not change a linear is a zero expert there. What comes out is factored, and small: the base is not
needed for it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from molex.checks import listed
from molex.errors import ConfigError, TargetError
from molex.experts import LoRA
from molex.library import Factors
from molex.merging.base import MergeRule
from molex.merging.cat import CatRule
from molex.merging.core import check_size, distance, norm, result_dtype, truncate, zero_lora
from molex.merging.weights import Depths, Weights, by_adapter, check_filters, weights_in


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What merging did to one linear. norm: of the result (Frobenius). truncation: the relative error of the cut to a
    rank. from_sum: how far the result is from the weighted sum of the updates, relative to that sum."""

    name: str
    ranks: tuple[int, ...]  # of the sources; 0 where an adapter does not change it
    rank: int
    weights: tuple[float, ...]
    norm: float
    truncation: float
    from_sum: float


@dataclass(frozen=True, kw_only=True)
class Merged:
    """factors: the merged LoRA of each linear, those that are not zero."""

    factors: Factors
    layers: tuple[LayerReport, ...]

    @property
    def truncation(self) -> float:
        """The relative Frobenius error of the cut over all linears, each in proportion to its size."""
        # of x before the cut, x² = norm² + lost², lost = truncation · x
        before = [report.norm**2 / max(1 - report.truncation**2, 1e-300) for report in self.layers]
        lost = sum(x * report.truncation**2 for x, report in zip(before, self.layers, strict=True))
        return (lost / sum(before)) ** 0.5 if sum(before) else 0.0


def merge_factors(
    experts: Mapping[str, Factors],
    rule: MergeRule,
    weights: Weights | None = None,
    *,
    names: Iterable[str] = (),
    rank: int | None = None,
    energy: float | None = None,
    on_layer: Callable[[str], None] = lambda layer: None,
) -> Merged:
    """Merges experts by name, each a LoRA for each linear.

    weights: see `molex.merging.weights`; by default the rule's own. names: the base's modules, from which gradients
    know its depth; by default the merged linears. rank, energy: see `core.truncate`. on_layer is told of each linear.
    Raises ConfigError on settings that do not fit, TargetError where experts are for linears of other sizes.
    """
    if not experts:
        raise ConfigError("nothing to merge; give at least one adapter")
    check_size(rank, energy)
    layers = {layer: None for factors in experts.values() for layer in factors}
    beside = {layer: _beside(layer, experts) for layer in layers}
    given = None if weights is None else by_adapter(weights, list(experts))
    check_filters(given or (), list(layers))
    depths, merger = Depths([*names, *layers]), rule.over(beside)
    factors, reports = {}, []
    for layer, loras in beside.items():
        own = rule.default_weights(len(loras)) if given is None else tuple(weights_in(layer, given, depths))
        try:
            whole = merger(loras, own, layer)
        except ConfigError as error:
            raise ConfigError(f"{layer}: {error}") from error
        lora, error = truncate(whole, rank, energy)
        reports.append(_report(layer, loras, own, lora, error))
        if reports[-1].norm > 0:
            factors[layer] = lora
        on_layer(layer)
    return Merged(factors=factors, layers=tuple(reports))


def _beside(layer: str, experts: Mapping[str, Factors]) -> list[LoRA]:
    """Every expert's LoRA of one linear, in order. Raises TargetError where their sizes differ."""
    given = {name: factors[layer] for name, factors in experts.items() if layer in factors}
    sizes = {name: (lora.A.shape[1], lora.B.shape[0]) for name, lora in given.items()}
    if len(set(sizes.values())) > 1:
        told = listed([f"{name}: {size[0]} -> {size[1]}" for name, size in sizes.items()], 8)
        raise TargetError(f"{layer} has other sizes in other adapters ({told}): they are for different bases")
    first = next(iter(given.values()))
    rank = max(lora.A.shape[0] for lora in given.values())
    absent = zero_lora(first.A.shape[1], first.B.shape[0], rank, result_dtype([first]), first.A.device)
    return [given.get(name, absent) for name in experts]


def _report(
    layer: str, loras: Sequence[LoRA], weights: tuple[float, ...], merged: LoRA, truncation: float
) -> LayerReport:
    total = CatRule().merge(loras, weights)
    size = norm(total)
    return LayerReport(
        name=layer,
        ranks=tuple(lora.A.shape[0] if lora.A.any() and lora.B.any() else 0 for lora in loras),
        rank=merged.A.shape[0],
        weights=weights,
        norm=norm(merged),
        truncation=truncation,
        from_sum=distance(merged, total) / size if size else 0.0,
    )
