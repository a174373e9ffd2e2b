"""Numbers that overflow stay with the request that has them.

Where attention has a mask, the requests of a step share one product: to each of them, another's value counts 0 times,
and another's score has the mask added to it. But 0 · inf is NaN, and no mask outweighs inf. So one adapter whose
activations overflow would spoil everybody's tokens, and the prefixes that are kept of them. In a cache, what is no
number of a sane size is therefore 0.
"""

import torch
from torch import Tensor

from molex_serve.engine.mla import Update

MOST = 1e18  # a product with any sane number is finite, in all types but float16, which ends long before


def finite(update: Update) -> Update:
    """A cache's `update` that keeps no key and no value which is not finite, or larger than MOST."""

    def finite_update(
        key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, object]
    ) -> tuple[Tensor, Tensor]:
        return update(_sane(key_states), _sane(value_states), layer_idx, kwargs)

    return finite_update


def _sane(x: Tensor) -> Tensor:
    return torch.where(x.abs() <= MOST, x, 0)
