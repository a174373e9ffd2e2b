"""A feed-forward module computed as one operation, where it is act(gate x) ⊙ (up x), down, and nobody looks inside.

Its three mixture layers would give every expert of a token a stream of its own through the activation between them
(`molex.ffn`). The module's own forward says whether that is all that happens: it is traced, not run, and no model is
known by name. Where something watches one of the layers (hooks, sharding) or autocast is on, they run one by one.
"""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from molex.experts.lora import LoRABank, everyone
from molex.ffn import NarrowLinear, WidenLinear
from molex.kernels.block import Block, Projection
from molex.kernels.streams import ACTIVATIONS
from molex.layer import MixtureLinear
from molex.linears import hooked
from molex.routing import Routing


class GatedForward:
    """Stands in the module's `forward`. An object, so that a deep copy of the model calls the copy's layers."""

    def __init__(
        self,
        module: nn.Module,
        names: tuple[str, str, str, str],
        layers: tuple[WidenLinear, WidenLinear, NarrowLinear],
        act: nn.Module,
        activation: str,
    ):
        self.module, self.names, self.layers, self.act, self.activation = module, names, layers, act, activation

    def __call__(self, x: Tensor) -> Tensor:
        if self._watched(x):
            return type(self.module).forward(self.module, x)
        state = self.layers[0].state
        state.unseen.difference_update(layer.name for layer in self.layers)
        block = self._block(x)
        return state.planner.pick_block(x, block).ffn(x, block)

    def _block(self, x: Tensor) -> Block:
        gate, up, down = self.layers
        routing = MixtureLinear.route(gate.leader, x, None)
        chosen = everyone(routing)
        keep, share = _keep(down, x)
        return Block(
            gate=_projection(gate, x, chosen, _dropped(gate, x)),
            up=_projection(up, x, chosen, _dropped(up, x)),
            down=_projection(down, x, routing._replace(weights=routing.weights * share), None),
            activation=self.activation,
            routing=routing,
            keep=keep,
        )

    def _watched(self, x: Tensor) -> bool:
        """Whether someone must see the layers run one by one, changes what they do, or has put others there."""
        if (
            not self.layers[0].state.enabled
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(x.device.type)
        ):
            return True
        inside = (*self.layers, *(layer.experts for layer in self.layers), self.act)
        there = (self.module.get_submodule(name) for name in self.names)
        return any(map(hooked, inside)) or any(map(operator.is_not, there, (*self.layers, self.act)))

    def remove(self) -> None:
        """Gives the module its own forward back."""
        del self.module.forward


def _projection(layer: MixtureLinear, x: Tensor, routing: Routing, source: Tensor | None) -> Projection:
    bank = layer.experts
    assert isinstance(bank, LoRABank)
    return Projection(layer.base, bank.factors(x.dtype), routing.scaled(bank.scale), source)


def _drops(layer: MixtureLinear) -> bool:
    return layer.experts.training and layer.experts.dropout.p > 0


def _dropped(layer: MixtureLinear, x: Tensor) -> Tensor | None:
    """What a widening layer's experts read (T, D), where that is not x."""
    return layer.experts.dropout(x).reshape(-1, x.shape[-1]) if _drops(layer) else None


def _keep(down: MixtureLinear, x: Tensor) -> tuple[Tensor | None, float]:
    """Which activations the down projection's experts read (T, I), and what makes up for the others."""
    if not _drops(down):
        return None, 1.0
    share = 1 - down.experts.dropout.p
    keep_TI = torch.empty(x.shape[:-1].numel(), down.in_features, dtype=torch.bool, device=x.device)
    return keep_TI.bernoulli_(share), 1 / share if share else 0.0


def join_blocks(model: nn.Module, layers: Collection[MixtureLinear]) -> list[GatedForward]:
    """Every module of a converted model that holds such a block from now on computes it at once."""
    joined = []
    for down in layers:
        if isinstance(down, NarrowLinear):
            widen = [layer for layer in layers if isinstance(layer, WidenLinear) and layer.leader is down.leader]
            module = model.get_submodule(down.name.rpartition(".")[0])
            joined.append(join(module, widen, down))
    return [forward for forward in joined if forward is not None]


def join(module: nn.Module, widen: list[WidenLinear], narrow: NarrowLinear) -> GatedForward | None:
    """Has a module of such a block compute it at once; None where it is another kind of block."""
    names = None if "forward" in vars(module) else _gated_names(module)
    if names is None:
        return None
    gate, up, down, act = (module.get_submodule(name) for name in names)
    banks, activation = [layer.experts for layer in (*widen, narrow)], _name_of(act)
    if down is not narrow or {gate, up} != {*widen} or activation is None:
        return None
    if any(type(bank) is not LoRABank for bank in banks) or len({bank.ranks for bank in banks}) > 1:
        return None
    module.forward = GatedForward(module, names, (gate, up, down), act, activation)  # type: ignore[arg-type]
    return module.forward


def _gated_names(module: nn.Module) -> tuple[str, str, str, str] | None:
    """What a module calls its gate, up, down and activation, if its forward is down(act(gate(x)) * up(x))."""
    made: list[_Value] = []
    x = _Value(made)
    try:
        y = type(module).forward(_Seen(module, made), x)
    except Exception:  # noqa: BLE001 (a forward that does anything else fails in any way, and is another kind of block)
        return None
    if len(made) != 6 or not isinstance(y, _Value):
        return None
    product = _argument(y)
    if product is None or len(product.of) != 2:
        return None
    activated, up = product.of
    gate = _argument(activated)
    if gate is None or _argument(up) is not x or _argument(gate) is not x:
        return None
    return gate.called, up.called, y.called, activated.called


class _Value:
    """x, or what a forward made of it: by calling a submodule on one value, or as a product of two."""

    def __init__(self, made: list["_Value"], *of: "_Value", called: str = ""):
        self.made, self.of, self.called = made, of, called
        made.append(self)

    def __mul__(self, other: "_Value") -> "_Value":
        return _Value(self.made, self, other)


def _argument(value: _Value) -> _Value | None:
    """What a submodule was called on, where this came of it."""
    return value.of[0] if value.called else None


class _Seen:
    """A module as its forward sees itself: a call of a submodule is noted, not made. Nothing else is touched, so that
    others may run their models meanwhile; torch.fx replaces the calls of all modules while it traces one."""

    def __init__(self, module: nn.Module, made: list[_Value], name: str = ""):
        self._module, self._made, self._name = module, made, name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, nn.Module):
            return _Seen(found, self._made, f"{self._name}.{name}".lstrip("."))
        return found

    def __call__(self, value: _Value) -> _Value:
        assert self._name, "it calls itself"
        return _Value(self._made, value, called=self._name)


def _name_of(act: nn.Module) -> str | None:
    """Which of ACTIVATIONS a module computes, by trying."""
    if next(act.parameters(), None) is not None:
        return None
    near, far = torch.linspace(-6, 6, 97, dtype=torch.float64, device="cpu"), (-100.0, -11.0, 11.0, 100.0)
    x = torch.cat([near, near.new_tensor(far)])  # far too: some are another one, cut off. On the CPU, as all in here
    with torch.no_grad():
        y = act(x)
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(known.forward(x), y, atol=1e-7)), None)
