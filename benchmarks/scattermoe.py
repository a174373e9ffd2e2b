"""ScatterMoE (arXiv:2403.08245) as an outside baseline of one linear with experts, where its package can be imported.

    git clone https://github.com/shawntan/scattermoe ../scattermoe && export PYTHONPATH=$PWD/../scattermoe

published     its mixture of LoRAs (examples/molora.py: its MLP, no activation, rank for hidden size) beside the base:
              every pair's O-wide output is written, kept for the backward, and weighed and summed in a product
rank_gated    our improvement of it, on the same kernels: pairs are weighed where they are R wide, and the gradient of y
              is gathered as it comes; nothing O wide is kept

(layer) -> y (T, O). Every token needs K experts: it has no slot for nobody. It imports triton and compiles its sorting.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.problem import Layer

# (N,) each: the sorted pairs' experts, where each pair stood before, and (E,) where each expert's pairs end
Pairs = tuple[Tensor, Tensor, Tensor]


def available(layer: Layer) -> str | None:
    """None, or why it cannot compute this layer."""
    if find_spec("scattermoe") is None:
        return "the package scattermoe is not there: clone github.com/shawntan/scattermoe and put it on PYTHONPATH"
    if not layer.x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels run on a GPU, x is on {layer.x.device}"
    if layer.x.dtype == torch.float64:
        return "its kernels add up in float32"
    if layer.x.is_cuda and layer.x.dtype == torch.float32:
        return "its kernels multiply float32 in TF32, which others here do not"
    return None


def published(layer: Layer) -> Tensor:
    kernels, pairs, top_k = import_module("scattermoe"), sort(layer), layer.expert_ids.shape[1]
    A_EDR, B_ERO = factors(layer)
    hidden_NR = kernels.parallel_linear(layer.x, A_EDR, top_k, *pairs, grouped_out=True)
    gates_TK = layer.weights.to(layer.x.dtype)
    return layer.base(layer.x) + kernels.parallel_linear(hidden_NR, B_ERO, 1, *pairs, gates=gates_TK, grouped_in=True)


def rank_gated(layer: Layer) -> Tensor:
    kernels, pairs, top_k = import_module("scattermoe"), sort(layer), layer.expert_ids.shape[1]
    A_EDR, B_ERO = factors(layer)
    hidden_NR = kernels.parallel_linear(layer.x, A_EDR, top_k, *pairs, grouped_out=True)
    gated_NR = (hidden_NR * layer.weights.flatten()[pairs[1], None]).to(layer.x.dtype)
    return _Expand.apply(layer.base(layer.x), gated_NR, B_ERO, *pairs)


def sort(layer: Layer) -> Pairs:
    return import_module("scattermoe").flatten_sort_count(layer.expert_ids, num_experts=layer.num_experts)


def factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """(E, D, R) and (E, R, O), seen through strides, as its `ParallelExperts` hands over its own weights."""
    A_ERD = layer.A.unflatten(0, (-1, layer.rank))
    B_EOR = layer.B.unflatten(1, (-1, layer.rank)).movedim(1, 0)
    return A_ERD.transpose(1, 2), B_EOR.transpose(1, 2)


class _Expand(torch.autograd.Function):
    """base (T, O) + Σ_k B_e gated, gated (N, R) in the order of experts."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, gated: Tensor, B: Tensor, experts: Tensor, places: Tensor, ends: Tensor
    ) -> Tensor:
        ops = import_module("scattermoe.kernels.ops")
        ctx.save_for_backward(gated, B, experts, places, ends)
        y_NO = ops.scatter2scatter(gated, B, experts, places, k=1, x_grouped=True)
        return base + y_NO.view(len(base), -1, y_NO.shape[1]).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, (gated, B, experts, places, ends) = import_module("scattermoe.kernels.ops"), ctx.saved_tensors
        grad_NO = ops.group(grads[0], places, fan_out=len(places) // len(grads[0]))
        d_B, _ = ops.group_bwd_W(DY=grad_NO, X=gated, expert_offsets=ends, E=len(B))
        d_gated = ops.scatter2scatter(grad_NO, B.transpose(1, 2), experts, places, k=1, x_grouped=True, y_grouped=True)
        return grads[0], d_gated, d_B, None, None, None
