"""Tokens through slots in batched products equal a loop over tokens, whoever has how many, wherever the slots are."""

import random
from dataclasses import replace

import pytest
import torch

from molex.errors import BackendError
from molex.experts import LoRA
from molex_serve.adapters.base import LowRank
from molex_serve.errors import BadAdapter, LoadBusy
from molex_serve.memory.mapped import MappedArena
from molex_serve.model.batches import GAP, MANY, batches_of
from molex_serve.model.columns import ColumnPool
from molex_serve.model.step import Span, Step

CPU = torch.device("cpu")


def step_of(lengths: list[tuple[int, int]], padding: int = 0) -> Step:
    """(handle, tokens) side by side, and padding."""
    spans, end = [], 0
    for handle, length in lengths:
        spans.append(Span(handle, end, end + length))
        end += length
    step = Step.of(tuple(spans), CPU)
    return Step(step.spans, torch.cat([step.handles, torch.zeros(padding, dtype=torch.int64)]))


@pytest.mark.parametrize("seed", range(40))
def test_random_steps(seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ranks = (8, 16)
    handles = range(1, draw.choice([2, 5, 12]))
    slots = {rank: draw.sample(range(16), len(handles)) for rank in ranks}
    places = {h: (rank := draw.choice(ranks), slots[rank].pop()) for h in handles}
    lengths = [
        (draw.choice([0, *handles]), draw.choice([1, 1, 1, 2, 3, 9, 12, 40])) for _ in range(draw.randint(1, 14))
    ]
    step = step_of(lengths, draw.choice([0, 3]))
    A = {rank: torch.randn(16, rank, 6, generator=generator) for rank in ranks}
    B = {rank: torch.randn(16, rank, 5, generator=generator) for rank in ranks}
    x, y = (torch.randn(len(step.handles), width, generator=generator) for width in (6, 5))
    wanted = y.clone()
    for t, handle in enumerate(step.handles.tolist()):
        if handle:
            rank, slot = places[handle]
            wanted[t] += B[rank][slot].T @ (A[rank][slot] @ x[t])
    found = batches_of(step, {h: places[h] for h in step.present})
    for batch in found:
        batch.add(A[batch.rank][batch.slots].mT, B[batch.rank][batch.slots], x, y)
    torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(y[step.handles == 0], wanted[step.handles == 0]), "the base's tokens are not touched"
    assert frozenset().union(*(batch.handles for batch in found)) == {*step.present}


def test_neighbours_share_a_product_and_many_tokens_have_their_own() -> None:
    places = {h: (8, slot) for h, slot in zip(range(1, 6), (0, 1, 2 + GAP, 9, 10), strict=True)}
    step = step_of([(1, 1), (2, 1), (3, 1), (5, 1), (4, MANY + 1), (1, 1)])
    found = {(batch.slots.start, batch.slots.stop): batch for batch in batches_of(step, places)}
    assert found.keys() == {(0, 3 + GAP), (9, 10), (10, 11)}
    assert found[9, 10].take == slice(4, 4 + MANY + 1)
    in_order = batches_of(step_of([(1, 1), (2, 1)]), places)
    assert [batch.take for batch in in_order] == [slice(0, 2)], "nothing is moved that lies in order"


def test_neighbours_with_few_tokens_do_not_wait_for_one_with_more() -> None:
    places = {h: (8, h) for h in range(1, 7)}
    step = step_of([(1, 1), (2, 4), (3, 9), (4, 16), (5, 30), (6, 2)])
    found = {(batch.slots.start, batch.slots.stop): batch for batch in batches_of(step, places)}
    rows = {slots: len(batch.take) for slots, batch in found.items() if isinstance(batch.take, torch.Tensor)}
    assert rows == {(1, 3): 2 * 4, (3, 5): 2 * 16}
    assert found.keys() - rows.keys() == {(5, 6), (6, 7)}


def test_a_slot_is_erased_and_given_again() -> None:
    linear = torch.nn.Linear(6, 5)
    pool = ColumnPool(24)

    def adapter(rank: int, value: float) -> LowRank:
        lora = LoRA(torch.full((rank, 6), value), torch.full((5, rank), value), 2.0)
        return LowRank(kind="lora", generation="g", num_bytes=1, source="s", factors={"q": lora})

    pool.add(1, adapter(3, 1.0), {"q": linear})
    pool.add(2, adapter(16, 1.0), {"q": linear})
    assert (pool.places[1].rank, pool.places[2].rank, pool.num_free()) == (8, 16, 0)
    with pytest.raises(LoadBusy, match="no 8 columns"):
        pool.add(3, adapter(1, 1.0), {"q": linear})
    assert pool.places.keys() == {1, 2}
    pool.remove(1)
    pool.add(4, adapter(2, 3.0), {"q": linear})
    A, B = pool.sites["q"].by_rank[8]
    assert A.tensor[0].tolist() == [[3.0] * 6] * 2 + [[0.0] * 6] * 6, "nothing is left of who was there"
    assert B.tensor[0, :2].tolist() == [[6.0] * 5] * 2
    for handle in (2, 4):
        pool.remove(handle)
    assert pool.committed_bytes() == 0


def test_without_memory_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = {name: torch.nn.Linear(6, 5) for name in "qkv"}
    pool = ColumnPool(24)
    factors = {name: LoRA(torch.ones(8, 6), torch.ones(5, 8), 1.0) for name in linears}
    adapter = LowRank(kind="lora", generation="g", num_bytes=1, source="s", factors=factors)
    commits: list[int] = []

    def commit(self: MappedArena, start: int, stop: int) -> None:
        commits.append(start)
        if len(commits) == 4:
            raise BackendError("no memory")
        right(self, start, stop)

    right = MappedArena.commit
    monkeypatch.setattr(MappedArena, "commit", commit)
    with pytest.raises(BackendError):
        pool.add(1, adapter, linears)
    assert pool.committed_bytes() == 0
    assert not pool.places
    assert pool.num_free() == 24
    pool.add(1, adapter, linears)
    with pytest.raises(BadAdapter, match="takes 32 columns, there are 24"):
        pool.add(2, replace(adapter, factors={"q": LoRA(torch.ones(17, 6), torch.ones(5, 17), 1.0)}), linears)
