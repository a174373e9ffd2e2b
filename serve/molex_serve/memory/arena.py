"""Which arena a device has: reserved addresses where it can, else an ordinary tensor, and a warning says why."""

import warnings

import torch

from molex_serve.memory import cuda_vmm, mapped
from molex_serve.memory.base import Arena
from molex_serve.memory.cuda_vmm import CudaArena
from molex_serve.memory.eager import EagerArena
from molex_serve.memory.mapped import MappedArena

__all__ = ["Arena", "arena"]


def arena(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Arena:
    """A tensor of this shape, no row of which is committed. Raises BackendError where its addresses cannot be had."""
    if device.type == "cpu":
        reason = mapped.why_not()
        if reason is None:
            return MappedArena(shape, dtype)
    elif device.type == "cuda":
        reason = cuda_vmm.why_not(device)
        if reason is None:
            return CudaArena(shape, dtype, cuda_vmm.device_of(device))
    else:
        reason = f"{device.type} has no virtual memory here"
    warnings.warn(f"adapters' memory on {device} is allocated at once: {reason}", RuntimeWarning, stacklevel=2)
    return EagerArena(shape, dtype, device)
