"""Trainable copies of a layer's chosen experts, which take the place of the originals in its forward.

All experts of a layer lie in one Parameter, and a masked gradient does not freeze the rest of it: AdamW's decay and
momentum move what has no gradient. So the originals stay as they are, frozen, and each (token, slot) pair goes either
to an original or to a copy. Nothing is computed twice, and only copies get weight gradients.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from molex.esft.layers import ExpertLayer, ExpertWeights, gate_of, may_group, weigh
from molex.kernels.grouped import sort_pairs, unsort

IMPLEMENTATION = "molex_esft"

Gate = Callable[[Tensor], Tensor]


class Pairs(NamedTuple):
    """N = T K of them, in the order of the tokens."""

    x: Tensor  # (T, H)
    ids: Tensor  # (N,)
    places: Tensor  # (N,): which copy stands for the expert, -1 = none

    def rows(self, order: Tensor) -> Tensor:
        """(N, H): the tokens of pairs in this order."""
        return self.x[order // (len(self.ids) // max(len(self.x), 1))]


class TunedExperts(nn.Module):
    """The copies, n of them, in float32 over a 16-bit base: at ESFT's learning rates bfloat16 would round most updates
    away. Products run in the base's dtype."""

    place: Tensor  # (E,)

    def __init__(self, layer: ExpertLayer, expert_ids: Sequence[int]):
        super().__init__()
        self.expert_ids = tuple(expert_ids)
        chosen = torch.tensor(self.expert_ids, device=layer.gate_up.device)
        master = torch.promote_types(layer.gate_up.dtype, torch.float32)
        self.gate_up = nn.Parameter(layer.gate_up.detach()[chosen].to(master))
        self.down = nn.Parameter(layer.down.detach()[chosen].to(master))
        place_E = torch.full((layer.num_experts,), -1, device=chosen.device)
        place_E[chosen] = torch.arange(len(chosen), device=chosen.device)
        self.register_buffer("place", place_E, persistent=False)

    def forward(self, originals: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the layer computes with the copies in it: x (T, H), ids and weights (T, K)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        base = ExpertWeights(originals.gate_up_proj, originals.down_proj)  # type: ignore[arg-type]
        tuned = ExpertWeights(self.gate_up.to(dtype), self.down.to(dtype))
        pairs = Pairs(x.to(dtype), ids.reshape(-1), self.place[ids.reshape(-1)])
        compute = by_groups if may_group(pairs.x, base) else by_experts
        return weigh(compute(pairs, base, tuned, gate_of(originals)), weights, x.dtype)

    def weights(self, dtype: torch.dtype) -> dict[int, ExpertWeights]:
        """The copies as they are now, by expert."""
        pairs = zip(self.gate_up.detach().to(dtype), self.down.detach().to(dtype), strict=True)
        return {expert: ExpertWeights(*pair) for expert, pair in zip(self.expert_ids, pairs, strict=True)}

    @torch.no_grad()
    def put(self, weights: Mapping[int, ExpertWeights]) -> None:
        """Gives every copy these values."""
        self.gate_up.copy_(torch.stack([weights[expert].gate_up for expert in self.expert_ids]))
        self.down.copy_(torch.stack([weights[expert].down for expert in self.expert_ids]))


def tuned_forward(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Among transformers' implementations of experts: of modules that were taken over."""
    copies: nn.Module = module.esft  # type: ignore[assignment]
    return copies(module, x, ids, weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, tuned_forward)


def by_experts(pairs: Pairs, base: ExpertWeights, tuned: ExpertWeights, gate: Gate) -> Tensor:
    """(N, H): one expert after the other. Copies that nobody chose take part with no row, so that every rank of a
    distributed run has gradients for all."""
    num_experts, num_copies = len(base.gate_up), len(tuned.gate_up)
    sorted_N, order_N = pairs.ids.where(pairs.places < 0, num_experts + pairs.places).sort(stable=True)
    counts = torch.bincount(sorted_N, minlength=num_experts + num_copies).tolist()
    weights = zip((*base.gate_up, *tuned.gate_up), (*base.down, *tuned.down), strict=True)
    parts = [
        F.linear(gate(F.linear(rows, gate_up)), down)
        for number, (rows, (gate_up, down)) in enumerate(zip(pairs.rows(order_N).split(counts), weights, strict=True))
        if len(rows) or number >= num_experts
    ]
    return unsort(torch.cat(parts), order_N)


def by_groups(pairs: Pairs, base: ExpertWeights, tuned: ExpertWeights, gate: Gate) -> Tensor:
    """(N, H): all originals in one grouped product, all copies in another; each skips the other's rows."""
    from_base = _grouped(pairs, pairs.ids.where(pairs.places < 0, -1), base, gate)
    return _grouped(pairs, pairs.places, tuned, gate).where(pairs.places[:, None] >= 0, from_base)


def _grouped(pairs: Pairs, owners_N: Tensor, weights: ExpertWeights, gate: Gate) -> Tensor:
    """owners -1 = nobody: what those rows hold is left unwritten, forward and backward, so it is masked."""
    plan = sort_pairs(owners_N, len(weights.gate_up))
    x_NH = pairs.rows(plan.order).where(plan.somebody, 0)
    hidden_ND = F.grouped_mm(x_NH, weights.gate_up.transpose(1, 2), offs=plan.ends).where(plan.somebody, 0)
    y_NH = F.grouped_mm(gate(hidden_ND), weights.down.transpose(1, 2), offs=plan.ends).where(plan.somebody, 0)
    return unsort(y_NH, plan.order)
