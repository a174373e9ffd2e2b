"""A linear of the served model: the base's output, and what the adapters of this step's tokens add to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from molex.linears import StandIn, features

Block = Callable[[Tensor], Tensor]


class Adds(ABC):
    """What a step adds at the model's linears, and in its feed-forward blocks."""

    @abstractmethod
    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x (T, D), y (T, O): y with what adapters add, in place."""

    @abstractmethod
    def block(self, name: str, base: Block, x: Tensor, current: "Current") -> Tensor:
        """What a feed-forward block gives for x (T, D)."""


class Current:
    """What the step that runs now adds; None between steps, and where all tokens are the base's."""

    def __init__(self) -> None:
        self.adds: Adds | None = None

    @contextmanager
    def replaced(self, adds: Adds | None) -> Iterator[None]:
        before, self.adds = self.adds, adds
        try:
            yield
        finally:
            self.adds = before


class ServedLinear(StandIn):
    """Stands in the place of a base linear, which stays the very object it was."""

    def __init__(self, name: str, base: nn.Module, current: Current):
        super().__init__()
        self.name, self.base, self.current = name, base, current
        sizes = features(base)
        assert sizes is not None
        self.in_features, self.out_features = sizes
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y, adds = self.base(x), self.current.adds
        if adds is None:
            return y
        return adds.add(self.name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])).view(y.shape)


class ServedBlock:
    """Stands in the `forward` of a feed-forward block in which some adapter has experts."""

    def __init__(self, name: str, module: nn.Module, current: Current):
        self.name, self.module, self.current = name, module, current

    def __call__(self, x: Tensor) -> Tensor:
        adds = self.current.adds
        if adds is None:
            return self.base(x)
        return adds.block(self.name, self.base, x.reshape(-1, x.shape[-1]), self.current).view(x.shape)

    def base(self, x: Tensor) -> Tensor:
        """What the module's own forward gives."""
        return type(self.module).forward(self.module, x)
