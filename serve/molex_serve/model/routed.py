"""A routed mixture over its own tokens: its experts and routers are molex's own layers, the base's output is given.

    y[rows] = y[rows] + Σ_k w_k B_e A_e x[rows]        rows: the tokens of this adapter in the step

At single linears the base's product is already there for all tokens, so the layer is handed it instead of a base. A
feed-forward block with experts runs whole on its own rows, since the model's activation lies between the halves.
"""

from typing import NamedTuple

from torch import Tensor, nn

from molex.checks import listed
from molex.experts.dora import DoRABank
from molex.experts.lora import LoRABank
from molex.ffn import NarrowLinear
from molex.layer import MixtureLinear
from molex.linears import StandIn, features
from molex.mixture import Mixture
from molex.model_scope import assign
from molex.routers.scalings import ScalingsRouter
from molex.routing import RouteContext
from molex_serve.errors import BadAdapter, BadRequest


class Given(StandIn):
    """In the place of a base whose output is there already; some experts read the weight too."""

    output: Tensor

    def __init__(self, base: nn.Module):
        super().__init__()
        self._base = (base,)  # in a tuple: not a submodule of this one

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.output


class Attribution(NamedTuple):
    """(T, E) each expert's share of a token's weight, over all layers, and the experts' names."""

    shares: Tensor
    names: list[str]


class RoutedAdapter:
    """Made once for a resident mixture. head: what decides for all layers, after a first pass over the base (X-LoRA).
    Raises BadAdapter on what cannot share a batch."""

    def __init__(self, mixture: Mixture):
        self.mixture, self.head = mixture, mixture.head
        ffn = {name for name, layer in mixture.layers.items() if layer.form != "linear"}
        self.blocks = {block: mixture.model.get_submodule(block) for block in map(_block_of, _narrow(mixture))}
        for block, module in self.blocks.items():
            _check_is_block(block, module, ffn)
        self.layers = {name: layer for name, layer in mixture.layers.items() if name not in ffn}
        for layer in self.layers.values():
            if not isinstance(layer.base, Given):  # or it was resident before
                layer.base = Given(layer.base)
        for layer in mixture.layers.values():
            _narrow_factors(layer)
        self.num_tasks = _num_tasks(mixture)

    def check_task(self, task: int | None) -> None:
        """Raises BadRequest unless a request says a task that the routers know, where they ask for one."""
        if self.num_tasks is None:
            return
        if task is None or not 0 <= task < self.num_tasks:
            raise BadRequest(f"task={task}; this adapter is routed by tasks: give one from 0 to {self.num_tasks - 1}")

    def begin(self, num_tokens: int, tasks: Tensor | None) -> None:
        """A step starts, in which so many tokens are its own."""
        state = self.mixture.state
        state.stacks = {layer.stack: RouteContext((1, num_tokens)) for layer in self.mixture.layers.values()}
        state.tasks = None if tasks is None else tasks[None]
        state.trace = {}
        state.pending.clear()

    def decide(self, hidden_ND: Tensor) -> None:
        """Has the head decide for the step's own tokens, by the base's last hidden states."""
        assert isinstance(self.head, ScalingsRouter)
        decided = {name: layer for name, layer in self.layers.items() if layer.router is None}
        assign(self.mixture.state, self.head, decided, hidden_ND)

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x (N, D), y (N, O) of its own tokens -> (N, O)."""
        layer = self.layers[name]
        assert isinstance(layer.base, Given)
        layer.base.output = y
        return layer(x)

    def attribution(self) -> Attribution | None:
        """Who served the tokens of the last step; None where nothing chose."""
        routed = [d.routing for name, d in self.mixture.state.trace.items() if not self.mixture.layers[name].plain]
        names = self.mixture.experts
        routed = [routing for routing in routed if routing.num_experts == len(names)]
        if not routed or len(names) < 2:
            return None
        gates_TE = sum(routing.gates().abs() for routing in routed)
        assert isinstance(gates_TE, Tensor)
        return Attribution(gates_TE / gates_TE.sum(1, keepdim=True).clamp(min=1e-9), names)


def _narrow(mixture: Mixture) -> list[str]:
    return [name for name, layer in mixture.layers.items() if isinstance(layer, NarrowLinear)]


def _block_of(name: str) -> str:
    return name.rpartition(".")[0]


def _check_is_block(block: str, module: nn.Module, ffn: set[str]) -> None:
    """Raises BadAdapter where the module that holds a block's linears does more than the block."""
    linears = [f"{block}.{name}" for name, child in module.named_modules() if name and features(child) is not None]
    beside = [name for name in linears if not any(f"{name}.".startswith(f"{layer}.") for layer in ffn)]
    if beside:
        raise BadAdapter(f"{block} holds {listed(beside)} beside the block with experts: it cannot run on some tokens")


def _narrow_factors(layer: MixtureLinear) -> None:
    """Factors in the dtype of the products: a cast of float32 masters at every step would cost more than the step."""
    bank, weight = layer.experts, layer.weight
    if isinstance(bank, LoRABank) and not isinstance(bank, DoRABank) and weight.is_floating_point():
        for parameter in bank.parameters(recurse=False):
            parameter.data = parameter.data.to(weight.dtype)


def _num_tasks(mixture: Mixture) -> int | None:
    """How many tasks its routers tell apart; None where they do not ask."""
    found = [getattr(layer.router, "num_tasks", None) for layer in mixture.layers.values()]
    return max((number for number in found if number is not None), default=None)
