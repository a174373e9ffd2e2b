"""The one way numeric results are compared: with float64, and with what plain PyTorch achieves in the same dtype."""

import torch
from torch import Tensor

# relative root mean square error against float64: about twice (ten times in float32, for other orders of
# summation) the worst that plain products show; under 1e-2, so that a 1% scale fails in every dtype
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def assert_close(name: str, got: Tensor, truth64: Tensor, same_dtype: Tensor) -> None:
    """Compares `got` with the float64 truth; `same_dtype` is plain PyTorch's result in got's dtype.

    Fails unless all is finite, the relative RMS error is under TOLERANCE, and the largest error is under twice that
    of same_dtype (or of one rounding of the largest value, where same_dtype happens to be exact).
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
    relative = float(error.square().mean().sqrt() / truth64.square().mean().sqrt())
    assert relative < TOLERANCE[got.dtype], f"{name}: relative RMS error {relative:.3g} >= {TOLERANCE[got.dtype]:.3g}"
    plain_error = (same_dtype.double() - truth64).abs().max()
    limit = 2 * max(plain_error, largest * torch.finfo(got.dtype).eps / 2)
    assert error.abs().max() <= limit, f"{name}: error {error.abs().max():.3g}, plain PyTorch has {plain_error:.3g}"
