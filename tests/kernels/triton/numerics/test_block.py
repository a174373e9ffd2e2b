"""Whole feed-forward blocks on their kernels: the tests of every backend, of which those on Triton run here."""

from tests.kernels.test_ffn import (  # noqa: F401 (collected here)
    test_experts_of_zero_leave_the_base_bit_for_bit,
    test_output_and_gradients,
)
