"""MixtureState: the one side channel between a model's forward and its mixture layers.

One plain object per converted model. A forward pre-hook fills in what the call says about its tokens; layers read it,
and leave their routing in `trace`, which the next forward overwrites. Nothing is counted in forward and nothing
is global, so checkpointing, copies of the model and interleaved models cannot disturb each other.
"""

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from molex.errors import StateError
from molex.kernels import Planner
from molex.losses import Decision
from molex.routing import RouteContext, Routing
from molex.tokens import bound_arguments, read_encoder, read_tokens, spread_tasks


class MixtureState:
    """`stacks`: one context for each stack of layers ("model", or "encoder" and "decoder")."""

    def __init__(self, planner: Planner, layer_names: list[str]):
        self.planner = planner
        self.enabled = True
        self.tasks: Tensor | None = None  # (B,) or (B, S)
        self.request: Tensor | None = None  # (B,) expert ids, -1 = the base alone
        self.stacks: dict[str, RouteContext] = {}
        self.trace: dict[str, Decision] = {}
        self.assigned: dict[str, Routing] = {}  # what a model-scope router decided
        self.pending: dict[str, tuple[Tensor, Routing]] = {}  # a feed-forward block's input and its routing
        self.steps: list[dict[str, Decision]] | None = None
        self.unseen = set(layer_names)
        self._graded: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixtureState":
        """A copy without the tensors of the last forward, which autograd would refuse to copy."""
        twin = MixtureState(Planner(self.planner.choice), list(self.unseen))
        twin.enabled = self.enabled
        twin.tasks, twin.request = deepcopy(self.tasks, memo), deepcopy(self.request, memo)
        memo[id(self)] = twin
        return twin

    def enter(self, stack: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """The forward pre-hook of a stack of layers."""
        return _Entrance(self, stack)

    def begin(self, stack: str, module: nn.Module, arguments: dict[str, Any]) -> None:
        """A stack's forward starts: read its tokens, forget the last forward's routing."""
        context = read_tokens(arguments)
        self.stacks.pop(stack, None)
        if context is not None:
            self.stacks[stack] = context
        encoder = read_encoder(arguments) if stack == "decoder" else None
        if encoder is not None:
            self.stacks["encoder"] = encoder
        if stack != "decoder" and (torch.is_grad_enabled() or not module.training):
            self.trace = {}
            if torch.is_grad_enabled():
                self._graded.clear()
            if self.steps is not None:
                self.steps.append(self.trace)

    def context(self, layer: str, stack: str, x: Tensor, training: bool) -> RouteContext:
        """What the router of a layer may know about its input x (..., D)."""
        num_tokens = x.shape[:-1].numel()
        context = self.stacks.get(stack)
        if context is None:
            context = RouteContext((x.shape[0], num_tokens // max(x.shape[0], 1)))
        if context.shape[0] * context.shape[1] != num_tokens:
            raise StateError(f"{layer} received {num_tokens} tokens, the model's call has {context.shape}")
        tasks = None if self.tasks is None else spread_tasks(self.tasks.to(x.device), context)
        return dataclasses.replace(context, layer=layer, training=training, task_ids=tasks)

    def requested(self, context: RouteContext, num_experts: int, x: Tensor) -> Routing | None:
        """The routing a caller asked for, if any: one named expert at weight 1 for each sequence."""
        if self.request is None:
            return None
        ids_T = spread_tasks(self.request.to(x.device), dataclasses.replace(context, token_mask=None))
        weights_T = (ids_T >= 0).to(torch.promote_types(x.dtype, torch.float32))
        return Routing(ids_T[:, None], weights_T[:, None], None, num_experts)

    def record(self, routing: Routing, context: RouteContext) -> None:
        """Keeps a layer's decision; a no_grad forward in training mode and recomputation leave no trace."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self._check_recomputation(context.layer)
            return
        if torch.is_grad_enabled():
            self._graded.add(context.layer)
        if torch.is_grad_enabled() or not context.training:
            self.trace[context.layer] = Decision(routing, context)

    def _check_recomputation(self, layer: str) -> None:
        if layer not in self._graded:
            raise StateError(
                f"{layer} is recomputed in backward, but ran without gradients in forward: re-entrant checkpointing "
                "corrupts router gradients; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


class _Entrance:
    """A hook as an object, so that a deep copy of the model calls the copy's state."""

    def __init__(self, state: MixtureState, stack: str):
        self.state, self.stack = state, stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state.begin(self.stack, module, bound_arguments(module, args, kwargs))
