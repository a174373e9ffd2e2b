"""Every new module of a conversion: banks, routers and layers, built before the model is touched.

A linear-scope layer is a base, a bank and a router. A feed-forward block shares one routing: its first widen linear
holds the router. What decides for the whole model, or lies in pools that layers share, is in `shared`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from molex.allocation import allocate
from molex.architectures import block_of, by_block
from molex.config import MixtureConfig
from molex.errors import ConfigError
from molex.experts import ExpertBank, ExpertsConfig, LayerShape
from molex.experts.dora import DoRAConfig
from molex.experts.lora import LoRABank, LoRAConfig
from molex.experts.shards import ShardBank, ShardsConfig, share_pools
from molex.ffn import FFN, NarrowLinear, WidenLinear, find_ffn
from molex.kernels import Planner
from molex.layer import MixtureLinear
from molex.linears import execution_device, features, master_dtype
from molex.model_scope import build_head, check_model_scope
from molex.routers import Router
from molex.routers.constant import ConstantRouter
from molex.routers.scalings import ScalingsConfig
from molex.state import MixtureState
from molex.targets import Linears, Targets, find_targets
from molex.tokens import find_stacks, stack_of


class Builder:
    """`build()` gives the layers in the model's order; state, stacks, targets and `shared` belong to them.

    ranks: of each expert, in layers where they are not what the configuration says. device: of what is built; by
    default where each linear computes."""

    def __init__(
        self,
        model: nn.Module,
        config: MixtureConfig,
        ranks: Mapping[str, tuple[int, ...]],
        device: torch.device | None = None,
    ):
        self.model, self.config, self.device = model, config, device
        self.targets: Targets = find_targets(model, config)
        self.stacks = find_stacks(model)
        blocks = list(by_block(self.targets.routed))
        counts = allocate(len(blocks), config.num_experts, config.allocation)
        self.num_experts = dict(zip(blocks, counts, strict=True))
        self.ranks = ranks
        self.state = MixtureState(Planner(config.backend), [*self.targets.routed, *self.targets.plain])
        self.shared = nn.ModuleDict()

    def build(self) -> dict[str, MixtureLinear]:
        """Raises TargetError and ConfigError where the configuration does not fit the model, naming the layer."""
        router = self.config.router
        if router.model_scope:
            check_model_scope(self.config.scope, self.stacks, {len(self._ranks(name)) for name in self.targets.routed})
        layers = self._ffn_layers() if self.config.scope == "ffn" else self._linear_layers()
        layers |= {name: self._plain_layer(name, base) for name, base in self.targets.plain.items()}
        if isinstance(self.config.experts, ShardsConfig):
            self.shared["pools"] = self._pools(self.targets.routed, layers, self.config.experts)
            self.shared["pools"].requires_grad_(self.config.train_experts)
        if isinstance(router, ScalingsConfig):
            first, base = next(iter(self.targets.routed.items()))
            head = build_head(self.model, router, len(self.targets.routed), len(self._ranks(first)))
            self.shared["router"] = head.to(self._device(base))
        return {name: layers[name] for name, _ in self.model.named_modules() if name in layers}

    def _linear_layers(self) -> dict[str, MixtureLinear]:
        layers = {}
        for name, base in self.targets.routed.items():
            with _naming(name):
                shape = self._shape(name, base, self._ranks(name))
                bank, router = self._bank(shape), self._router(shape)
                if router is not None:
                    _check_pair(router, bank)
            if isinstance(bank, LoRABank) and router is not None:
                bank.activation_routed = router.needs_activations
            layers[name] = MixtureLinear(name, stack_of(self.stacks, name), base, bank, router, self.state)
        return layers

    def _ffn_layers(self) -> dict[str, MixtureLinear]:
        if not isinstance(self.config.experts, LoRAConfig | DoRAConfig):
            raise ConfigError("scope='ffn' needs experts 'lora' or 'dora'")
        layers: dict[str, MixtureLinear] = {}
        for block, names in by_block(self.targets.routed).items():
            ffn = find_ffn(block, [(name, self.targets.routed[name]) for name in names])
            with _naming(block):
                layers.update(self._one_ffn(ffn))
        return layers

    def _one_ffn(self, ffn: FFN) -> dict[str, MixtureLinear]:
        layers: dict[str, MixtureLinear] = {}
        leader: WidenLinear | None = None
        for name in ffn.widen:
            shape = self._shape(name, self.targets.routed[name], self._ranks(name))
            bank, router = self._bank(shape), self._router(shape) if leader is None else None
            if router is not None:
                if router.needs_activations:
                    raise ConfigError("a router that reads A x decides for one linear; use scope='linear'")
                _check_pair(router, bank)
            stack = stack_of(self.stacks, name)
            layer = WidenLinear(name, stack, shape.base, bank, router, self.state, leader)
            leader = leader or layer
            layers[name] = layer
        assert leader is not None
        shape = self._shape(ffn.narrow, self.targets.routed[ffn.narrow], self._ranks(ffn.narrow))
        bank = self._bank(shape)
        layers[ffn.narrow] = NarrowLinear(ffn.narrow, leader.stack, shape.base, bank, self.state, leader)
        return layers

    def _plain_layer(self, name: str, base: nn.Module) -> MixtureLinear:
        kind = self.config.experts if isinstance(self.config.experts, LoRAConfig | DoRAConfig) else LoRAConfig()
        with _naming(name):
            for setting in ("rank", "alpha"):
                if isinstance(getattr(self.config, setting), tuple):
                    raise ConfigError(f"{setting} is a list for experts, here is one LoRA: set plain_targets=()")
            bank = self._bank(self._shape(name, base, self.ranks.get(name, self.config.ranks(1))), kind)
        layer = MixtureLinear(name, stack_of(self.stacks, name), base, bank, ConstantRouter(1), self.state)
        layer.plain = True
        return layer

    def _pools(self, routed: Linears, layers: dict[str, MixtureLinear], config: ShardsConfig) -> nn.ModuleDict:
        shapes = {name: self._shape(name, base, self._ranks(name)) for name, base in routed.items()}
        banks = {name: layers[name].experts for name in routed}
        return share_pools(config, shapes, {name: bank for name, bank in banks.items() if isinstance(bank, ShardBank)})

    def _bank(self, shape: LayerShape, kind: ExpertsConfig | None = None) -> ExpertBank:
        bank = (self.config.experts if kind is None else kind).build(shape)
        if not self.config.train_experts:
            bank.requires_grad_(False)
        return bank

    def _router(self, shape: LayerShape) -> Router | None:
        if self.config.router.model_scope:
            return None
        return self.config.router.build(shape.in_features, len(shape.ranks)).to(shape.device)

    def _ranks(self, name: str) -> tuple[int, ...]:
        """Each expert's rank in a routed layer."""
        return self.ranks[name] if name in self.ranks else self.config.ranks(self.num_experts[block_of(name)])

    def _device(self, base: nn.Module) -> torch.device:
        return self.device or execution_device(base)

    def _shape(self, name: str, base: nn.Module, ranks: tuple[int, ...]) -> LayerShape:
        sizes = features(base)
        assert sizes is not None
        return LayerShape(
            name=name,
            base=base,
            in_features=sizes[0],
            out_features=sizes[1],
            ranks=ranks,
            scales=self.config.scales_of(ranks),
            dropout=self.config.dropout,
            device=self._device(base),
            dtype=master_dtype(base),
        )


def _check_pair(router: Router, bank: ExpertBank) -> None:
    """Raises ConfigError where a router decides on what these experts do not give, or for other experts than these."""
    if router.needs_activations and not (bank.gives_activations and set(bank.ranks) == {1}):
        raise ConfigError("this router decides on A x, of single ranks: use experts='lora' and rank=1")
    if router.num_experts != bank.num_heads * bank.num_experts:
        raise ConfigError(
            f"the router has {router.num_experts // bank.num_experts} heads and the experts have {bank.num_heads}; "
            "set num_heads, which both take"
        )


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Settings that do not fit one layer: the error says which."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place or 'the model'}: {error}") from error
