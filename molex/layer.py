"""MixtureLinear: an untouched linear, its bank of experts, its router. Route, record, compute.

    y = base(x) + B ( G(x) * (A x) )

The base stays the very object it was, so quantised, offloaded and hooked linears work as before, and `revert` puts it
back. Some models read `weight`, `bias` or the feature counts of their linears; those are forwarded.
"""

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from molex.experts import ExpertBank, LoRA
from molex.experts.lora import LoRABank
from molex.kernels import Form
from molex.kernels.routed import may_route, routed_linear
from molex.linears import StandIn, hooked
from molex.routers import Router
from molex.routing import RouteContext, Routing, Rule
from molex.state import MixtureState


class MixtureLinear(StandIn):
    """What surgery puts in the place of a linear. `router` is None where another object decides for this layer."""

    form: Form = "linear"
    plain = False  # one ordinary LoRA beside the routed layers (MixLoRA's attention), no expert of the mixture

    def __init__(
        self, name: str, stack: str, base: nn.Module, experts: ExpertBank, router: Router | None, state: MixtureState
    ):
        super().__init__()
        self.name, self.stack, self.state = name, stack, state
        self.base, self.experts, self.router = base, experts, router
        self.in_features, self.out_features = experts.in_features, experts.out_features
        experts.casts = state.casts
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.state.unseen:
            self.state.unseen.discard(self.name)
        if not self.state.enabled:
            return self.base(x)
        y = self.routed_in_kernels(x)
        return self.experts(x, self.base, partial(self.route, x), self.state.planner, self.form) if y is None else y

    def routed_in_kernels(self, x: Tensor) -> Tensor | None:
        """The layer where the backend is its router too, as it can be in inference; None elsewhere."""
        rule = self.rule(x)
        if rule is None:
            return None
        assert isinstance(self.experts, LoRABank)
        columns = self.experts.factors(x.dtype)
        y, routing = routed_linear(self.state.planner, x, self.base, columns, rule, self.experts.scale)
        if routing is not None:
            self.state.record(routing, self.state.context(self.name, self.stack, x, self.training))
        return y

    def rule(self, x: Tensor) -> Rule | None:
        """What may stand for the router and the bank at x: None where either does more, or is more than it says."""
        router, bank = self.router, self.experts
        if torch.is_grad_enabled() or router is None or self.form != "linear" or self.state.request is not None:
            return None
        if not may_route(self.state.planner, x.device) or type(bank).forward is not LoRABank.forward:
            return None
        rule = router.rule()
        return rule if rule is not None and _only_computes(router) and _only_computes(bank) else None

    def route(self, x: Tensor, activations: Tensor | None) -> Routing:
        """Decides for x (..., D) and records the decision. activations (T, C): A x, for routers that read it."""
        context = self.state.context(self.name, self.stack, x, self.training)
        routing = self.state.requested(context, self.experts.num_experts, x)
        if routing is None:
            known = context if activations is None else dataclasses.replace(context, activations=activations)
            routing = self.decide(x, known)
        self.state.record(routing, context)
        return routing

    def decide(self, x: Tensor, context: RouteContext) -> Routing:
        if self.router is None:
            return self.state.decided(self.name)
        return self.router(x.reshape(-1, x.shape[-1]), context)

    def load_expert(self, expert_id: int, name: str, lora: LoRA) -> None:
        """Puts a pretrained LoRA in an expert's place. Raises ConfigError on a wrong id or shape."""
        self.experts.load_expert(expert_id, name, lora)
        if self.router is not None:
            self.router.learn_expert(expert_id, lora.A, lora.B)

    def zero_expert(self, expert_id: int) -> LoRA:
        """An expert that adds nothing here. Raises ConfigError on a wrong id."""
        self.experts.check_id(expert_id)
        rank, scale = self.experts.ranks[expert_id], float(self.experts.scale[expert_id])
        return LoRA(torch.zeros(rank, self.in_features), torch.zeros(self.out_features, rank), scale)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.experts.num_experts} experts"


def _only_computes(outer: nn.Module) -> bool:
    """Whether a module and those in it are in evaluation and their own: not hooked, replaced, sharded or offloaded."""
    for module in (outer, *outer.children()):
        if module.training or hooked(module):
            return False
        if any(
            type(p) is not nn.Parameter or hasattr(p, "ds_id") for p in module._parameters.values() if p is not None
        ):
            return False
    return True
