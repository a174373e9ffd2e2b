"""How many bytes of tensors are alive at once, exactly, on any machine: every new storage counts until it is freed.

    with LiveBytes() as live:
        step()
    live.peak, live.holders()

With `pretended()` around it nothing is computed: tensors have shapes alone, so that a model that fits in no memory here
is measured as it would be. Whatever is asked of the numbers, such as whether a mask is all true, is then answered with
True. What an operator needs inside itself is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Holder(NamedTuple):
    """Who made a storage: the module, the operator, and the tensor it was made for."""

    module: str
    operator: str
    shape: tuple[int, ...]
    dtype: str


class LiveBytes(TorchDispatchMode):
    """`now` and `peak` (bytes) of what was made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.modules = [""]
        self._live: dict[int, tuple[Holder, int]] = {}
        self._at_peak: dict[int, tuple[Holder, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True
        result = func(*args, **(kwargs or {}))
        made, returns = result if isinstance(result, tuple | list) else (result,), func._schema.returns
        for number, tensor in enumerate(made):
            aliases = returns[min(number, len(returns) - 1)].alias_info is not None
            if isinstance(tensor, Tensor) and not aliases:
                self._add(tensor, func.name().removeprefix("aten::"))
        return result

    def _add(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._live:
            return
        holder = Holder(self.modules[-1], operator, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        self._live[storage._cdata] = holder, storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata)
        self.now += storage.nbytes()
        if self.now > self.peak:
            self.peak, self._at_peak = self.now, dict(self._live)

    def _free(self, key: int) -> None:
        self.now -= self._live.pop(key)[1]

    def holders(self) -> Counter[Holder]:
        """The bytes alive at the peak, by who made them."""
        found: Counter[Holder] = Counter()
        for holder, num_bytes in self._at_peak.values():
            found[holder] += num_bytes
        return found

    @contextmanager
    def naming(self, model: nn.Module, short: Callable[[str], str]) -> Iterator[None]:
        """Has holders say in which module's forward they were made, by its name made short. A mixture layer's base is
        left alone: some backends refuse one with hooks."""
        handles = []
        for name, module in model.named_modules():
            if not name.endswith(".base"):
                enter, leave = self._enter(short(name)), self._leave
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *call: self.modules.append(name)

    def _leave(self, *call: object) -> None:
        self.modules.pop()


def pretended() -> AbstractContextManager[Any]:
    """Tensors that are shapes alone."""
    return FakeTensorMode(allow_non_fake_inputs=True)
