"""Several ranks: sums over all of them, and whole tensors and true sizes where sharding leaves a rank only its part.

ZeRO-3 leaves an empty tensor between uses and remembers the rest in attributes; FSDP2 leaves a DTensor. Gathering is a
collective: every rank must call, with the same parameters in the same order. On whole parameters nothing happens.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_elements(parameter: Tensor) -> int:
    """How many numbers the whole parameter has, however little of it is on this rank."""
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The whole parameter's shape."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has partitioned are whole, to be read."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(partitioned):
        yield


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without gradients: themselves where they are whole, gathered copies where they are sharded."""
    return {name: _whole(tensor) for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    full_tensor = getattr(tensor.detach(), "full_tensor", None)  # DTensor's own; importing the class takes a second
    if full_tensor is not None:
        return full_tensor()
    if not hasattr(tensor, "ds_id"):
        return tensor.detach()
    with gathered([tensor]):
        return tensor.detach().clone()


@torch.no_grad()
def put(place: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor into a parameter or buffer, sharded or not: each rank keeps its part. A collective too."""
    if hasattr(place, "device_mesh"):
        distribute = import_module("torch.distributed.tensor").distribute_tensor
        place.copy_(distribute(tensor.to(place.device, place.dtype), place.device_mesh, place.placements))  # type: ignore[attr-defined]
    elif hasattr(place, "ds_id"):
        with import_module("deepspeed").zero.GatheredParameters([place], modifier_rank=0):
            place.copy_(tensor)
    else:
        place.copy_(tensor)


def all_ranks(value: Tensor) -> Tensor:
    """Sum over ranks, with gradient."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _SumOverRanks.apply(value)  # type: ignore[return-value]
    return value


class _SumOverRanks(torch.autograd.Function):
    """Every rank's result is the sum, so every rank's gradient flows back to each rank's summand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
