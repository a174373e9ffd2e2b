"""Where tokens went: load, entropy and dead experts of each layer, read from the trace after a forward.

load_e   share of the chosen slots that expert e served, padding left out (sums to 1)
entropy  of the load, divided by log E: 1 = even, 0 = one expert does everything
dead     experts that served nobody
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from molex.distributed import all_ranks
from molex.entropy import shannon_entropy
from molex.routing import Decision, Trace


@dataclass(frozen=True)
class LayerStats:
    """counts: slots served by each expert (E,); tokens: how many real tokens were routed, where that was counted."""

    counts: Tensor
    tokens: int | None = None

    @property
    def load(self) -> Tensor:
        return self.counts / self.counts.sum().clamp(min=1)

    @property
    def entropy(self) -> float:
        if len(self.counts) == 1:
            return 1.0
        return float(shannon_entropy(self.load.double()) / math.log(len(self.counts)))

    @property
    def dead(self) -> list[int]:
        return (self.counts == 0).nonzero().flatten().tolist()


@torch.no_grad()
def slot_counts(decision: Decision) -> Tensor:
    """How many real tokens chose each expert: (E,), float."""
    routing = decision.routing
    chosen_TK = (routing.expert_ids >= 0) & (routing.weights != 0)
    weights_TK = chosen_TK.to(routing.weights.dtype) * decision.mask()[:, None]
    return routing._replace(weights=weights_TK.detach()).gates().sum(0)


def expert_gates(decision: Decision, num_experts: int) -> Tensor:
    """(T, E): each expert's weight for each token, the mean over its heads; zero where it was not chosen."""
    return decision.routing.gates().detach().unflatten(-1, (-1, num_experts)).mean(-2)


@torch.no_grad()
def layer_stats(trace: Trace) -> dict[str, LayerStats]:
    """Statistics of one forward, per layer, on the CPU; over this process's tokens only."""
    return {name: LayerStats(slot_counts(d).cpu(), int(d.mask().sum())) for name, d in trace.items()}


def over_all_ranks(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's slot counts (E,) summed over ranks, in one reduction; on the first one's device."""
    if not counts:
        return {}
    device = next(iter(counts.values())).device
    joined = torch.cat([counts_E.to(device) for counts_E in counts.values()])
    sizes = [len(counts_E) for counts_E in counts.values()]
    return dict(zip(counts, all_ranks(joined).split(sizes), strict=True))
