"""Routing statistics of a logging interval: where the tokens of many forwards went, as a few numbers.

    routing/entropy     mean over layers of the load's entropy, 1 = even (molex.stats)
    routing/max_load    the busiest expert's load over its even share, of the layer where it is worst
    routing/dead        experts, over all layers, that served nobody
    aux_loss            mean of the method's auxiliary loss

Counts stay on their device until they are read; padding is not counted.
"""

from collections import defaultdict

import torch
from torch import Tensor

from molex.architectures import block_of
from molex.routing import Trace
from molex.stats import LayerStats, over_all_ranks, slot_counts
from molex.training.arguments import RoutingLogs


class RoutingLog:
    """Sums what forwards routed; `read` reports it and starts anew."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}  # layer -> (E,)
        self.aux_losses: list[Tensor] = []

    @torch.no_grad()
    def add(self, trace: Trace, aux_loss: Tensor | None) -> None:
        """Takes one forward's routing; aux_loss None where the method has no loss."""
        for name, decision in trace.items():
            if decision.routing.num_experts > 1:
                counts_E = slot_counts(decision)
                self.counts[name] = self.counts[name] + counts_E if name in self.counts else counts_E
        if aux_loss is not None:
            self.aux_losses.append(aux_loss.detach())

    @torch.no_grad()
    def read(self, detail: RoutingLogs) -> dict[str, float]:
        """The interval's numbers over all ranks, by log key; empty where nothing was routed."""
        logs: dict[str, float] = {}
        if self.aux_losses:
            logs["aux_loss"] = float(torch.stack(self.aux_losses).mean())
        layers = self._layers()
        if layers:
            logs |= _numbers("routing", list(layers.values()))
        if detail != "summary":
            logs |= _grouped(layers, detail)
        self.counts, self.aux_losses = {}, []
        return logs

    def _layers(self) -> dict[str, LayerStats]:
        return {name: LayerStats(counts_E.cpu()) for name, counts_E in over_all_ranks(self.counts).items()}


def _numbers(prefix: str, layers: list[LayerStats]) -> dict[str, float]:
    return {
        f"{prefix}/entropy": sum(layer.entropy for layer in layers) / len(layers),
        f"{prefix}/max_load": max(float(layer.load.max()) * len(layer.counts) for layer in layers),
        f"{prefix}/dead": float(sum(len(layer.dead) for layer in layers)),
    }


def _grouped(layers: dict[str, LayerStats], detail: RoutingLogs) -> dict[str, float]:
    groups: dict[str, list[LayerStats]] = defaultdict(list)
    for name, stats in layers.items():
        groups[block_of(name) or name if detail == "blocks" else name].append(stats)
    return {key: number for name, group in groups.items() for key, number in _numbers(f"routing/{name}", group).items()}
