"""FFN scope: a feed-forward block whose linears share one routing, with a nonlinearity between the halves.

    h_e = act(W_gate x + Δ_gate,e x) ⊙ (W_up x + Δ_up,e x)
    y = W_down (h_0 + Σ_k w_k (h_k − h_0)) + Σ_k w_k Δ_down,k h_k

No code per architecture: `widen` linears (gate, up, fc1, a fused gate_up) return streams on a new first axis, one for
each chosen expert and, where weights need not sum to 1, the base's before them; the model's own activation acts on them
elementwise; the `narrow` linear (down, fc2) sums them and runs the base once. (MixLoRA, arXiv 2404.15159.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molex.errors import StateError, TargetError
from molex.experts import ExpertBank
from molex.kernels import Form
from molex.layer import MixtureLinear
from molex.linears import features
from molex.routers import Router
from molex.routing import Routing
from molex.state import MixtureState


class FFN(NamedTuple):
    """The linears of one block, by name: those that widen D -> I (or 2I, fused) and the one that narrows I -> D."""

    widen: tuple[str, ...]
    narrow: str


class WidenLinear(MixtureLinear):
    """The first of a block's widen linears holds the router; the others ask it."""

    form: Form = "widen"

    def __init__(
        self,
        name: str,
        stack: str,
        base: nn.Module,
        experts: ExpertBank,
        router: Router | None,
        state: MixtureState,
        leader: "WidenLinear | None",
    ):
        super().__init__(name, stack, base, experts, router, state)
        self._leader = () if leader is None else (leader,)  # in a tuple: not a submodule of this one

    @property
    def leader(self) -> "WidenLinear":
        return self._leader[0] if self._leader else self

    def route(self, x: Tensor, activations: Tensor | None) -> Routing:
        """Routes a block's input once: the same tensor asks again, another tensor is another call."""
        leader = self.leader
        known = self.state.pending.get(leader.name)
        if known is not None and _same(known[0], x):
            return known[1]
        routing = MixtureLinear.route(leader, x, None)
        self.state.pending[leader.name] = (x, routing)
        return routing


class NarrowLinear(MixtureLinear):
    """Takes the streams back together under the routing its block's input got."""

    form: Form = "narrow"

    def __init__(
        self,
        name: str,
        stack: str,
        base: nn.Module,
        experts: ExpertBank,
        state: MixtureState,
        leader: WidenLinear,
    ):
        super().__init__(name, stack, base, experts, None, state)
        self._leader = (leader,)

    @property
    def leader(self) -> WidenLinear:
        return self._leader[0]

    def route(self, x: Tensor, activations: Tensor | None) -> Routing:
        leader = self.leader
        if leader.name not in self.state.pending:
            raise StateError(f"{self.name} ran before {leader.name}: this is not a feed-forward block of two halves")
        source, routing = self.state.pending.pop(leader.name)
        num_streams = routing.expert_ids.shape[1] + routing.base_streams
        if x.shape != (num_streams, *source.shape[:-1], self.in_features):
            raise StateError(
                f"{self.name} got {tuple(x.shape)} instead of {num_streams} streams of {tuple(source.shape[:-1])}: "
                "something between the two halves of this block is not elementwise; use scope='linear'"
            )
        return routing


def _same(known: Tensor, x: Tensor) -> bool:
    """Whether both are one tensor, or views of the same memory: ZeRO-3 hands each module a view of its own."""
    if known is x or torch.compiler.is_compiling():
        return known is x
    return known.data_ptr() == x.data_ptr() and known.shape == x.shape and known.stride() == x.stride()


def find_ffn(block: str, linears: Sequence[tuple[str, nn.Module]]) -> FFN:
    """Tells a block's widening linears from its narrowing one by their shapes.

    Raises TargetError where they are not one or two ways in (or one fused) and exactly one way out.
    """
    shapes = {name: features(module) for name, module in linears}
    for narrow, shape in reversed(shapes.items()):  # of two linears D -> I and I -> D, the later one narrows
        if shape is None:
            continue
        inner, outer = shape
        widen = tuple(name for name in shapes if name != narrow)
        widths = [shapes[name] for name in widen]
        plain = all(width == (outer, inner) for width in widths) and len(widen) in (1, 2)
        fused = widths == [(outer, 2 * inner)]
        if plain or fused:
            return FFN(widen, narrow)
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise TargetError(
        f"{block or 'the model'}: {listed} are not one feed-forward block (one or two linears D -> I, or a fused "
        "D -> 2I, and one I -> D). scope='ffn' takes a whole block; use scope='linear' for single linears"
    )
