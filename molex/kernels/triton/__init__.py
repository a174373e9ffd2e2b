"""Triton kernels of the one equation, and the torch operators that launch them: `molex.kernels.triton.ops`.

    h = A x        g = G * h        y += B g                    A (C, D)   B (O, C)   G (T, E), one gate a column

What a mixture adds is limited by memory traffic and launches, not by arithmetic: x should be read once, y touched
once, and only C-wide tensors lie between. Each file is one kernel and the function that launches it.

16-bit factors are multiplied on tensor cores and summed in float32; float32 factors are multiplied in float32, never in
TF32. Written to what Triton 3.6 to 3.9 have in common. With TRITON_INTERPRET=1 in the environment before the first
import of triton, everything here runs on CPU tensors, slowly.
"""

from molex.errors import BackendError

try:
    import triton  # noqa: F401
except ImportError as error:
    raise BackendError("the Triton kernels need the package triton: pip install 'molex[kernels]'") from error

from molex.kernels.triton.ops import (
    expand_add,
    expand_add_tiles,
    gate_backward,
    route_shrink,
    self_gated_shrink,
    shrink_extend,
    shrink_gate,
    skinny_wgrad,
)
from molex.kernels.triton.tiles import DTYPES
from molex.kernels.triton.token_tiles import TokenTiles, tile_tokens

__all__ = [
    "DTYPES",
    "TokenTiles",
    "expand_add",
    "expand_add_tiles",
    "gate_backward",
    "route_shrink",
    "self_gated_shrink",
    "shrink_extend",
    "shrink_gate",
    "skinny_wgrad",
    "tile_tokens",
]
