"""The low-rank adapters that are resident, as columns of one pool: an adapter has the same range of columns everywhere.

    y[t] += B g[t],  g[t] = G[t] * (A x[t])         G[t, c] = 1 where column c is of the token's adapter

Each linear that any of them changes has A (Cap, D) and Bᵀ (Cap, O) in memory that is only reserved until a range is
written: a linear that an adapter leaves alone costs it no byte, and the gates of a step are the same at all linears.
Scales and shares are folded into B.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molex.linears import execution_device, features
from molex_serve.adapters.base import LowRank
from molex_serve.errors import LoadBusy
from molex_serve.memory.arena import Arena, arena
from molex_serve.memory.slots import Range, Ranges
from molex_serve.model.step import Step

ALIGNED = 8  # columns: rows of 16-bit gates begin at multiples of 16 bytes
# on a processor's cores: one token, one column, one of D + O numbers; and the overhead of a segment
DENSE_SECONDS = 1.5e-11
SEGMENT_SECONDS = 1.2e-5


class Site(NamedTuple):
    """One linear's columns."""

    A: Arena  # (Cap, D)
    B: Arena  # (Cap, O), transposed
    holders: set[int]  # handles of the adapters that change it


class Segment(NamedTuple):
    """Neighbouring tokens of one adapter, and its columns."""

    tokens: slice
    columns: slice
    handle: int


class Columns:
    """What a step needs of the pool: either tokens [start, stop) through their own columns, adapter by adapter, or all
    tokens through all columns in use, gated."""

    def __init__(self, segments: tuple[Segment, ...], index: slice | Tensor | None, gates: Tensor | None):
        self.segments, self.index, self.gates = segments, index, gates
        self.handles = frozenset(segment.handle for segment in segments)
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, site: Site, x: Tensor, y: Tensor) -> None:
        """x (T, D), y (T, O), in place."""
        if self.handles.isdisjoint(site.holders):
            return
        if self.gates is None:
            self._by_segment(site, x, y)
        else:
            A_CD, B_CO = self._factors(site)
            y.addmm_((x @ A_CD.T).mul_(self.gates), B_CO)

    def _by_segment(self, site: Site, x: Tensor, y: Tensor) -> None:
        A, B = site.A.tensor, site.B.tensor
        for tokens, columns, handle in self.segments:
            if handle in site.holders:
                y[tokens].addmm_(x[tokens] @ A[columns].T, B[columns])

    def _factors(self, site: Site) -> tuple[Tensor, Tensor]:
        """(C, D) and (C, O): a view where the columns are neighbours, else a copy that steps of the same adapters
        share."""
        if isinstance(self.index, slice):
            return site.A.tensor[self.index], site.B.tensor[self.index]
        known = self._taken.get(id(site.A))
        if known is None:
            known = self._taken[id(site.A)] = site.A.tensor[self.index], site.B.tensor[self.index]
        return known

    def regated(self, segments: tuple[Segment, ...], gates: Tensor) -> "Columns":
        """For another step of the same adapters."""
        again = Columns(segments, self.index, gates)
        again._taken = self._taken
        return again


