"""leftᵀ right in float32, against float64."""

import pytest
import torch

from molex.kernels.triton import skinny_wgrad
from tests.close import assert_close
from tests.kernels.triton.problems import DEVICE, DTYPES, embedded

SHAPES = [  # T, C, N
    (37, 40, 24),
    (31, 23, 41),
    (1, 8, 16),
    (128, 70, 100),
    (600, 3, 5),  # T is split, its last part short
    (0, 8, 24),
    (5, 1, 1),
    (9, 130, 128),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    num_tokens, num_columns, width = shape
    left = embedded(torch.randn(num_tokens, num_columns, device=DEVICE).to(dtype))
    right = embedded(torch.randn(num_tokens, width, device=DEVICE).to(dtype))
    got = skinny_wgrad(left, right)
    # products of 16-bit numbers are exact in float32, and nothing is rounded after the sum
    assert_close("wgrad", got, left.double().T @ right.double(), left.float().T @ right.float())


def test_a_gradient_of_stride_zero() -> None:
    left, right = torch.randn(20, 8, device=DEVICE), torch.ones((), device=DEVICE).expand(20, 24)
    expected = left.double().sum(0)[:, None].expand(8, 24)
    assert_close("wgrad", skinny_wgrad(left, right), expected, left.T @ right)
