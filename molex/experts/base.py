"""What a bank of experts is: the experts of one layer, stacked, and how the layer's output comes from them.

A bank runs in one of three forms (`molex.kernels.base`): `linear` everywhere, `widen` and `narrow` at the two ends of
a feed-forward block whose experts share one routing. It asks for its routing through a callback, because some
routers decide on the bank's own activations A x, and because ZeRO-3 gathers a module's parameters only
while that module's forward runs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from molex.distributed import num_elements
from molex.errors import ConfigError
from molex.exact import Exact
from molex.kernels import Form, Planner
from molex.kernels.casts import Casts
from molex.registry import Registry
from molex.routing import Routing

Route = Callable[[Tensor | None], Routing]  # the bank's activations (T, C) or None -> the layer's routing


@dataclass(frozen=True)
class LayerShape:
    """What an expert kind is built from: one linear, how many experts it gets, and their ranks."""

    name: str
    base: nn.Module
    in_features: int
    out_features: int
    ranks: tuple[int, ...]  # of each expert
    scales: tuple[float, ...]  # of each expert: alpha / rank, or what the method says
    dropout: float
    device: torch.device
    dtype: torch.dtype


class LoRA(NamedTuple):
    """One low-rank update of one linear: scale · B A."""

    A: Tensor  # (R, D)
    B: Tensor  # (O, R)
    scale: float


class ExpertBank(Exact, ABC):
    """Subclasses say what their parameters are and how they compute; `scale` (E,) is each expert's own.

    gives_activations: route is called with A x, for routers that decide on it. num_heads: how many gates of a
    routing each expert takes (MHR's heads).
    """

    exact = ("scale",)
    gives_activations: ClassVar[bool] = False
    num_heads = 1
    scale: Tensor

    def __init__(self, shape: LayerShape):
        super().__init__()
        self.ranks = shape.ranks
        self.names = [str(i) for i in range(len(shape.ranks))]
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.dropout = nn.Dropout(shape.dropout)
        self.casts = Casts()  # of its own until a layer brings its model's
        self.register_buffer("scale", torch.tensor(shape.scales, device=shape.device, dtype=shape.dtype))

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @abstractmethod
    def forward(self, x: Tensor, base: nn.Module, route: Route, planner: Planner, form: Form = "linear") -> Tensor:
        """The layer's output: x (..., D) -> (..., O); one more leading axis of streams where form says so."""

    @abstractmethod
    def expert(self, expert_id: int) -> LoRA:
        """One expert, by its own tensors. Raises ConfigError on a wrong id, and where it is more than a LoRA."""

    @abstractmethod
    def store(self, expert_id: int, A: Tensor, B: Tensor) -> None:
        """Copies the factors of a LoRA that `check_expert` accepted into place."""

    def num_parameters(self) -> int:
        """How many numbers all of its experts are made of."""
        return sum(num_elements(parameter) for parameter in self.parameters())

    def materialize(self, expert_id: int) -> Tensor:
        """What one expert adds to the base weight at weight 1: (O, D), float32 or wider."""
        A_RD, B_OR, scale = self.expert(expert_id)
        dtype = torch.promote_types(B_OR.dtype, torch.float32)
        return scale * (B_OR.to(dtype) @ A_RD.to(dtype))

    def weight(self, expert_id: int, base: Tensor) -> Tensor:
        """The weight (O, D) of one plain linear that is the base's (O, D) with one expert at weight 1, float32 or
        wider."""
        added_OD = self.materialize(expert_id)
        return base.to(torch.promote_types(base.dtype, added_OD.dtype)) + added_OD

    @torch.no_grad()
    def load_expert(self, expert_id: int, name: str, lora: LoRA) -> None:
        """Puts a pretrained LoRA in an expert's place. Raises ConfigError where `check_expert` does."""
        self.check_expert(expert_id, lora)
        self.store(expert_id, lora.A, lora.B)
        self.scale[expert_id] = lora.scale
        self.names[expert_id] = name

    def check_expert(self, expert_id: int, lora: LoRA) -> None:
        """Raises ConfigError where `load_expert` cannot take this LoRA: a wrong id, shape or scale."""
        self.check_id(expert_id)
        self.check_lora(lora, self.ranks[expert_id], str(expert_id))

    def check_lora(self, lora: LoRA, rank: int, expert: str) -> None:
        """Raises ConfigError where a LoRA is not of this rank, not for this layer, or has no finite scale."""
        wanted = (rank, self.in_features), (self.out_features, rank)
        given = tuple(lora.A.shape), tuple(lora.B.shape)
        if given != wanted:
            raise ConfigError(f"expert {expert} takes A {wanted[0]} and B {wanted[1]}, got {given[0]} and {given[1]}")
        if not math.isfinite(lora.scale):
            raise ConfigError(f"expert {expert} is given the scale {lora.scale}, which is no finite number")

    def check_id(self, expert_id: int) -> None:
        """Raises ConfigError unless there is an expert of this number."""
        if not 0 <= expert_id < self.num_experts:
            raise ConfigError(f"expert {expert_id} of a bank of {self.num_experts}; ids start at 0")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(ABC):
    """Base of the expert kinds' configurations; each builds its bank."""

    @abstractmethod
    def build(self, shape: LayerShape) -> ExpertBank: ...


expert_kinds: Registry[type[ExpertsConfig]] = Registry("experts")
