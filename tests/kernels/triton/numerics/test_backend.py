"""Backends on their kernels: the tests of every backend. In the interpreter's process only those on Triton run, on a
GPU all of them, their tensors on it."""

from tests.kernels.test_backends import (  # noqa: F401 (collected here)
    test_activations_at_hand_are_used,
    test_batch_dimensions_and_dropped_rows,
    test_experts_of_zero_leave_the_base_bit_for_bit,
    test_gradients_of_a_transposed_input_and_of_what_dropout_left,
    test_output_and_gradients,
)
from tests.kernels.test_planner import test_an_explicit_choice_is_taken  # noqa: F401 (collected here)
