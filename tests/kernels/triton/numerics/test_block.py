"""Whole feed-forward blocks on their kernels: the tests of every backend, of which those on Triton run here."""

import pytest
import torch

from molex.kernels import backends
from molex.kernels.race import like_block, race
from tests.kernels.test_ffn import (  # noqa: F401 (collected here)
    Case,
    block_of,
    make,
    test_experts_of_zero_leave_the_base_bit_for_bit,
    test_output_and_gradients,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("normalised", "top_k"), [(True, 2), (True, 1), (False, 2)])
def test_a_race_finds_them_right(normalised: bool, top_k: int, dtype: torch.dtype) -> None:
    p = make(Case("raced", num_tokens=40, inner=64, top_k=top_k, normalised=normalised), dtype)
    contestants = {name: backends[name]() for name in ("dense", "triton")}
    assert race(like_block(p.x.detach(), block_of(p)), contestants, contestants["dense"]).keys() == contestants.keys()
