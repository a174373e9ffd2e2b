"""The kernel against a loop, where it can run."""

import pytest
import torch

from molex_serve.model.reroute_triton import fused_reroute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("num_tokens", "num_slots", "num_experts", "num_handles"),
    [(1, 1, 4, 1), (5, 3, 8, 3), (43, 6, 64, 20), (128, 2, 8, 2), (300, 8, 16, 5), (0, 2, 4, 1)],
)
@pytest.mark.parametrize("strided", [False, True])
def test_against_a_loop(num_tokens: int, num_slots: int, num_experts: int, num_handles: int, strided: bool) -> None:
    size = num_experts + 7
    table = torch.randint(0, size, (num_handles + 1, num_experts), dtype=torch.int32, device=DEVICE)
    handles = torch.randint(0, num_handles + 1, (num_tokens,), device=DEVICE)
    ids = torch.randint(0, num_experts, (num_tokens, 2 * num_slots), device=DEVICE)
    ids = ids[:, ::2] if strided else ids[:, :num_slots].contiguous()
    slots, counts = fused_reroute(table, handles, ids, size)
    expected = [[int(table[h, e]) for e in row] for h, row in zip(handles.tolist(), ids.tolist(), strict=True)]
    assert slots.tolist() == expected
    flat = [slot for row in expected for slot in row]
    assert counts.tolist() == [flat.count(slot) for slot in range(size)]
    assert slots.dtype == counts.dtype == torch.int32


def test_it_is_a_well_formed_operator() -> None:
    table = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    handles, ids = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(fused_reroute, (table, handles, ids, 6), test_utils=("test_schema", "test_faketensor"))
