"""The core of a feed-forward block in plain torch, for a processor: one expert's tokens after the other's.

    a_k = act(gate + B1_e g1_e) ⊙ (up + B3_e g3_e);   mixed = a_0 + Σ_k v_k (a_k − a_0);   hidden_e = A2_e a_k

Its products are of the expert's own R columns, without zeros, and a few rows of I numbers stay in the cache from one
step to the next. How many rows an expert has is asked of the routing: on a GPU that would be a wait, in a compiled
graph a break.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from molex.kernels.block import Core, Grads, Inputs, Mix

CACHED = 1 << 20  # numbers of one (N, I) tensor
aten = torch.ops.aten


class Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # gradient, input


ACTIVATIONS = {
    "silu": Activation(F.silu, aten.silu_backward),
    "gelu": Activation(F.gelu, aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
}


class Rows(NamedTuple):
    """Some tokens of one expert: who they are, in which slot they have it, which columns it owns."""

    tokens: Tensor  # (N,)
    slots: Tensor  # (N,)
    own: slice

    def of(self, tensor: Tensor) -> Tensor:
        """Their rows of a tensor (T, ·)."""
        return tensor.index_select(0, self.tokens)


def by_expert(expert_ids: Tensor, expert_of_column: Tensor, width: int) -> Iterator[Rows]:
    """Every (token, slot) pair that has an expert, experts in order."""
    sorted_N, order_N = expert_ids.flatten().sort(stable=True)
    tokens_N, slots_N = order_N // expert_ids.shape[1], order_N % expert_ids.shape[1]
    present, served = (found.tolist() for found in sorted_N.unique_consecutive(return_counts=True))
    first_column = [0, *expert_of_column.bincount().cumsum(0).tolist()]
    step, end = max(1, CACHED // width), 0
    for expert_id, count in zip(present, served, strict=True):
        start, end = end, end + count
        for rows in range(start, end if expert_id >= 0 else start, step):
            part = slice(rows, min(rows + step, end))
            yield Rows(tokens_N[part], slots_N[part], slice(*first_column[expert_id : expert_id + 2]))


def forward(inputs: Inputs, mix: Mix) -> tuple[Tensor, Tensor]:
    """mixed (T, I), hidden (T, C)."""
    act = ACTIVATIONS[mix.activation].forward
    base_TI = act(inputs.gate) * inputs.up
    mixed_TI, hidden_TC = base_TI.to(wide(base_TI), copy=True), torch.zeros_like(inputs.gate_gated)
    for rows in by_expert(inputs.expert_ids, inputs.expert_of_column, base_TI.shape[1]):
        inner_NI, up_NI = _stream(inputs, rows)
        out_NI = act(inner_NI).mul_(up_NI)
        hidden_TC[rows.tokens, rows.own] = _kept(out_NI, inputs, rows) @ inputs.down_A[rows.own].T
        weights_N1 = inputs.weights[rows.tokens, rows.slots, None]
        mixed_TI.index_add_(0, rows.tokens, weights_N1 * out_NI.sub_(rows.of(base_TI)))
    return mixed_TI.to(base_TI.dtype), hidden_TC


def _stream(inputs: Inputs, rows: Rows) -> tuple[Tensor, Tensor]:
    """gate and up (N, I) of some tokens, with one expert's update."""
    gate_NR, up_NR = rows.of(inputs.gate_gated[:, rows.own]), rows.of(inputs.up_gated[:, rows.own])
    inner_NI = rows.of(inputs.gate).addmm_(gate_NR, inputs.gate_B[:, rows.own].T)
    return inner_NI, rows.of(inputs.up).addmm_(up_NR, inputs.up_B[:, rows.own].T)


def _kept(out: Tensor, inputs: Inputs, rows: Rows) -> Tensor:
    """What the down projection's expert reads of its stream (N, I)."""
    return out if inputs.keep is None else out * rows.of(inputs.keep)


def backward(d_mixed: Tensor, d_hidden: Tensor, inputs: Inputs, mix: Mix) -> Grads:
    act = ACTIVATIONS[mix.activation]
    like = inputs._asdict()
    grads = Grads(**{name: torch.zeros_like(like[name], dtype=wide(like[name])) for name in Grads._fields})
    base_TI = None if mix.normalised else _backward_of_base(d_mixed, inputs, act, grads)
    for rows in by_expert(inputs.expert_ids, inputs.expert_of_column, d_mixed.shape[1]):
        _backward_of_expert(d_mixed, d_hidden, inputs, act, rows, base_TI, grads)
    return grads.of_normalised() if mix.normalised else grads


def _backward_of_base(d_mixed: Tensor, inputs: Inputs, act: Activation, grads: Grads) -> Tensor:
    """Adds what a_0 gives to gate and up. Returns a_0."""
    activated_TI = act.forward(inputs.gate)
    share_TI = ((1 - inputs.weights.sum(1, keepdim=True)) * d_mixed).to(d_mixed.dtype)
    grads.gate.add_(act.backward(share_TI * inputs.up, inputs.gate))
    grads.up.add_(share_TI.mul_(activated_TI))
    return activated_TI.mul_(inputs.up)


def _backward_of_expert(
    d_mixed: Tensor, d_hidden: Tensor, inputs: Inputs, act: Activation, rows: Rows, base: Tensor | None, grads: Grads
) -> None:
    """Adds what some tokens' stream through one expert gives, to all."""
    tokens, slots, own = rows
    d_mixed_NI, d_hidden_NR = rows.of(d_mixed), rows.of(d_hidden[:, own])
    weights_N1 = inputs.weights[tokens, slots, None]
    inner_NI, up_NI = _stream(inputs, rows)
    activated_NI = act.forward(inner_NI)
    out_NI = activated_NI * up_NI
    grads.down_A[own] += d_hidden_NR.T @ _kept(out_NI, inputs, rows)
    apart_NI = out_NI if base is None else out_NI.sub_(rows.of(base))
    grads.weights[tokens, slots] = apart_NI.mul_(d_mixed_NI).sum(1, dtype=grads.weights.dtype)
    d_out_NI = _kept(d_hidden_NR @ inputs.down_A[own], inputs, rows).add_(weights_N1 * d_mixed_NI)
    d_up_NI = activated_NI.mul_(d_out_NI)
    d_inner_NI = act.backward(d_out_NI.mul_(up_NI), inner_NI)
    for wide_grad, gated_grad, B_grad, d_NI, gated, B in (
        (grads.gate, grads.gate_gated, grads.gate_B, d_inner_NI, inputs.gate_gated, inputs.gate_B),
        (grads.up, grads.up_gated, grads.up_B, d_up_NI, inputs.up_gated, inputs.up_B),
    ):
        wide_grad.index_add_(0, tokens, d_NI.to(wide_grad.dtype))
        gated_grad[tokens, own] = (d_NI @ B[:, own]).to(gated_grad.dtype)
        B_grad[:, own] += d_NI.T @ rows.of(gated[:, own])


def wide(tensor: Tensor) -> torch.dtype:
    """Sums of 16-bit numbers are float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


CORE = Core(forward, backward)