class ColumnPool:
    """Who has which columns. `add` and `remove` are called between steps."""

    def __init__(self, num_columns: int):
        self.num_columns = num_columns
        self.free = Ranges(num_columns, ALIGNED)
        self.sites: dict[str, Site] = {}
        self._ranges: dict[int, Range] = {}
        self._last: tuple[tuple[int, ...], Columns] | None = None

    @torch.no_grad()
    def add(self, handle: int, adapter: LowRank, linears: Mapping[str, nn.Module]) -> None:
        """Writes an adapter's columns. Raises LoadBusy where no range is free; then nothing has changed."""
        taken = self.free.take(adapter.rank)
        if taken is None:
            raise LoadBusy(f"no {adapter.rank} columns are free of {self.num_columns}: unload an adapter, or wait")
        self._ranges[handle], self._last = taken, None
        for name, lora in adapter.factors.items():
            if name not in self.sites:
                self.sites[name] = open_site(linears[name], self.num_columns)
            site = self.sites[name]
            start, stop = taken.start, taken.start + len(lora.A)
            for memory, rows in ((site.A, lora.A), (site.B, (lora.scale * lora.B).T)):
                memory.commit(taken.start, taken.stop)
                memory.tensor[start:stop] = rows.to(memory.tensor)
            site.holders.add(handle)

    def remove(self, handle: int) -> None:
        """Gives an adapter's columns and their memory back."""
        taken = self._ranges.pop(handle)
        self._last = None
        for site in self.sites.values():
            if handle in site.holders:
                site.holders.remove(handle)
                site.A.release(taken.start, taken.stop)
                site.B.release(taken.start, taken.stop)
        self.free.give(taken)

    def close(self) -> None:
        for site in self.sites.values():
            site.A.close()
            site.B.close()
        self.sites.clear()

    def committed_bytes(self) -> int:
        return sum(site.A.committed_bytes + site.B.committed_bytes for site in self.sites.values())

    def handles(self) -> set[int]:
        """Of the adapters that have columns."""
        return {*self._ranges}

    def of(self, step: Step) -> Columns | None:
        """What a step needs; None where none of its tokens has columns here."""
        segments = self._segments(step)
        if not segments:
            return None
        handles = tuple(sorted({segment.handle for segment in segments}))
        if self._by_segment_is_faster(segments, step):
            return Columns(segments, None, None)
        if self._last is None or self._last[0] != handles:
            self._last = handles, Columns(segments, self._index(handles, step.handles.device), None)
        columns = self._last[1]
        return columns.regated(segments, self._gates(handles, columns.index, step))

    def _segments(self, step: Step) -> tuple[Segment, ...]:
        joined: list[Segment] = []
        for handle, start, stop, _ in step.spans:
            own = self._ranges.get(handle)
            if own is None:
                continue
            if joined and joined[-1].handle == handle and joined[-1].tokens.stop == start:
                start = joined.pop().tokens.start
            joined.append(Segment(slice(start, stop), slice(own.start, own.stop), handle))
        return tuple(joined)

    def _by_segment_is_faster(self, segments: tuple[Segment, ...], step: Step) -> bool:
        if step.handles.device.type != "cpu" or not self.sites:
            return False
        widths = [memory.tensor.shape[1] for site in self.sites.values() for memory in (site.A, site.B)]
        each = DENSE_SECONDS * 2 * sum(widths) / len(widths)
        num_columns = sum(len(self._ranges[handle]) for handle in {segment.handle for segment in segments})
        own = sum(_length(s.tokens) * _length(s.columns) for s in segments)
        return SEGMENT_SECONDS * len(segments) + each * own < each * len(step.handles) * num_columns

    def _index(self, handles: Iterable[int], device: torch.device) -> slice | Tensor:
        """Their columns: a slice where they fill one nearly, else one by one."""
        ranges = [self._ranges[handle] for handle in handles]
        first, last = min(own.start for own in ranges), max(own.stop for own in ranges)
        if last - first <= 2 * sum(map(len, ranges)):
            return slice(first, last)
        return torch.cat([torch.arange(own.start, own.stop, device=device) for own in ranges])

    def _gates(self, handles: tuple[int, ...], index: slice | Tensor | None, step: Step) -> Tensor:
        """(T, C): 1 in the columns of a token's adapter."""
        device, tables = step.handles.device, next(iter(self.sites.values())).A.tensor
        owner_C = torch.full((self.num_columns,), -1, device=device)
        for handle in handles:
            owner_C[self._ranges[handle].start : self._ranges[handle].stop] = handle
        return (step.handles[:, None] == owner_C[index]).to(tables.dtype)


def open_site(linear: nn.Module, num_columns: int) -> Site:
    """Memory for the columns of one linear, none of it committed."""
    sizes, weight = features(linear), linear.weight
    assert sizes is not None
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    A, B = (arena((num_columns, width), dtype, execution_device(linear)) for width in sizes)
    return Site(A, B, set())


def _length(part: slice) -> int:
    return part.stop - part.start
