"""How the tokens of a step go through the slots of low-rank adapters: in few products, each factor read once.

An adapter with many tokens in the step has a product of its own over each of its texts. Of the others, those in
neighbouring slots with about as many tokens are one batched product: M rows for each slot, M the most tokens that one
of them has.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from molex_serve.model.step import Span, Step

FEW, MANY = 4, 32  # tokens: up to FEW all are alike; beyond MANY a product of its own is as fast
GAP = 1  # slots between neighbours that are read for nothing, rather than begin another product


class Batch(NamedTuple):
    """Of slots of one rank. take (N M,): tokens, M for each slot, any token where it has fewer; a slice where they lie
    side by side and are all its own. place: which of the N M are of tokens; tokens: of which."""

    rank: int
    slots: slice
    handles: frozenset[int]
    take: slice | Tensor
    place: Tensor | None = None
    tokens: Tensor | None = None

    def add(self, A: Tensor, B: Tensor, x: Tensor, y: Tensor) -> None:
        """A (N, D, R), B (N, R, O), x (T, D), y (T, O), in place."""
        num_slots = len(A)
        if num_slots == 1 and isinstance(self.take, slice):
            y[self.take].addmm_(x[self.take] @ A[0], B[0])
            return
        hidden = torch.bmm(x[self.take].view(num_slots, -1, x.shape[1]), A)
        if isinstance(self.take, slice):
            y[self.take].view(num_slots, -1, y.shape[1]).baddbmm_(hidden, B)
            return
        added = torch.bmm(hidden, B).view(-1, y.shape[1])
        assert self.tokens is not None
        y.index_add_(0, self.tokens, added if self.place is None else added[self.place])


Batches = tuple[Batch, ...]


def batches_of(step: Step, places: Mapping[int, tuple[int, int]]) -> Batches:
    """places: (rank, slot) of each adapter of the step that has one."""
    spans = sorted((span for span in step.spans if span.handle in places), key=lambda span: span.handle)
    of_adapter = {handle: [*own] for handle, own in groupby(spans, key=lambda span: span.handle)}
    sizes = {handle: _size(sum(span.stop - span.start for span in own)) for handle, own in of_adapter.items()}
    many = [handle for handle, size in sizes.items() if size > MANY]
    found = [batch for handle in many for batch in _own_products(of_adapter[handle], *places[handle])]
    others = sorted(_Placed(sizes[handle], *places[handle], handle) for handle in sizes if sizes[handle] <= MANY)
    for run in _neighbours(others):
        found.append(_one_product(run, of_adapter, step.handles.device))
    return tuple(found)


def _size(num_tokens: int) -> int:
    """The next power of two, so that less than half of what is computed together is padding."""
    return max(FEW, 1 << (num_tokens - 1).bit_length())


def _own_products(spans: list[Span], rank: int, slot: int) -> Iterator[Batch]:
    for span in _joined(spans):
        yield Batch(rank, slice(slot, slot + 1), frozenset({span.handle}), slice(span.start, span.stop))


def _joined(spans: list[Span]) -> list[Span]:
    """Texts of one adapter that lie side by side as one."""
    joined = spans[:1]
    for span in spans[1:]:
        if span.start == joined[-1].stop:
            joined[-1] = joined[-1]._replace(stop=span.stop)
        else:
            joined.append(span)
    return joined


class _Placed(NamedTuple):
    """An adapter that shares a product with its neighbours."""

    size: int
    rank: int
    slot: int
    handle: int


def _neighbours(placed: list[_Placed]) -> Iterator[list[_Placed]]:
    """Runs of one size and rank without larger gaps."""
    run = placed[:1]
    for one, following in pairwise(placed):
        if following[:2] != one[:2] or following.slot - one.slot > 1 + GAP:
            yield run
            run = []
        run.append(following)
    if run:
        yield run


def _one_product(run: list[_Placed], spans: Mapping[int, list[Span]], device: torch.device) -> Batch:
    first, last = run[0], run[-1]
    rows = {p.slot: [t for span in spans[p.handle] for t in range(span.start, span.stop)] for p in run}
    most = max(map(len, rows.values()))
    take, place = [], []
    for slot in range(first.slot, last.slot + 1):
        own = rows.get(slot, [])
        place += range(len(take), len(take) + len(own))
        take += own + [0] * (most - len(own))
    slots, handles = slice(first.slot, last.slot + 1), frozenset(one.handle for one in run)
    full = len(place) == len(take)
    if full and take == list(range(take[0], take[0] + len(take))):
        return Batch(first.rank, slots, handles, slice(take[0], take[0] + len(take)))
    indices = torch.tensor(take, device=device)
    if full:
        return Batch(first.rank, slots, handles, indices, None, indices)
    places = torch.tensor(place, device=device)
    return Batch(first.rank, slots, handles, indices, places, indices[places])
