"""Modules whose scales and balance biases survive `model.to(torch.bfloat16)`.

A cast rounds everything it meets, buffers too: a scale of 2/3 becomes 0.668, and a balance bias that moves by 1e-5
stops moving at 0.004. Parameters are the user's to cast; these few numbers are not.
"""

from collections.abc import Callable
from typing import ClassVar, Self

from torch import Tensor, nn


class Exact(nn.Module):
    """`exact` names the buffers that a cast may widen and move, but never narrows."""

    exact: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype.itemsize < buffer.dtype.itemsize:
                setattr(self, name, buffer.to(moved.device))
        return self
