"""The kernel contract: three operations with autograd, all made of one that every backend writes, `pairs`.

    linear   y = base(x) + Σ_k w_k · B_e A_e x                      e = the token's k-th expert
    widen    stream 0 = base(x);   stream k = base(x) + w_k · B_e A_e x
    narrow   y = base(h_0 + Σ_k v_k (h_k − h_0)) + Σ_k w_k · B_e A_e h_k

widen and narrow are the two ends of a MixLoRA feed-forward block: the last projection is linear, so
Σ v_k W h_k = W Σ v_k h_k and the base runs once each way. The difference form leaves the base bit for bit
at B = 0 even where float weights do not sum to exactly 1.

A backend receives the base module, because the best plans fold the experts into the base's own product; the ones
here call the base as it is, in its own input shape, and add.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molex.kernels.columns import Columns
from molex.registry import Registry
from molex.routing import Routing

Form = Literal["linear", "widen", "narrow"]


class Backend(ABC):
    """Subclasses override `pairs`, and whatever they compute faster than through it."""

    def supports(self, x: Tensor, columns: Columns, routing: Routing) -> str | None:
        """None, or the reason why this backend cannot run these shapes and dtypes."""
        return None

    @abstractmethod
    def pairs(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, columns: Columns) -> Tensor:
        """Each row through one expert: weights[n] · B_e A_e rows[n], e = expert_ids[n], zero where e = -1.

        rows (N, D), expert_ids (N,), weights (N,) -> (N, O).
        """

    def delta(self, x: Tensor, columns: Columns, routing: Routing, hidden: Tensor | None = None) -> Tensor:
        """What the experts add: (T, D) -> (T, O). hidden (T, C) is A x, where the caller has it already."""
        num_slots = routing.expert_ids.shape[1]
        rows_ND = x.repeat_interleave(num_slots, dim=0)
        y_NO = self.pairs(rows_ND, routing.expert_ids.flatten(), routing.weights.flatten(), columns)
        return y_NO.view(x.shape[0], num_slots, y_NO.shape[-1]).sum(1)

    def widen_delta(self, x: Tensor, columns: Columns, routing: Routing) -> Tensor:
        """What each slot's expert adds, apart: (T, D) -> (K, T, O)."""
        num_slots = routing.expert_ids.shape[1]
        rows_ND = x.expand(num_slots, -1, -1).flatten(0, 1)
        y_NO = self.pairs(rows_ND, routing.expert_ids.T.flatten(), routing.weights.T.flatten(), columns)
        return y_NO.view(num_slots, x.shape[0], y_NO.shape[-1])

    def narrow_delta(self, streams: Tensor, columns: Columns, routing: Routing) -> Tensor:
        """What the slots' experts add together, each to its own stream: (K, T, D) -> (T, O)."""
        ids_N, weights_N = routing.expert_ids.T.flatten(), routing.weights.T.flatten()
        y_NO = self.pairs(streams.flatten(0, 1), ids_N, weights_N, columns)
        return y_NO.view(*streams.shape[:2], y_NO.shape[-1]).sum(0)

    def linear(
        self,
        x: Tensor,
        base: nn.Module,
        columns: Columns,
        routing: Routing,
        *,
        dropped: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """(..., D) -> (..., O). dropped: x after LoRA dropout, where that is on."""
        rows_TD = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
        return self.add(base(x), rows_TD, columns, routing, hidden)

    def add(self, y: Tensor, rows: Tensor, columns: Columns, routing: Routing, hidden: Tensor | None) -> Tensor:
        """y (..., O) and what the experts add for rows (T, D)."""
        return y + self.delta(rows, columns, routing, hidden).view(y.shape).to(y.dtype)

    def widen(
        self, x: Tensor, base: nn.Module, columns: Columns, routing: Routing, *, dropped: Tensor | None = None
    ) -> Tensor:
        """(..., D) -> (K+1, ..., O): the base's stream and one for each slot."""
        y = base(x)
        rows_TD = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
        deltas_KTO = self.widen_delta(rows_TD, columns, routing)
        return torch.cat([y[None], y + deltas_KTO.view(len(deltas_KTO), *y.shape).to(y.dtype)])

    def narrow(
        self,
        streams: Tensor,
        base: nn.Module,
        columns: Columns,
        routing: Routing,
        mix: Tensor,
        *,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """(K+1, ..., D) -> (..., O). mix (T, K) are the v_k: the routing's weights before the experts' scale."""
        y = base(mix_streams(streams, mix))
        rows = (streams if dropped is None else dropped)[1:]
        delta_TO = self.narrow_delta(rows.flatten(1, -2), columns, routing)
        return y + delta_TO.view(y.shape).to(y.dtype)


class _Mix(torch.autograd.Function):
    """Saves the streams, which the experts need anyway, and none of the K differences."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, mix: Tensor) -> Tensor:
        ctx.save_for_backward(streams, mix)
        mixed = streams[0].to(mix.dtype, copy=True)
        for stream, weight in zip(streams[1:], mix, strict=True):
            mixed += weight * (stream - streams[0])
        return mixed.to(streams.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        streams, mix = ctx.saved_tensors
        (grad,) = grads
        grad_streams = torch.empty_like(streams)
        grad_streams[0] = (1 - mix.sum(0)) * grad
        grad_mix = torch.empty_like(mix)
        for k, weight in enumerate(mix):
            grad_streams[k + 1] = weight * grad
            grad_mix[k] = (grad * (streams[k + 1] - streams[0])).sum(-1, keepdim=True, dtype=mix.dtype)
        return grad_streams, grad_mix


def mix_streams(streams: Tensor, mix: Tensor) -> Tensor:
    """h_0 + Σ_k v_k (h_k − h_0): (K+1, ..., D), (T, K) -> (..., D); exactly h_0 where all streams are equal."""
    return _Mix.apply(streams, mix.T.reshape(mix.shape[1], *streams.shape[1:-1], 1))


backends: Registry[type[Backend]] = Registry("backend")
