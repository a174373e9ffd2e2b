"""Sums and means over a batch that is spread over layers, devices and ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def masked_mean(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of values (T_i, F) under masks (T_i,), over all parts and all ranks -> (F,); 0 where nothing is real."""
    sums_F = add_up([(values * mask[:, None]).sum(0) for values, mask in rows])
    count = add_up([mask.sum() for _, mask in rows]).to(sums_F.dtype)
    both = all_ranks(torch.cat([sums_F, count[None]]))
    return both[:-1] / both[-1].clamp(min=1)


def add_up(terms: list[Tensor]) -> Tensor:
    """The sum of equally shaped terms, which may lie on different devices; on the first one's."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum(0)


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
