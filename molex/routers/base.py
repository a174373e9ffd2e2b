"""What a router is: a rule from tokens to `Routing`.

A router routes and does nothing else: no dispatch, no loss, no statistics, no knowledge of LoRA. Logits, softmax
and weights are computed in float32 or wider, also under autocast, whatever the model's dtype.
"""

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from molex.checks import check_choice, check_range
from molex.errors import ConfigError, StateError
from molex.exact import Exact
from molex.registry import Registry
from molex.routing import RouteContext, Routing, Rule


class Router(Exact, ABC):
    """`needs_activations`: ctx.activations must hold A x. `growable`: experts added later can be chosen, because
    nothing here is sized by their number."""

    growable: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = False

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    @abstractmethod
    def forward(self, x: Tensor, ctx: RouteContext) -> Routing:
        """x (T, D) -> Routing over T tokens."""

    def rule(self) -> Rule | None:
        """What it does in evaluation, where that is something a kernel can do too."""
        return None

    def learn_expert(self, expert_id: int, A: Tensor, B: Tensor) -> None:
        """Told of every LoRA that is loaded into its layer: A (R, D), B (O, R). Most routers do not mind."""

    def rows(self) -> Tensor:
        """Views of the linear map from what it reads to the experts' scores: (G, E, D), G maps side by side.

        Raises ConfigError where scores come about in another way.
        """
        raise ConfigError("this router scores experts by no single linear map, so it has no rows to set")

    def add_expert(self) -> None:
        """Makes room for one more expert, after the others. Raises ConfigError where the router is for so many."""
        if not self.growable:
            raise ConfigError("this router is made for the experts it has; convert anew with one more")
        self.num_experts += 1

    @property
    def num_tasks(self) -> int | None:
        """How many tasks it tells apart; None where it does not go by task."""
        return None

    def task_ids(self, ctx: RouteContext) -> Tensor:
        """The tokens' tasks (T,). Raises StateError when nobody set them, ConfigError when one is out of range."""
        num_tasks = self.num_tasks
        assert num_tasks is not None
        if ctx.task_ids is None:
            raise StateError(
                f"{ctx.layer}: this router goes by task; call mixture.set_tasks(ids) or pass a `task_ids` column"
            )
        if not torch.compiler.is_compiling() and bool(((ctx.task_ids < 0) | (ctx.task_ids >= num_tasks)).any()):
            raise ConfigError(f"{ctx.layer}: a task id is outside 0..{num_tasks - 1}")
        return ctx.task_ids


class GatedRouter(Router):
    """A router that scores experts by one linear `gate`, a row for each."""

    gate: "Gate"

    def rows(self) -> Tensor:
        return self.gate.weight[None]

    def add_expert(self) -> None:
        self.gate.add_row()
        self.num_experts += 1


class BalancedRouter(Router):
    """A router with a balance bias, moved against the load after each micro-batch, never by a gradient or in forward.

    bias_e += rate · sign(mean load − load_e)
    """

    exact = ("bias",)
    bias: Tensor

    def __init__(self, num_experts: int, rate: float):
        super().__init__(num_experts)
        check_range("bias_rate", rate, 0)
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts))

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """load (E,): how many token slots each expert served, over all ranks."""
        load = load.to(self.bias)
        self.bias += self.rate * torch.sign(load.mean() - load)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(ABC):
    """Base of the routers' configurations; each builds its router for one layer. `model_scope`: it is built once
    instead, and decides for every layer before the model runs."""

    model_scope: ClassVar[bool] = False

    @abstractmethod
    def build(self, in_features: int, num_experts: int) -> Router: ...


class Gate(nn.Module):
    """The linear map from tokens to logits: weight (E, D), no bias, master weight float32.

    init: "kaiming" is U(±1/√D) (nn.Linear's own), a number is the standard deviation of a normal.
    """

    def __init__(self, in_features: int, num_experts: int, init: float | Literal["kaiming"] = "kaiming"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        if isinstance(init, str):
            check_choice("gate_init", init, ("kaiming",))
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            check_range("gate_init", init, 0)
            nn.init.normal_(self.weight, std=init)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E), float32 or wider, out of autocast's reach."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            weight_ED = self.weight.to(dtype)
            return F.linear(x, weight_ED) if x.dtype == dtype else _WideLinear.apply(x, weight_ED)

    @torch.no_grad()
    def add_row(self) -> None:
        """One more expert, whose logit is 0 until the row is set or trained."""
        weight_ED = torch.cat([self.weight, self.weight.new_zeros(1, self.weight.shape[1])])
        self.weight = nn.Parameter(weight_ED, self.weight.requires_grad)


class _WideLinear(torch.autograd.Function):
    """x Wᵀ in the dtype of W, x saved as it came: the experts keep it anyway, and its cast is twice as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        d_x = (grad @ weight).to(x.dtype) if needs_x else None
        return d_x, grad.T @ x.to(weight.dtype) if needs_weight else None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products in the dtype of their factors. Entering torch's own context takes longer than a small product."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises ConfigError unless top_k is a whole number, 1 <= top_k <= num_experts."""
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k={top_k} of {num_experts} experts; top_k must be between 1 and num_experts")


routers: Registry[type[RouterConfig]] = Registry("router")
