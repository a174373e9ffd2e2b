"""MixtureState: the one side channel between a model's forward and its mixture layers.

One plain object per converted model. A forward pre-hook fills in what the call says about its tokens; layers read it,
and leave their routing in `trace`, which the next forward overwrites. Nothing is counted in forward and nothing
is global, so checkpointing, copies of the model and interleaved models cannot disturb each other.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from molex.errors import StateError
from molex.kernels import Planner
from molex.kernels.casts import Casts
from molex.routing import Decision, RouteContext, Routing
from molex.tokens import read_encoder, read_tokens, spread_ids


class MixtureState:
    """`stacks`: one context for each stack of layers ("model", or "encoder" and "decoder")."""

    def __init__(self, planner: Planner, layer_names: list[str]):
        self.planner, self.casts = planner, Casts()
        self.enabled = True
        self.tasks: Tensor | None = None  # (B,) or (B, S)
        self.request: Tensor | None = None  # (B,) expert ids, -1 = the base alone
        self.stacks: dict[str, RouteContext] = {}
        self.trace: dict[str, Decision] = {}
        self.assigned: dict[str, Routing] = {}  # what a model-scope router decided
        self.pending: dict[str, tuple[Tensor, Routing]] = {}  # a feed-forward block's input and its routing
        self.steps: list[dict[str, Decision]] | None = None
        self.unseen = set(layer_names)
        self._traced: set[str] = set()  # the stacks whose layers the trace holds
        self._graded: set[str] = set()  # the layers that ran with gradients
        self._contexts: dict[str, RouteContext] = {}  # what each layer of the traced forward knew
        # contexts and assigned routings of the forward that backward has come to
        self._reached: tuple[dict[str, RouteContext], dict[str, Routing]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixtureState":
        """A copy without the tensors of the last forward, which autograd would refuse to copy."""
        twin = MixtureState(Planner(self.planner.choice), list(self.unseen))
        twin.enabled, twin.casts = self.enabled, deepcopy(self.casts, memo)
        twin.tasks, twin.request = deepcopy(self.tasks, memo), deepcopy(self.request, memo)
        memo[id(self)] = twin
        return twin

    @contextmanager
    def replaced(self, **fields: Any) -> Iterator[None]:
        """Some of the fields above changed for a while."""
        before = {name: getattr(self, name) for name in fields}
        vars(self).update(fields)
        try:
            yield
        finally:
            vars(self).update(before)

    def begin(self, stack: str, training: bool, arguments: dict[str, Any]) -> None:
        """A stack's forward starts: read its tokens, forget the last forward's routing. The base alone, with the
        mixture disabled, changes nothing."""
        if not self.enabled:
            return
        self.casts.begin(arguments)
        self.pending.clear()
        self._reached = None
        self.stacks.pop(stack, None)
        context = read_tokens(arguments)
        if context is not None:
            self.stacks[stack] = context
        encoder = read_encoder(arguments) if stack == "decoder" else None
        if encoder is not None:
            self.stacks["encoder"] = encoder
        if torch.is_grad_enabled() or not training:
            self._open_trace(stack)

    def _open_trace(self, stack: str) -> None:
        """A new trace; a decoder right after its encoder belongs to the same forward."""
        if stack == "decoder" and self._traced == {"encoder"}:
            self._traced.add(stack)
            return
        self.trace, self._contexts, self._traced = {}, {}, {stack}
        if torch.is_grad_enabled():
            self._graded.clear()
        if self.steps is not None:
            self.steps.append(self.trace)

    def mark(self, output: Tensor) -> None:
        """A tensor that a loss may read. When backward comes to it, what it recomputes is of this forward and sees its
        trace, however many others came between. One backward at a time: over several devices autograd runs two at once.
        """
        if not self.enabled or not output.requires_grad or torch.compiler.is_compiling():
            return
        # never the trace: it holds tensors that are marked, and a hook that holds its own tensor is never freed
        forward = (self._contexts, self.assigned)

        def reach(grad: Tensor) -> None:
            self._reached = forward

        output.register_hook(reach)

    def _recomputed(self, layer: str) -> RouteContext | None:
        """What a layer knew in the forward that is now recomputed; None outside of recomputation."""
        if not _recomputes():
            return None
        return (self._contexts if self._reached is None else self._reached[0]).get(layer)

    def context(self, layer: str, stack: str, x: Tensor, training: bool) -> RouteContext:
        """What the router of a layer may know about its input x (..., D). Recomputation sees what forward saw.

        Raises StateError where the layer's tokens are not those of the model's call.
        """
        num_tokens = x.shape[:-1].numel()
        earlier = self._recomputed(layer)
        context = self._current(layer, stack, x, training) if earlier is None else earlier
        if context.shape[0] * context.shape[1] != num_tokens:
            raise StateError(f"{layer} received {num_tokens} tokens, the model's call has {context.shape}")
        return context

    def _current(self, layer: str, stack: str, x: Tensor, training: bool) -> RouteContext:
        context = self.stacks.get(stack)
        if context is None:
            num_rows = x.shape[0] if x.dim() > 1 else 1
            context = RouteContext((num_rows, x.shape[:-1].numel() // max(num_rows, 1)))
        tasks = None if self.tasks is None else spread_ids(self.tasks, context, "task ids")
        requests = None if self.request is None else spread_ids(self.request, context, "adapters")
        mask_T, tasks_T = _beside(context.token_mask, x), _beside(tasks, x)
        if tasks_T is not None and mask_T is not None:
            tasks_T = tasks_T.where(mask_T, 0)  # padding may carry any number
        return dataclasses.replace(
            context,
            layer=layer,
            training=training,
            token_mask=mask_T,
            segment_ids=_beside(context.segment_ids, x),
            task_ids=tasks_T,
            request_ids=_beside(requests, x),
        )

    def decided(self, layer: str) -> Routing:
        """What the model-scope router decided for a layer; recomputation sees what forward saw."""
        return (self._reached[1] if _recomputes() and self._reached is not None else self.assigned)[layer]

    def requested(self, context: RouteContext, num_experts: int, x: Tensor) -> Routing | None:
        """The routing a caller asked for, if any: one expert at weight 1 for each sequence.

        A layer of one expert has it at work for whoever asks for any.
        """
        if context.request_ids is None:
            return None
        ids_T1 = context.request_ids[:, None]
        ids_T1 = ids_T1.clamp(max=0) if num_experts == 1 else ids_T1
        weights_T1 = (ids_T1 >= 0).to(torch.promote_types(x.dtype, torch.float32))
        return Routing(ids_T1, weights_T1, None, num_experts)

    def record(self, routing: Routing, context: RouteContext) -> None:
        """Keeps a layer's decision; a no_grad forward in training mode and recomputation leave no trace."""
        if _recomputes():
            self._check_recomputation(context.layer)
            return
        if torch.is_grad_enabled():
            self._graded.add(context.layer)
        if torch.is_grad_enabled() or not context.training:
            self.trace[context.layer] = Decision(routing, context)
            self._contexts[context.layer] = context
            if routing.logits is not None and not self.assigned:  # what a head decided is not recomputed
                self.mark(routing.logits)

    def _check_recomputation(self, layer: str) -> None:
        if layer not in self._graded:
            raise StateError(
                f"{layer} is recomputed in backward, but ran without gradients in forward: re-entrant checkpointing "
                "corrupts router gradients; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _recomputes() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing. Only torch's own graph task knows: the
    checkpoint's context is not told to the modules it recomputes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _beside(per_token: Tensor | None, x: Tensor) -> Tensor | None:
    """On the layer's device, where a model is spread over several."""
    return None if per_token is None else per_token.to(x.device)
