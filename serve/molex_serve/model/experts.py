"""Expert-swap adapters over one mixture-of-experts base: a pool of expert slots in each layer, and who is sent where.

    slots 0..M-1 hold the base's experts, M..M+S-1 adapters'      table (handles + 1, M) int32, row 0 the identity
    y[t] = Σ_k w[t, k] · expert[table[handle[t], ids[t, k]]] (x[t])

Routers stay as they are, weights too; only ids change. The layer's own parameters become views of the first slots, so
nothing is in memory twice, and slots are taken one by one from those that are free: no adapter has room reserved for
experts that it does not bring, and layers may have different numbers of them.
"""

import heapq
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from molex.errors import StateError
from molex.esft.layers import (
    ExpertLayer,
    ExpertWeights,
    find_layers,
    gate_of,
    give_back,
    may_group,
    own_forward,
    take_over,
    weigh,
)
from molex_serve.adapters.base import ExpertSwap
from molex_serve.errors import BadAdapter, LoadBusy
from molex_serve.memory.arena import arena
from molex_serve.model.reroute import Rerouted, reroute
from molex_serve.model.step import Step

IMPLEMENTATION = "molex_served"


class ExpertPool:
    """`step` says whose tokens the next forwards have, None = the base's. `attach`, `detach` are called between them.

    Raises TargetError on a model without mixture-of-experts layers, StateError where others compute them already,
    BackendError where there is no memory.
    """

    def __init__(self, model: nn.Module, num_slots: int, num_handles: int):
        self.step: Step | None = None
        self.num_slots = num_slots
        self.layers: dict[str, SlotLayer] = {}
        self._handles: set[int] = set()
        found = find_layers(model)
        for layer in found.values():
            if hasattr(layer.module, "esft") or hasattr(layer.module, "molex_slots"):
                raise StateError(f"{layer.name} is being tuned or served already: revert, merge or close that first")
        try:
            for layer in found.values():
                self.layers[layer.name] = SlotLayer(layer, num_slots, num_handles, self)
        except Exception:
            self.close()
            raise

    def attach(self, handle: int, adapter: ExpertSwap) -> None:
        """Writes an adapter's experts, then sends its tokens to them. Raises LoadBusy where too few slots are free,
        BadAdapter where there never are enough; then nothing has changed."""
        assert handle not in self._handles, handle
        for name, experts in adapter.experts.items():
            self.layers[name].check_room(len(experts), adapter.source)
        try:
            for name, experts in adapter.experts.items():
                self.layers[name].fill(handle, experts)
        except Exception:
            self._drop(handle)
            raise
        self._handles.add(handle)
        for layer in self.layers.values():
            layer.point(handle)

    def detach(self, handle: int) -> None:
        """Gives an adapter's slots and their memory back; its tokens would be the base's."""
        self._handles.remove(handle)
        self._drop(handle)

    def close(self) -> None:
        """Gives the model back as it was: the same parameters, in memory of their own."""
        self.step = None
        self._handles.clear()
        for layer in self.layers.values():
            layer.close()
        self.layers.clear()

    def handles(self) -> frozenset[int]:
        return frozenset(self._handles)

    def __contains__(self, handle: int) -> bool:
        return handle in self._handles

    def committed_bytes(self) -> int:
        """Of all slots, the base's included."""
        return sum(own.gate_up.committed_bytes + own.down.committed_bytes for own in self.layers.values())

    def free_slots(self) -> int:
        """Of the layer that has fewest."""
        return min(len(layer.free) for layer in self.layers.values())

    def distinct(self) -> float:
        """How many different experts the last rerouted forward read, per layer; 0 before one. Waits for the device."""
        counts = [layer.counts for layer in self.layers.values() if layer.counts is not None]
        return sum(int((own > 0).sum()) for own in counts) / max(len(counts), 1)

    def _drop(self, handle: int) -> None:
        for layer in self.layers.values():
            layer.drop(handle)


