"""Poly and MHR experts: A and B are averaged apart, then multiplied (Poly arXiv 2202.13914, MHR arXiv 2211.03831).

    y = base(x) + s · B̄ Ā x,    Ā = Σ_j w_j A_j,   B̄ = Σ_j w_j B_j        w: the token's weights over the E skills

The product has cross terms B_i A_j, so it is not a gate on columns; but the averages need not be formed per token:
Ā x = Σ_j w_j (A_j x) and B̄ z = Σ_i w_i (B_i z), two products and two rank-wide mixes. MHR splits D and O into heads,
each with weights of its own: head h of A reads its slice of x, head h of B writes its slice of y.
The routing has heads · E entries per token, head-major.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molex.errors import ConfigError
from molex.experts.base import ExpertBank, ExpertsConfig, LayerShape, LoRA, Route, expert_kinds
from molex.kernels import Form, Planner


@expert_kinds.register("averaged")
@dataclass(frozen=True, kw_only=True)
class AveragedConfig(ExpertsConfig):
    """num_heads: 1 is Poly; more is MHR, and must divide the layer's in- and out-features."""

    num_heads: int = 1

    def build(self, shape: LayerShape) -> ExpertBank:
        return AveragedBank(shape, self.num_heads)


class AveragedBank(ExpertBank):
    """lora_A (H, E, R, D/H), lora_B (H, E, O/H, R); one scale for all."""

    def __init__(self, shape: LayerShape, num_heads: int):
        super().__init__(shape)
        if num_heads < 1 or shape.in_features % num_heads or shape.out_features % num_heads:
            raise ConfigError(
                f"{shape.name} is {shape.in_features} -> {shape.out_features}: num_heads={num_heads} must divide both"
            )
        if len(set(zip(shape.ranks, shape.scales, strict=True))) > 1:
            raise ConfigError("averaged experts need one rank and one scale")
        self.num_heads, rank = num_heads, shape.ranks[0]
        like = {"device": shape.device, "dtype": shape.dtype}
        stack = (num_heads, len(shape.ranks))
        self.lora_A = nn.Parameter(torch.empty(*stack, rank, shape.in_features // num_heads, **like))
        self.lora_B = nn.Parameter(torch.zeros(*stack, shape.out_features // num_heads, rank, **like))
        bound = 1 / math.sqrt(shape.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, x: Tensor, base: nn.Module, route: Route, planner: Planner, form: Form = "linear") -> Tensor:
        routing = route(None)
        y = base(x)
        x_THD = self.dropout(x).reshape(-1, self.num_heads, x.shape[-1] // self.num_heads)
        w_THE = routing.gates().unflatten(1, (-1, self.num_experts))
        if w_THE.shape[1] != self.num_heads:  # an expert asked for by name serves every head
            w_THE = w_THE.expand(-1, self.num_heads, -1)
        w_THE1 = w_THE[..., None]
        hidden_THER = torch.einsum("thd,herd->ther", x_THD, self.lora_A.to(x.dtype))
        mixed_TR = (hidden_THER * w_THE1).sum((1, 2)) * self.scale[0].to(w_THE.dtype)
        weighted_THER = (mixed_TR[:, None, None] * w_THE1).to(x.dtype)
        delta_THO = torch.einsum("ther,heor->tho", weighted_THER, self.lora_B.to(x.dtype))
        return y + delta_THO.reshape(y.shape).to(y.dtype)

    def expert(self, expert_id: int) -> LoRA:
        self.check_id(expert_id)
        A_RD = self.lora_A[:, expert_id].movedim(0, 1).flatten(1)
        return LoRA(A_RD, self.lora_B[:, expert_id].flatten(0, 1), float(self.scale[0]))

    def check_expert(self, expert_id: int, lora: LoRA) -> None:
        super().check_expert(expert_id, lora)
        own = float(self.scale[0])
        if not math.isclose(lora.scale, own, rel_tol=1e-6):
            raise ConfigError(f"averaged experts share the scale {own}, got {lora.scale}: fold it into B")

    def store(self, expert_id: int, A: Tensor, B: Tensor) -> None:
        self.lora_A[:, expert_id].copy_(A.unflatten(1, (self.num_heads, -1)).movedim(1, 0))
        self.lora_B[:, expert_id].copy_(B.unflatten(0, (self.num_heads, -1)))
