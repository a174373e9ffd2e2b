"""The activations of feed-forward blocks and their slopes, in float32, as kernels and in the names users know."""

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """act(x) and act'(x). gelu_tanh is x σ(2y), since (1 + tanh y) / 2 = σ(2y): no cancellation, as in silu."""
    if ACTIVATION == "relu":
        value = tl.where(x <= 0, 0.0, x)  # lets NaN through, which a maximum does not
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * below
        slope = below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        inner = x * (1.5957691216057308 + 0.07135481627260025 * x * x)
        inner_slope = 1.5957691216057308 + 0.21406444881780076 * x * x
        share = tl.sigmoid(inner)
        value = x * share
        slope = share + value * tl.sigmoid(-inner) * inner_slope  # 1 - share would cancel where inner_slope is large
    else:
        tl.static_assert(ACTIVATION == "silu")
        share = tl.sigmoid(x)
        value = x * share
        slope = share + value * (1 - share)
    return value, slope