class SlotLayer:
    """One layer's slots. What is attached to the module, so copies of the module share it."""

    def __init__(self, layer: ExpertLayer, num_slots: int, num_handles: int, pool: ExpertPool):
        self.layer, self.pool = layer, pool
        num_experts, device, dtype = layer.num_experts, layer.gate_up.device, layer.gate_up.dtype
        self.num_slots = num_experts + num_slots
        self.gate_up = arena((self.num_slots, *layer.gate_up.shape[1:]), dtype, device)
        self.down = arena((self.num_slots, *layer.down.shape[1:]), dtype, device)
        self.free = list(range(num_experts, self.num_slots))  # a heap: the lowest is next
        self.owned: dict[int, dict[int, int]] = {}  # handle -> expert -> slot
        self.table = torch.arange(num_experts, dtype=torch.int32, device=device).repeat(num_handles + 1, 1)
        self.counts: Tensor | None = None  # (M + S,) of the last rerouted forward
        self.gate_up.commit(0, num_experts)
        self.down.commit(0, num_experts)
        for parameter, memory in ((layer.gate_up, self.gate_up), (layer.down, self.down)):
            memory.tensor[:num_experts].copy_(parameter.detach())
            parameter.data = memory.tensor[:num_experts]
        self._own_config = take_over(layer.module, IMPLEMENTATION)
        layer.module.molex_slots = self  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, object]) -> "SlotLayer":
        return self

    def check_room(self, num_experts: int, source: str) -> None:
        """Raises LoadBusy, or BadAdapter, where so many experts have no place."""
        there = self.num_slots - self.layer.num_experts
        if num_experts > there:
            raise BadAdapter(
                f"{source} replaces {num_experts} experts of {self.layer.name}, there are {there} slots: raise "
                "expert_slots"
            )
        if num_experts > len(self.free):
            raise LoadBusy(
                f"{source} needs {num_experts} expert slots of {self.layer.name}, {len(self.free)} of {there} are "
                "free: unload an adapter, or wait"
            )

    @torch.no_grad()
    def fill(self, handle: int, experts: Mapping[int, ExpertWeights]) -> None:
        """Raises BackendError where there is no memory; `drop` undoes what was done before."""
        owned = self.owned[handle] = {}
        for expert, weights in experts.items():
            slot = self.free[0]
            self.gate_up.commit(slot, slot + 1)
            try:
                self.down.commit(slot, slot + 1)
            except Exception:
                self.gate_up.release(slot, slot + 1)
                raise
            owned[expert] = heapq.heappop(self.free)
            self.gate_up.tensor[slot].copy_(weights.gate_up)
            self.down.tensor[slot].copy_(weights.down)

    def point(self, handle: int) -> None:
        """Sends an adapter's tokens to its own experts."""
        owned = self.owned.get(handle)
        if owned:
            row_M = torch.arange(self.layer.num_experts, dtype=torch.int32)
            row_M[[*owned]] = torch.tensor([*owned.values()], dtype=torch.int32)
            self.table[handle] = row_M.to(self.table.device)

    def drop(self, handle: int) -> None:
        owned = self.owned.pop(handle, {})
        self.table[handle] = self.table[0]
        for slot in owned.values():
            self.gate_up.release(slot, slot + 1)
            self.down.release(slot, slot + 1)
            heapq.heappush(self.free, slot)

    def close(self) -> None:
        for parameter, memory in ((self.layer.gate_up, self.gate_up), (self.layer.down, self.down)):
            parameter.data = memory.tensor[: self.layer.num_experts].clone()
            memory.close()
        self.owned.clear()
        give_back(self.layer.module, self._own_config)
        del self.layer.module.molex_slots

    def forward(self, module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The module's own implementation, on its own experts, where no token's adapter has others here."""
        step = self.pool.step
        if step is None or self.owned.keys().isdisjoint(step.present):
            return own_forward(module, self._own_config)(module, x, ids, weights)
        assert len(step.handles) == len(x), f"{len(x)} tokens in a step of {len(step.handles)}"
        return self._rerouted(module, x, ids, weights, step.handles)

    @torch.no_grad()
    def _rerouted(self, module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, handles: Tensor) -> Tensor:
        routed = reroute(self.table, handles, ids, self.num_slots)
        self.counts = routed.counts
        experts = ExpertWeights(self.gate_up.tensor, self.down.tensor)
        order_N = routed.slots.flatten().argsort(stable=True)
        x_NH = x[order_N // ids.shape[1]]
        multiply = all_slots if may_group(x, experts) else slot_by_slot
        y_NH = torch.empty_like(x_NH)
        y_NH[order_N] = multiply(x_NH, routed, experts, module)
        return weigh(y_NH, weights, x.dtype)


def served_forward(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Among transformers' implementations of experts: of modules whose experts are in a pool."""
    slots: SlotLayer = module.molex_slots  # type: ignore[assignment]
    return slots.forward(module, x, ids, weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, served_forward)


def all_slots(x_NH: Tensor, routed: Rerouted, experts: ExpertWeights, module: nn.Module) -> Tensor:
    """(N, H), sorted by slot: two grouped products over all slots; those that nobody has cost a GPU next to nothing,
    and the host waits for nothing."""
    ends_S = routed.counts.cumsum(0, dtype=torch.int32)
    hidden_ND = F.grouped_mm(x_NH, experts.gate_up.transpose(1, 2), offs=ends_S)
    return F.grouped_mm(gate_of(module)(hidden_ND), experts.down.transpose(1, 2), offs=ends_S)


def slot_by_slot(x_NH: Tensor, routed: Rerouted, experts: ExpertWeights, module: nn.Module) -> Tensor:
    """The same in any dtype, slots that nobody has left out: `grouped_mm` on a CPU takes time for each of them."""
    active = routed.counts.nonzero().flatten()
    slots, sizes = active.tolist(), routed.counts[active].tolist()
    inner_NI = gate_of(module)(_products(x_NH, experts.gate_up, slots, sizes))
    return _products(inner_NI, experts.down, slots, sizes)


def _products(rows: Tensor, matrices: Tensor, slots: list[int], sizes: list[int]) -> Tensor:
    """Neighbouring rows, so many each, times the transposed matrices of these slots."""
    out = rows.new_empty(len(rows), matrices.shape[1])
    for slot, own, place in zip(slots, rows.split(sizes), out.split(sizes), strict=True):
        torch.mm(own, matrices[slot].T, out=place)
    return out
