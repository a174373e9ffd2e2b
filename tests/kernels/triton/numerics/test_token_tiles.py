"""Tokens sorted by their experts, and an expand that skips columns: nothing needed is skipped, nothing else is kept."""

import pytest
import torch

from molex.kernels.triton import expand_add_tiles, tile_tokens
from molex.kernels.triton.token_tiles import COLUMNS, ROWS, set_order, tile_experts
from tests.close import assert_close
from tests.kernels.triton.problems import CASES, DEVICE, DTYPES, Case, column_by_column, embedded, make

MORE = [
    Case("many experts", num_tokens=200, ranks=(16,) * 20),
    Case("unequal, many", num_tokens=130, num_out=130, ranks=(3, 40, 1, 17) * 4),
    Case("more experts a token than a key has digits", num_tokens=70, ranks=(1,) * 70, top_k=20),
]


def needed_blocks(ids: list[list[int]], owner: list[int]) -> list[int]:
    experts = {expert_id for row in ids for expert_id in row}
    return sorted({c // COLUMNS for c, expert_id in enumerate(owner) if expert_id in experts})


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_every_token_is_there_once_and_tiles_name_what_they_need(case: Case) -> None:
    p = make(case, torch.float32)
    tiles = tile_tokens(p.expert_ids, p.expert_of_column, len(case.ranks))
    assert sorted(tiles.order.tolist()) == list(range(case.num_tokens))
    ids, owner = p.expert_ids[tiles.order].tolist(), p.expert_of_column.tolist()
    for tile, (blocks, count) in enumerate(zip(tiles.blocks.tolist(), tiles.counts.tolist(), strict=True)):
        assert blocks[:count] == needed_blocks(ids[tile * ROWS : (tile + 1) * ROWS], owner)


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_tiles_name_their_experts(case: Case) -> None:
    ids_TK = case.expert_ids().to(DEVICE)
    order, experts, counts = tile_experts(ids_TK, len(case.ranks))
    assert sorted(order.tolist()) == list(range(case.num_tokens))
    for tile, (listed, count) in enumerate(zip(experts.tolist(), counts.tolist(), strict=True)):
        chosen = ids_TK[order[tile * ROWS : (tile + 1) * ROWS]]
        assert listed[:count] == sorted(set(chosen[chosen >= 0].tolist()))


def test_sorted_tiles_need_fewer_columns_than_tokens_as_they_came() -> None:
    case = Case("64 experts of rank 16", num_tokens=4096, ranks=(16,) * 64)
    ids_TK = case.expert_ids().to(DEVICE)
    owner = torch.arange(1024, device=DEVICE) // 16
    sorted_mean = tile_tokens(ids_TK, owner, 64).counts.float().mean()
    as_they_came = [ids_TK[i : i + ROWS].unique().numel() for i in range(0, 4096, ROWS)]
    assert sum(as_they_came) / len(as_they_came) > 50
    assert 15 < sorted_mean < 30


def test_the_order_is_by_the_rarest_expert() -> None:
    ids_TK = torch.tensor([[0, 1], [2, 0], [-1, -1], [1, 0], [0, 2], [0, -1], [3, 0]], device=DEVICE)
    # served: 0 six times, 1 and 2 twice, 3 once; of equals the lower id comes first
    assert set_order(ids_TK, 4).tolist() == [6, 0, 3, 1, 4, 5, 2]
    # served: 0 twice, 1 three times, 2 once
    assert set_order(torch.tensor([[1], [0], [1], [2], [0], [1]], device=DEVICE), 3).tolist() == [3, 1, 4, 0, 2, 5]


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_expand(dtype: torch.dtype, case: Case) -> None:
    p = make(case, dtype)
    gated = embedded(column_by_column(p)[1].to(dtype))
    truth = p.y.double() + gated.double() @ p.B.double().T
    expected = torch.addmm(p.y, gated, p.B.T)
    tiles, y = tile_tokens(p.expert_ids, p.expert_of_column, len(case.ranks)), embedded(p.y)
    assert expand_add_tiles(y, gated, p.B, tiles) is y
    assert_close("y", y, truth, expected)


@torch.no_grad()
def test_columns_that_a_tile_does_not_need_are_not_read() -> None:
    p = make(Case("two experts of 16", ranks=(16, 16), top_k=1, num_tokens=20), torch.float32)
    gated, ids_TK = torch.ones(20, 32, device=DEVICE), torch.ones_like(p.expert_ids)
    gated[:, :16] = torch.nan
    y = expand_add_tiles(torch.zeros_like(p.y), gated, p.B, tile_tokens(ids_TK, p.expert_of_column, 2))
    torch.testing.assert_close(y, p.B[:, 16:].sum(1).expand_as(y))
