"""Casts of the experts' factors, kept from one step of a generation to the next.

Masters are float32 over a 16-bit base too. A cast at every token would read 4 and write 2 bytes of each of their
numbers, to multiply by it once. What is kept is used only where it cannot be stale:

- the same parameters lie in the same memory, and autograd has counted no write to them since;
- the call continues the KV cache of the last one by one token, without gradients. This ends it for writes that
  autograd does not count (`p.data`, numpy, fused optimizers): after them a KV cache is stale too, or filled anew;
- no tracing, and no recording of a CUDA graph, whose replays would never cast again;
- no sharding and no offloading, which fill and empty a parameter's memory as they like.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from molex.kernels.columns import Columns

KV_CACHES = ("past_key_values", "cache_params", "cache")  # as transformers' models, Mambas and batching server call it

TOKENS = ("input_ids", "inputs_embeds")

Stamp = tuple[object, ...]


class Casts:
    """One for a model. A copy, and what is loaded from disk, starts without any."""

    def __init__(self) -> None:
        self._kv_cache: ref[object] | None = None
        self._kept: dict[int, tuple[Sequence[Tensor], Stamp, Columns]] = {}  # by the identity of the first parameter

    def __reduce__(self) -> tuple[type["Casts"], tuple[()]]:
        return Casts, ()

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """A forward starts, called with these arguments. One that does not go on with the last one's text forgets."""
        if torch.compiler.is_compiling():
            return
        kv_cache = next((found for name in KV_CACHES if (found := arguments.get(name)) is not None), None)
        goes_on = self._kv_cache is not None and self._kv_cache() is kv_cache and _is_one_token(arguments)
        if kv_cache is None or torch.is_grad_enabled() or not goes_on:
            self._kept = {}  # another dict: a thread that is still in the last call writes to the old one
            self._kv_cache = ref(kv_cache) if type(kv_cache).__weakrefoffset__ else None  # not of a tuple

    def columns(self, masters: Sequence[nn.Parameter], dtype: torch.dtype, make: Callable[[], Columns]) -> Columns:
        """make() in a dtype. masters: the parameters that it reads, and nothing else that ever changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self._kv_cache is None:
            return make().to(dtype)
        kept = self._kept
        if all(master.dtype == dtype for master in masters) or not _whole_and_counted(masters):
            return make().to(dtype)
        stamp = (dtype, *((master.data_ptr(), master._version) for master in masters))
        known = kept.get(id(masters[0]))
        if known is not None and known[1] == stamp and all(map(_is, known[0], masters)):
            return known[2]
        columns = make().to(dtype)
        kept[id(masters[0])] = (masters, stamp, columns)
        return columns


def _is_one_token(arguments: Mapping[str, Any]) -> bool:
    tokens = next((found for name in TOKENS if (found := arguments.get(name)) is not None), None)
    return tokens is None or tokens.shape[1] == 1


def _is(one: object, other: object) -> bool:
    return one is other


def _whole_and_counted(masters: Sequence[Tensor]) -> bool:
    """Whether nothing but counted writes changes these parameters in the middle of a generation."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return False
    if masters[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return all(type(master) is nn.Parameter and not master.is_inference() for master in masters)
