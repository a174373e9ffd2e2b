# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes tensors and numbers where the kernel has tl.tensor and constexpr, and options that it has not)
"""Back through the gates, in one pass over C-wide tensors:

    dh[t, c] = gates[t, e(c)] · dg[t, c]        dgates[t, e] = Σ_{c of e} dg[t, c] · h[t, c]

The gradient of a gate is a sum over its expert's few columns, so nothing O-wide is saved or computed, and the gates of
experts that were not chosen get theirs for nothing. The sum over an expert's columns, of which there may be any number,
is a product with the (C, E) matrix of ones where a column is the expert's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex.kernels.triton.tiles import block, must_widen, on_its_device, rounded, row_major


@triton.jit
def gate_backward_kernel(
    grad_gated_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    grad_hidden_ptr: tl.tensor,
    grad_gates_ptr: tl.tensor,
    T: tl.tensor,
    C: tl.tensor,
    E: tl.tensor,
    stride_grad: tl.tensor,
    stride_hidden: tl.tensor,
    stride_gates: tl.tensor,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program (tile of T, tile of E); the first tile of E writes dh."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (t < T) & (c[None, :] < C)
        grad = tl.load(grad_gated_ptr + t * stride_grad + c[None, :], mask, other=0.0).to(tl.float32)
        hidden = tl.load(hidden_ptr + t * stride_hidden + c[None, :], mask, other=0.0).to(tl.float32)
        expert = tl.load(expert_ptr + c, c < C, other=0).to(tl.int32)
        owns = (expert[:, None] == e).to(tl.float32)
        acc = tl.dot(grad * hidden, owns, acc, input_precision="ieee")
        if tl.program_id(1) == 0:
            gates = tl.load(gates_ptr + t * stride_gates + expert[None, :], mask, other=0.0).to(tl.float32)
            tl.store(grad_hidden_ptr + t * C + c[None, :], rounded(gates * grad, UP), mask)
    tl.store(grad_gates_ptr + t * E + e, acc, (t < T) & (e < E))


@on_its_device
def launch_gate_backward(
    grad_gated: Tensor, hidden: Tensor, gates: Tensor, expert_of_column: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_hidden (T, C) in hidden's dtype, grad_gates (T, E) in the gates'."""
    grad_gated, hidden, gates = row_major(grad_gated), row_major(hidden), row_major(gates)
    (num_tokens, num_columns), num_experts = hidden.shape, gates.shape[1]
    grad_hidden = torch.empty(num_tokens, num_columns, dtype=hidden.dtype, device=hidden.device)
    grad_gates = torch.empty(num_tokens, num_experts, dtype=gates.dtype, device=gates.device)
    if num_tokens == 0 or num_experts == 0:
        return grad_hidden, grad_gates
    BLOCK_T, BLOCK_E = block(num_tokens, 32), block(num_experts, 32)
    gate_backward_kernel[(triton.cdiv(num_tokens, BLOCK_T), triton.cdiv(num_experts, BLOCK_E))](
        *(grad_gated, hidden, gates, expert_of_column, grad_hidden, grad_gates),
        *(num_tokens, num_columns, num_experts, grad_gated.stride(0), hidden.stride(0), gates.stride(0)),
        UP=must_widen(hidden.dtype),
        BLOCK_T=BLOCK_T,
        BLOCK_C=block(num_columns, 32),
        BLOCK_E=BLOCK_E,
    )
    return grad_hidden, grad_gates
