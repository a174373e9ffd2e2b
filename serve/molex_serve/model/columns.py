"""The low-rank adapters that are resident: slots of one pool, the same slot at every linear.

    y[t] += B_s (A_s x[t])          s: the slot of the token's adapter

Adapters of like rank (8, 16, 32, …; zeros fill up) lie side by side as A (slots, R, D) and Bᵀ (slots, R, O), so that
tokens of neighbouring slots are one batched product, which reads every factor once and multiplies no zeros between
adapters. Memory is only reserved until a slot is written: a linear that an adapter leaves alone costs it no byte.
Scales and shares are folded into B.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molex.linears import execution_device, features
from molex_serve.adapters.base import LowRank
from molex_serve.errors import BadAdapter, LoadBusy
from molex_serve.memory.arena import Arena, arena
from molex_serve.memory.slots import Ranges
from molex_serve.model.batches import Batch, Batches, batches_of
from molex_serve.model.step import Step

LEAST_RANK = 8


class Place(NamedTuple):
    """Where an adapter is."""

    rank: int  # of its slot
    slot: int


class Factors(NamedTuple):
    """Of one linear and one rank."""

    A: Arena  # (slots, R, D)
    B: Arena  # (slots, R, O), transposed


class Part(NamedTuple):
    """Of what a step adds at one linear."""

    batch: Batch
    A: Tensor  # (N, D, R)
    B: Tensor  # (N, R, O)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x (T, D), y (T, O), in place."""
        self.batch.add(self.A, self.B, x, y)


def factor_dtype(linear: nn.Module) -> torch.dtype:
    """In which factors beside a linear are kept: its own, or torch's where that is quantised."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.dtype if weight.is_floating_point() else torch.get_default_dtype()


class Site:
    """One linear's factors. holders: handles of the adapters that change it."""

    def __init__(self, linear: nn.Module, num_columns: int):
        sizes = features(linear)
        assert sizes is not None
        self.sizes, self.num_columns, self.device = sizes, num_columns, execution_device(linear)
        self.dtype = factor_dtype(linear)
        self.by_rank: dict[int, Factors] = {}
        self.holders: set[int] = set()

    def factors(self, rank: int) -> Factors:
        """Reserved when first asked for."""
        if rank not in self.by_rank:
            shapes = [(self.num_columns // rank, rank, width) for width in self.sizes]
            self.by_rank[rank] = Factors(*(arena(shape, self.dtype, self.device) for shape in shapes))
        return self.by_rank[rank]

    def write(self, place: Place, A: Tensor, B: Tensor) -> None:
        """A (R, D), B (O, R) of at most the slot's rank. Where there is no memory for both, there is neither."""
        factors = self.factors(place.rank)
        factors.A.commit(place.slot, place.slot + 1)
        try:
            factors.B.commit(place.slot, place.slot + 1)
        except Exception:
            factors.A.release(place.slot, place.slot + 1)
            raise
        for memory, rows in zip(factors, (A, B.T), strict=True):
            memory.tensor[place.slot, : len(rows)] = rows.to(memory.tensor)

    def erase(self, place: Place) -> None:
        for memory in self.factors(place.rank):
            memory.release(place.slot, place.slot + 1)

    def parts(self, batches: Batches) -> Iterator[Part]:
        """The factors of those of a step's batches that change this linear."""
        for batch in batches:
            if batch.rank in self.by_rank and not self.holders.isdisjoint(batch.handles):
                A, B = self.by_rank[batch.rank]
                yield Part(batch, A.tensor[batch.slots].transpose(1, 2), B.tensor[batch.slots])

    def arenas(self) -> list[Arena]:
        return [memory for factors in self.by_rank.values() for memory in factors]


class ColumnPool:
    """Who is where. `add` and `remove` are called between steps."""

    def __init__(self, num_columns: int):
        self.num_columns = num_columns
        self.sites: dict[str, Site] = {}
        self.places: dict[int, Place] = {}  # by handle
        self._free: dict[int, Ranges] = {}  # by rank

    @torch.no_grad()
    def add(self, handle: int, adapter: LowRank, linears: Mapping[str, nn.Module]) -> None:
        """Writes an adapter into a slot. Raises BadAdapter where there never is one so wide, LoadBusy where none is
        free, BackendError where there is no memory; then nothing has changed."""
        rank = max(LEAST_RANK, 1 << (adapter.rank - 1).bit_length())
        if rank > self.num_columns:
            raise BadAdapter(f"{adapter.source} takes {rank} columns, there are {self.num_columns}: raise columns")
        free = self._free.setdefault(rank, Ranges(self.num_columns // rank))
        taken = free.take(1) if rank <= self.num_free() else None
        if taken is None:
            raise LoadBusy(f"no {rank} columns are free of {self.num_columns}: unload an adapter, or wait")
        place = self.places[handle] = Place(rank, taken.start)
        try:
            for name, lora in adapter.factors.items():
                if name not in self.sites:
                    self.sites[name] = Site(linears[name], self.num_columns)
                site = self.sites[name]
                site.write(place, lora.A, lora.scale * lora.B.to(site.dtype))
                site.holders.add(handle)
        except Exception:
            self.remove(handle)
            raise

    def remove(self, handle: int) -> None:
        """Gives an adapter's slot and its memory back."""
        place = self.places.pop(handle)
        for site in self.sites.values():
            if handle in site.holders:
                site.holders.remove(handle)
                site.erase(place)
        self._free[place.rank].give(range(place.slot, place.slot + 1))

    def close(self) -> None:
        for site in self.sites.values():
            for memory in site.arenas():
                memory.close()
        self.sites.clear()
        self.places.clear()

    def num_free(self) -> int:
        """Columns that nobody has."""
        return self.num_columns - sum(place.rank for place in self.places.values())

    def committed_bytes(self) -> int:
        return sum(memory.committed_bytes for site in self.sites.values() for memory in site.arenas())

    def batches(self, step: Step) -> Batches:
        """How the step's tokens go through the slots; none where none of them has one."""
        return batches_of(step, {handle: self.places[handle] for handle in step.present if handle in self.places})

    def parts(self, name: str, batches: Batches) -> tuple[Part, ...]:
        """What they add at one linear."""
        return tuple(self.sites[name].parts(batches)) if name in self.sites else ()
