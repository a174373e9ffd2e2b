"""The checker itself: a test that cannot fail proves nothing."""

import pytest
import torch
from torch import Tensor

from tests.close import TOLERANCE, assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def result(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """A product in float64, and the same in the dtype."""
    x, w = torch.randn(70, 48, dtype=torch.float64), torch.randn(40, 48, dtype=torch.float64)
    x, w = x.to(request.param).double(), w.to(request.param).double()
    return x @ w.T, x.to(request.param) @ w.to(request.param).T


def test_accepts_plain_pytorch_and_one_rounding(result: tuple[Tensor, Tensor]) -> None:
    truth, plain = result
    assert_close("y", plain, truth, plain)
    assert_close("y", truth.to(plain.dtype), truth, plain)
    assert_close("y", truth.to(plain.dtype), truth, truth.to(plain.dtype))


def _wrong(kind: str, plain: Tensor) -> Tensor:
    wrong = plain.clone()
    if kind == "zeros":
        wrong.zero_()
    elif kind == "1% scale":
        wrong = wrong * 1.01
    elif kind == "one wrong row":
        wrong[17] = wrong[18]
    elif kind == "one NaN":
        wrong[3, 5] = torch.nan
    elif kind == "one wrong value":
        wrong[3, 5] = wrong[3, 5] * 0.9 + 0.1 * wrong.abs().max()
    else:
        wrong = wrong[:-1]
    return wrong


@pytest.mark.parametrize("kind", ["zeros", "1% scale", "one wrong row", "one NaN", "one wrong value", "a row less"])
def test_rejects(kind: str, result: tuple[Tensor, Tensor]) -> None:
    truth, plain = result
    with pytest.raises(AssertionError, match=r"^y:"):
        assert_close("y", _wrong(kind, plain), truth, plain)


def test_rejects_another_dtype() -> None:
    truth = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="float32"):
        assert_close("y", truth.float(), truth, truth.half())


def test_a_zero_truth_wants_exact_zeros() -> None:
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    assert_close("y", zeros.clone(), zeros, zeros)
    with pytest.raises(AssertionError, match="zero everywhere"):
        assert_close("y", zeros + 1e-12, zeros, zeros)


def test_every_tolerance_is_below_a_percent() -> None:
    assert max(TOLERANCE.values()) < 0.01
