"""LoRA experts: expert e adds  s_e · B_e A_e x,  s_e = alpha / rank  (LoRA, arXiv 2106.09685).

Stored stacked as columns: `lora_A` (C, D) and `lora_B` (O, C), expert e owning ranks[e] neighbouring columns, so that
all experts are two matrix products, and ZeRO-3, FSDP and torch.compile see two parameters. The (E, R, ·) forms
are views where ranks agree; nothing is padded here.

`append()` adds columns at the end. `grow()` moves what is there to a second, frozen stack: masking gradients inside one
Parameter would not freeze it, since AdamW decays and its moments move masked entries too.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from molex.checks import check_choice
from molex.experts.base import ExpertBank, ExpertsConfig, LayerShape, LoRA, Route, expert_kinds
from molex.kernels import Columns, Form, Planner, columns_of
from molex.routing import Routing


@expert_kinds.register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRAConfig(ExpertsConfig):
    """init: A is U(±1/√D) ("kaiming", a = √5) or N(0, 1/r²) ("gaussian"); B is zero."""

    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        check_choice("init", self.init, ("kaiming", "gaussian"))

    def build(self, shape: LayerShape) -> ExpertBank:
        return LoRABank(shape, self.init)


class LoRABank(ExpertBank):
    """E low-rank experts as columns."""

    expert_of_column: Tensor
    row_of_column: Tensor | None
    gives_activations = True
    activation_routed = False  # surgery sets it where the layer's router decides on A x

    def __init__(self, shape: LayerShape, init: str = "kaiming"):
        super().__init__(shape)
        self.init = init
        like = {"device": shape.device, "dtype": shape.dtype}
        self.lora_A = nn.Parameter(torch.empty(self._rows(), shape.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(shape.out_features, sum(shape.ranks), **like))
        self.register_parameter("frozen_A", None)
        self.register_parameter("frozen_B", None)
        self.register_buffer("expert_of_column", columns_of(shape.ranks).to(shape.device))
        self.register_buffer("row_of_column", None)
        self.reset_A()

    def _rows(self) -> int:
        return sum(self.ranks)

    @torch.no_grad()
    def reset_A(self) -> None:
        """Draws the trainable A anew."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            ranks = [rank for rank in self.ranks for _ in range(rank)]
            ranks_C = torch.tensor(ranks[-len(self.lora_A) :], device=self.lora_A.device)  # frozen experts come first
            self.lora_A.normal_().div_(ranks_C[:, None])

    def columns(self) -> Columns:
        """The experts as a kernel sees them."""
        A, B = self.lora_A, self.lora_B
        if self.frozen_A is not None and self.frozen_B is not None:
            A, B = torch.cat([self.frozen_A, A]), torch.cat([self.frozen_B, B], dim=1)
        return Columns(A, B, self.ranks, self.expert_of_column, self.row_of_column)

    def factors(self, dtype: torch.dtype) -> Columns:
        """`columns` in the dtype of the products."""
        return self.casts.columns([*self.parameters(recurse=False)], dtype, self.columns)

    def forward(self, x: Tensor, base: nn.Module, route: Route, planner: Planner, form: Form = "linear") -> Tensor:
        columns = self.factors(x.dtype)
        dropped = self.dropout(x) if self.training and self.dropout.p > 0 else None
        source = x if dropped is None else dropped
        hidden_TC = columns.shrink(source.reshape(-1, x.shape[-1])) if self.activation_routed else None
        routing = route(hidden_TC)
        if form == "linear":
            weighted = routing.scaled(self.scale)
            backend = planner.pick(x, columns, weighted, base)
            return backend.linear(x, base, columns, weighted, dropped=dropped, hidden=hidden_TC)
        backend = planner.pick(x, columns, routing, base, form)
        if form == "widen":
            return backend.widen(x, base, columns, everyone(routing).scaled(self.scale), dropped=dropped)
        return backend.narrow(x, base, columns, routing.scaled(self.scale), routing.weights, dropped=dropped)

    def expert(self, expert_id: int) -> LoRA:
        self.check_id(expert_id)
        return LoRA(*self.columns().expert(expert_id), float(self.scale[expert_id]))

    def store(self, expert_id: int, A: Tensor, B: Tensor) -> None:
        A_RD, B_OR = self._stored(expert_id)
        A_RD.copy_(A)
        B_OR.copy_(B)

    def _stored(self, expert_id: int) -> tuple[Tensor, Tensor]:
        """Views of one expert's A (R, D) and B (O, R) inside the stack that holds it."""
        start, A, B = sum(self.ranks[:expert_id]), self.lora_A, self.lora_B
        if self.frozen_A is not None and self.frozen_B is not None:
            num_frozen = len(self.frozen_A)
            A, B, start = (self.frozen_A, self.frozen_B, start) if start < num_frozen else (A, B, start - num_frozen)
        own = slice(start, start + self.ranks[expert_id])
        return A[own], B[:, own]

    @torch.no_grad()
    def grow(self, ranks: tuple[int, ...], scale: float) -> None:
        """Freezes every expert there is and adds trainable ones of the given ranks and one scale."""
        old, num_new = self.columns(), sum(ranks)
        self.frozen_A = nn.Parameter(old.A.detach().clone(), requires_grad=False)
        self.frozen_B = nn.Parameter(old.B.detach().clone(), requires_grad=False)
        self.lora_A = nn.Parameter(old.A.new_empty(num_new, self.in_features))
        self.lora_B = nn.Parameter(old.B.new_zeros(self.out_features, num_new))
        self._count_in(ranks, scale)
        self.reset_A()

    @torch.no_grad()
    def append(self, rank: int) -> None:
        """One more expert, zero, at the end of the stack that trains; the others keep their numbers."""
        A, B = self.lora_A, self.lora_B
        self.lora_A = nn.Parameter(torch.cat([A, A.new_zeros(rank, self.in_features)]), A.requires_grad)
        self.lora_B = nn.Parameter(torch.cat([B, B.new_zeros(self.out_features, rank)], dim=1), B.requires_grad)
        self._count_in((rank,), 1.0)

    def _count_in(self, ranks: tuple[int, ...], scale: float) -> None:
        self.names += [str(self.num_experts + i) for i in range(len(ranks))]
        self.ranks += ranks
        self.scale = torch.cat([self.scale, self.scale.new_full((len(ranks),), scale)])
        self.expert_of_column = columns_of(self.ranks).to(self.lora_A.device)


def everyone(routing: Routing) -> Routing:
    """The same choice of experts at weight 1."""
    return routing._replace(weights=(routing.expert_ids >= 0).to(routing.weights.dtype))
