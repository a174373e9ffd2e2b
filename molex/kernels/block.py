"""A gated feed-forward block with experts as one operation: what is I wide of an expert is made, used and gone.

    a_0 = act(gate) ⊙ up                            gate = W1 x,  up = W3 x: the base's, once
    a_k = act(gate + B1_e g1_e) ⊙ (up + B3_e g3_e)  g = s A x, C wide; e = the token's k-th expert
    y   = W2 (a_0 + Σ_k v_k (a_k − a_0)) + Σ_k B2_e (w_k A2_e a_k)

`widen` and `narrow` give every expert of a token a stream of its own through the model's activation: K times what the
base saves for its backward. Here gate, up and C-wide tensors are saved, less than the base itself does, and the rest is
computed again. MixLoRA, arXiv 2404.15159. `Core` is what lies between the base's projections; plain torch has it in
`molex.kernels.streams`, Triton in `molex.kernels.triton`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from molex.kernels.columns import Columns
from molex.routing import Routing


class Projection(NamedTuple):
    """One linear of the block. routing: its weights multiply the experts' updates here, scale included. source (T, D):
    what the experts read, where dropout has changed it."""

    base: nn.Module
    columns: Columns
    routing: Routing
    source: Tensor | None = None


class Block(NamedTuple):
    """What computes act(gate x) ⊙ (up x), down. The three have experts of the same ranks, each with A rows of its own.

    routing: the router's weights, v. keep (T, I): which activations the down projection's experts read, under dropout.
    """

    gate: Projection
    up: Projection
    down: Projection
    activation: str  # of ACTIVATIONS
    routing: Routing
    keep: Tensor | None = None


class Inputs(NamedTuple):
    """Of the core. Tensors alone, so that they can be saved."""

    gate: Tensor  # (T, I)
    up: Tensor  # (T, I)
    gate_gated: Tensor  # (T, C), zero in the columns of experts that are not a token's
    up_gated: Tensor  # (T, C)
    gate_B: Tensor  # (I, C)
    up_B: Tensor  # (I, C)
    down_A: Tensor  # (C, I)
    weights: Tensor  # (T, K), v
    expert_ids: Tensor  # (T, K), -1 = nobody
    expert_of_column: Tensor  # (C,)
    keep: Tensor | None  # (T, I) bool


class Mix(NamedTuple):
    """How the streams are made and mixed. normalised: v sum to 1, and the base's own stream has no share."""

    activation: str
    normalised: bool


class Grads(NamedTuple):
    """Of the core's inputs, in their dtypes or wider."""

    gate: Tensor
    up: Tensor
    gate_gated: Tensor
    up_gated: Tensor
    weights: Tensor
    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor

    def of_normalised(self) -> "Grads":
        """One shift of all is nothing to weights that sum to 1: equal streams then say exactly nothing."""
        return self._replace(weights=self.weights - self.weights[:, :1])


class Core(NamedTuple):
    """forward     inputs, mix -> mixed (T, I), hidden (T, C) = A2_e a_k in the columns of a token's experts
    backward    d mixed, d hidden, inputs, mix -> Grads"""

    forward: Callable[[Inputs, Mix], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Inputs, Mix], Grads]


def run_core(inputs: Inputs, mix: Mix, core: Core) -> tuple[Tensor, Tensor]:
    """mixed (T, I) and hidden (T, C), with gradients."""
    return _Core.apply(*inputs, mix, core)


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.mix, ctx.core = arguments
        ctx.save_for_backward(*tensors)
        return ctx.core.forward(Inputs(*tensors), ctx.mix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_mixed, d_hidden = grads
        inputs = Inputs(*ctx.saved_tensors)
        found = ctx.core.backward(d_mixed, d_hidden, inputs, ctx.mix)._asdict()
        cast = {name: grad.to(getattr(inputs, name).dtype) for name, grad in found.items()}
        return *(cast.get(name) for name in Inputs._fields), None, None
