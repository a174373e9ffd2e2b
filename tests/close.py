"""The one way numeric results are compared: with float64, and with what plain PyTorch achieves in the same dtype."""

import torch
from torch import Tensor

# relative root mean square error against float64: about twice (ten times in float32, for other orders of
# summation) the worst that plain products show; under 1e-2, so that a 1% scale fails in every dtype
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}

# one in 16 bits, where rounding the result is most of the error; some in float32, for other orders of summation; in
# float64 the truth is no truer than the result
ROUNDINGS = {torch.float64: 1e4, torch.float32: 4, torch.float16: 1, torch.bfloat16: 1}


def assert_close(
    name: str, got: Tensor, truth64: Tensor, same_dtype: Tensor, products: torch.dtype | None = None, depth: int = 1
) -> None:
    """Compares `got` with the float64 truth; `same_dtype` is plain PyTorch's result in got's dtype.

    products: the dtype of the products behind it, where that is narrower than the result's. depth: how many of them
    stand in a row, each rounding what the next one reads.

    Fails unless all is finite, the relative RMS error is under TOLERANCE, and the largest error is under twice that
    of same_dtype (or of ROUNDINGS of the largest value, where same_dtype happens to be closer).
    """
    assert got.dtype == same_dtype.dtype, f"{name}: {got.dtype}, expected {same_dtype.dtype}"
    assert got.shape == truth64.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth64.shape)}"
    assert truth64.dtype == torch.float64, f"{name}: the truth is {truth64.dtype}"
    if truth64.numel() == 0:
        return
    assert bool(got.isfinite().all()), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values not finite"
    error, largest = got.double() - truth64, truth64.abs().max()
    if largest == 0:
        assert bool((got == 0).all()), f"{name}: {got.abs().max():.3g} where the truth is zero everywhere"
        return
    products = products or got.dtype
    relative = float(error.square().mean().sqrt() / truth64.square().mean().sqrt())
    allowed = depth * TOLERANCE[products]
    assert relative < allowed, f"{name}: relative RMS error {relative:.3g} >= {allowed:.3g}"
    plain_error = (same_dtype.double() - truth64).abs().max()
    limit = 2 * max(plain_error, largest * torch.finfo(products).eps / 2 * ROUNDINGS[products] * depth)
    worst = error.abs().max()
    assert worst <= limit, f"{name}: error {worst:.3g} > {limit:.3g}, plain PyTorch has {plain_error:.3g}"
