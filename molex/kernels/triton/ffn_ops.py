"""The middle of a MixLoRA feed-forward block as two torch operators: forward, and everything that backward needs.

Between them only their inputs are kept: nothing I-wide of an expert. Neither waits for the device, and no shape depends
on the routing.
"""

import torch
from torch import Tensor

from molex.kernels.triton.ffn_activations import ACTIVATIONS
from molex.kernels.triton.ffn_backward import launch_mix_backward
from molex.kernels.triton.ffn_forward import launch_mix
from molex.kernels.triton.ffn_plan import first_columns, plan_pairs, plan_tiles
from molex.kernels.triton.ffn_tiles import Block, Grads, add_planes
from molex.kernels.triton.ffn_wgrad import launch_mix_wgrad
from molex.kernels.triton.tiles import check_dtypes, on_its_device, row_major

__all__ = ["ACTIVATIONS", "ffn_mix", "ffn_mix_backward"]


@torch.library.custom_op("molex::ffn_mix", mutates_args=())
@on_its_device
def ffn_mix(
    gate: Tensor,
    up: Tensor,
    gate_gated: Tensor,
    up_gated: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    expert_of_column: Tensor,
    keep: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """mixed (T, I) = a_0 + Σ_k w_k (a_k − a_0), and down_hidden (T, C): A2_e (keep · a_e), zero where e is not chosen.

    Of one dtype of DTYPES: gate, up (T, I), the base's products; gate_gated, up_gated (T, C), A x times the expert's
    scale, zero in columns of experts that a token has not chosen; gate_B, up_B (I, C); down_A (C, I).
    weights (T, K) float32; expert_ids (T, K), -1 = nobody, none twice for a token; expert_of_column (C,) counts up;
    keep (T, I) bool, what dropout leaves for down_A; activation one of ACTIVATIONS. mixed is a_0 bit for bit where all
    a_k equal it.
    """
    first_TK = first_columns(expert_ids, expert_of_column)
    block = Block(gate, up, gate_gated, up_gated, gate_B, up_B, down_A, keep, weights).checked(activation)
    plan = plan_tiles(first_TK, expert_of_column)
    mixed, planes = launch_mix(block, plan, activation)
    return mixed, add_planes(planes, plan.chosen(), gate.dtype)


@ffn_mix.register_fake
def _(gate: Tensor, up: Tensor, gate_gated: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate_gated.shape)


@torch.library.custom_op("molex::ffn_mix_backward", mutates_args=())
@on_its_device
def ffn_mix_backward(
    d_mixed: Tensor,
    d_down_hidden: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_gated: Tensor,
    up_gated: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    expert_of_column: Tensor,
    keep: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of `ffn_mix`'s results, in their dtype, and its inputs: d_gate, d_up (T, I), d_gate_gated,
    d_up_gated (T, C), zero where the expert is not chosen, and in float32 d_weights (T, K), d_gate_B, d_up_B (I, C),
    d_down_A (C, I).
    """
    check_dtypes(d_mixed, d_down_hidden, gate)
    first_TK = first_columns(expert_ids, expert_of_column)
    block = Block(gate, up, gate_gated, up_gated, gate_B, up_B, down_A, keep, weights).checked(activation)
    plan, pairs = plan_tiles(first_TK, expert_of_column), plan_pairs(first_TK, expert_of_column)
    rest_T = 1 - (block.weights * plan.served).sum(1)
    grads = Grads(row_major(d_mixed), row_major(d_down_hidden), rest_T)
    d_gate, d_up, planes = launch_mix_backward(grads, block, plan, activation)
    d_gate_gated, d_up_gated = (add_planes(plane, plan.chosen(), gate.dtype) for plane in planes)
    d_gate_B, d_up_B, d_down_A, d_weights = launch_mix_wgrad(grads, block, plan, pairs, activation)
    return d_gate, d_up, d_gate_gated, d_up_gated, d_weights, d_gate_B, d_up_B, d_down_A


@ffn_mix_backward.register_fake
def _(
    d_mixed: Tensor,
    d_down_hidden: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_gated: Tensor,
    up_gated: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    weights: Tensor,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_gate, d_gate_gated = gate.new_empty(gate.shape), gate.new_empty(gate_gated.shape)
    d_weights, d_gate_B, d_up_B, d_down_A = (
        factor.new_empty(factor.shape, dtype=torch.float32) for factor in (weights, gate_B, up_B, down_A)
    )
    d_up, d_up_gated = torch.empty_like(d_gate), torch.empty_like(d_gate_gated)
    return d_gate, d_up, d_gate_gated, d_up_gated, d_weights, d_gate_B, d_up_B, d_down_A
