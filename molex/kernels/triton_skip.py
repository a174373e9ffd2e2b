"""Set-sorted expand on Triton kernels: many columns, tokens in the order of their experts, one pass over y.

    h = A x,  g = G * h (all columns, one read of x);   y = x Wᵀ;   y += B g, tile by tile, over its own columns alone

`triton` multiplies every column's zeros, `triton_grouped` reads and writes y once for each of a token's experts.
Between them: 64 tokens with like experts need the columns of few, and are one tile. Backward is `triton`'s.
"""

import math
from collections.abc import Iterator
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from molex.kernels.base import backends
from molex.kernels.columns import Columns
from molex.kernels.cost import WIDE, Shape, Step, moved, product
from molex.kernels.preload import Expand
from molex.kernels.triton_backend import Triton
from molex.routing import Routing

SORTING = 30  # launches on index tensors
TILE = 64  # tokens


@backends.register("triton_skip")
class TritonSkip(Triton):
    """Single linears; the two ends of a feed-forward block are `triton`'s."""

    has_blocks: ClassVar[bool] = False

    def steps(self, shape: Shape) -> Iterator[Step] | None:
        T, D, O, C, s = shape.num_tokens, shape.num_in, shape.num_out, shape.num_columns, shape.itemsize  # noqa: E741
        yield moved(T, shape.num_slots, 8 * WIDE, launches=SORTING)
        yield product(T, C, D, s)
        yield moved(T, C, s, launches=0)
        yield product(T, O, D, s)
        yield product(T, O, round(experts_of_tile(shape) * shape.rank), s, onto=True)
        if shape.backward:
            yield from self.backward_steps(shape)

    def expand(self, columns: Columns, routing: Routing) -> Expand:
        from molex.kernels.triton import expand_add_tiles, tile_tokens

        tiles = tile_tokens(routing.expert_ids, columns.expert_of_column, len(columns.ranks))

        def expanded(x: Tensor, W: Tensor, bias: Tensor | None, gated: Tensor, B: Tensor) -> Tensor:
            return expand_add_tiles(F.linear(x, W, bias), gated, B, tiles)

        return expanded


def experts_of_tile(shape: Shape) -> float:
    """How many experts a tile of neighbours needs: its own, and one more for each other set that it holds."""
    sets = math.comb(shape.num_experts, shape.num_slots)
    return min(shape.num_experts, shape.num_slots + sets * TILE / max(shape.num_tokens, 1))
