"""The kernel contract: three operations with autograd, all made of one that every backend writes, `pairs`.

    linear   y = base(x) + Σ_k w_k · B_e A_e x                      e = the token's k-th expert
    widen    stream 0 = base(x);   stream k = base(x) + w_k · B_e A_e x
    narrow   y = base(h_0 + Σ_k v_k (h_k − h_0)) + Σ_k w_k · B_e A_e h_k

widen and narrow are the two ends of a MixLoRA feed-forward block: the last projection is linear, so
Σ v_k W h_k = W Σ v_k h_k and the base runs once each way. Where the router's weights sum to 1 stream 0 has no share:
it is left out, and h_1 + Σ_{k>1} v_k (h_k − h_1) is the same. The difference forms leave the base bit for bit at B = 0
even where float weights do not sum to exactly 1.

A backend receives the base module, because the best plans fold the experts into the base's own product; the ones
here call the base as it is, in its own input shape, and add.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from molex.kernels.block import Block, Projection
from molex.kernels.columns import Columns
from molex.kernels.cost import Shape, Step
from molex.kernels.streams import ACTIVATIONS
from molex.registry import Registry
from molex.routing import Routing

Form = Literal["linear", "widen", "narrow"]


class Backend(ABC):
    """Subclasses override `pairs`, and whatever they compute faster than through it.

    raced: `auto` takes it only after a race on the device, which shows that it is right and faster there.
    has_blocks: it has a plan of its own for whole feed-forward blocks.
    """

    raced: ClassVar[bool] = False
    has_blocks: ClassVar[bool] = False

    def supports(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> str | None:
        """None, or the reason why this backend cannot run these shapes and dtypes, or over this base."""
        return None

    def steps(self, shape: Shape) -> Iterator[Step] | None:
        """What `linear` multiplies and moves, forward and, where asked, backward. None: `auto` never picks this one."""
        return None

    def give_back(self, base: nn.Module) -> None:  # noqa: B027 (most have nothing to undo)
        """A base leaves its mixture: undo what this plan has done to it."""

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
        """(..., D) -> (K+1, ..., O): the base's stream, left out where weights are normalised, and one a slot."""
        y = base(x)
        rows_TD = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
        streams_KTO = self.widen_add(y.reshape(-1, y.shape[-1]), rows_TD, columns, routing)
        streams = streams_KTO.view(len(streams_KTO), *y.shape)
        return torch.cat([y[None], streams]) if routing.base_streams else streams

    def widen_add(self, y: Tensor, rows: Tensor, columns: Columns, routing: Routing) -> Tensor:
        """y (T, O) and, apart, what each slot's expert adds for rows (T, D): (K, T, O)."""
        return y + self.widen_delta(rows, columns, routing).to(y.dtype)

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
        """(K+1, ..., D), or (K, ..., D) as `widen` gives them, -> (..., O). mix (T, K) are the v_k: the routing's
        weights before the experts' scale."""
        own = own_streams(streams if dropped is None else dropped, routing)
        return self.narrow_add(mix_streams(streams, mix), own.flatten(1, -2), base, columns, routing)

    def ffn(self, x: Tensor, block: Block) -> Tensor:
        """A whole gated block: (..., D) -> (..., D)."""
        streams = ACTIVATIONS[block.activation].forward(self._widened(x, block.gate)) * self._widened(x, block.up)
        dropped = None if block.keep is None else streams * block.keep.view(*streams.shape[1:])
        down, mix = block.down, block.routing.weights
        return self.narrow(streams, down.base, down.columns, down.routing, mix, dropped=dropped)

    def _widened(self, x: Tensor, one: Projection) -> Tensor:
        return self.widen(x, one.base, one.columns, one.routing, dropped=one.source)

    def narrow_add(self, mixed: Tensor, streams: Tensor, base: nn.Module, columns: Columns, routing: Routing) -> Tensor:
        """base(mixed), (..., D) -> (..., O), and what the slots' experts add, each to its own stream (K, T, D)."""
        y = base(mixed)
        return y + self.narrow_delta(streams, columns, routing).view(y.shape).to(y.dtype)


class _Mix(torch.autograd.Function):
    """Saves the streams, which the experts need anyway, and none of the K differences."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, mix: Tensor) -> Tensor:
        ctx.save_for_backward(streams, mix)
        if len(mix) == 1 and mix.dtype == streams.dtype:
            return torch.lerp(streams[0], streams[1], mix[0])
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
            grad_mix[k] = (streams[k + 1] - streams[0]).mul_(grad).sum(-1, keepdim=True, dtype=mix.dtype)
        return grad_streams, grad_mix


def mix_streams(streams: Tensor, mix: Tensor) -> Tensor:
    """h_0 + Σ_k v_k (h_k − h_0), mix (T, K) -> (..., D); exactly h_0 where all streams are equal.

    streams: (K+1, ..., D), or (K, ..., D) where v sum to 1, so that the first one takes what the others leave.
    """
    num_others = len(streams) - 1
    if num_others == 0:
        return streams[0]
    others = mix[:, mix.shape[1] - num_others :]
    return _Mix.apply(streams, others.T.reshape(num_others, *streams.shape[1:-1], 1))


def own_streams(streams: Tensor, routing: Routing) -> Tensor:
    """The streams of the chosen experts: all, or all but the base's."""
    return streams[1:] if routing.base_streams else streams  # a slice of all would cost a copy in its backward


backends: Registry[type[Backend]] = Registry("backend")
