"""convert: swap a model's linears for mixture layers, in place, reversibly.

Everything is checked and built before the model is touched, so a refused conversion leaves it as it was. The base
objects themselves stay, wrapped; the base is frozen; hooks tell the mixture's state about each forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from molex.allocation import allocate
from molex.architectures import block_of
from molex.bases import execution_device, features, master_dtype
from molex.config import MixtureConfig
from molex.errors import ConfigError, StateError, TargetError
from molex.experts import ExpertBank, LayerShape
from molex.experts.dora import DoRAConfig
from molex.experts.lora import LoRABank, LoRAConfig
from molex.experts.shards import ShardBank, ShardPool, ShardsConfig
from molex.ffn import FFN, NarrowLinear, WidenLinear, find_ffn
from molex.hooks import leave_fused_paths, watch_calls
from molex.io.pretrained import SavePretrained
from molex.kernels import Planner
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.routers import Router
from molex.routers.constant import ConstantRouter
from molex.routers.scalings import ScalingsConfig, ScalingsRouter
from molex.stacks import find_stacks, stack_of
from molex.state import MixtureState
from molex.targets import by_block, find_modules, find_targets
from molex.two_pass import TwoPass


def convert(model: nn.Module, config: MixtureConfig) -> Mixture:
    """Turns a dense model into a mixture of LoRA experts, in place, and returns the handle.

    Raises StateError on a second conversion, TargetError where a pattern or an architecture does not fit,
    ConfigError on settings that contradict each other. The base's parameters are frozen.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"{model!r} is no model; give one, such as AutoModelForCausalLM.from_pretrained(...)")
    if not isinstance(config, MixtureConfig):
        raise ConfigError(f"{config!r} is no MixtureConfig; give molex.preset(name, ...), see `molex methods`")
    if any(isinstance(module, MixtureLinear) for module in model.modules()):
        raise StateError("this model is a mixture already; mixture.revert() gives the base back")
    builder = _Builder(model, config)
    layers = builder.build()
    mixture = Mixture(model, config, layers, builder.also_trained, builder.state)
    mixture.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for name in builder.also_trained:
        model.get_submodule(name).requires_grad_(True)
    if builder.shared:
        model.add_module("molex", builder.shared.train(model.training))
    mixture.hooks = watch_calls(model, builder.stacks, builder.state) + leave_fused_paths(model, layers)
    if isinstance(config.router, ScalingsConfig):
        decided = {name: layer for name, layer in layers.items() if layer.router is None}
        mixture.hooks += TwoPass(builder.state, builder.head, decided).attach(builder.stacks[0].module)
    model.molex_mixture = mixture  # type: ignore[assignment]
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = SavePretrained(model)
    return mixture


class _Builder:
    """Builds every new module of a conversion before the model is touched."""

    def __init__(self, model: nn.Module, config: MixtureConfig):
        self.model, self.config = model, config
        self.routed = find_targets(model, config.targets)
        self.plain = find_targets(model, config.plain_targets) if config.plain_targets else {}
        if not self.routed:
            found = "names no linear inside this model" if config.targets else "is empty"
            raise TargetError(f"targets={config.targets} {found}: nothing to convert; give names of linears")
        self.also_trained = find_modules(model, config.also_train)
        self._check_overlaps()
        self.stacks = find_stacks(model)
        blocks = list(by_block([*self.routed]))
        counts = allocate(len(blocks), config.num_experts, config.allocation)
        self.num_experts = dict(zip(blocks, counts, strict=True))
        self.state = MixtureState(Planner(config.backend), [*self.routed, *self.plain])
        self.shared = nn.ModuleDict()

    def _check_overlaps(self) -> None:
        both = sorted(set(self.routed) & set(self.plain))
        if both:
            raise TargetError(f"{both[0]} is both in targets and in plain_targets; leave it in one")
        for whole in self.also_trained:
            inside = [name for name in (*self.routed, *self.plain) if f"{name}.".startswith(f"{whole}.")]
            if inside:
                raise TargetError(f"also_train names {whole}, which holds the target {inside[0]}; leave it in one")

    def build(self) -> dict[str, MixtureLinear]:
        """All layers, in the model's order."""
        if isinstance(self.config.router, ScalingsConfig):
            self._check_model_scope()
        make = self._ffn_layers if self.config.scope == "ffn" else self._linear_layers
        layers = {**make(), **{name: self._plain_layer(name, base) for name, base in self.plain.items()}}
        ordered = {name: layers[name] for name, _ in self.model.named_modules() if name in layers}
        if isinstance(self.config.experts, ShardsConfig):
            self._make_pools(ordered, self.config.experts)
        if isinstance(self.config.router, ScalingsConfig):
            self.shared["router"] = self.head = self._make_head(self.config.router)
        return ordered

    def _linear_layers(self) -> dict[str, MixtureLinear]:
        layers = {}
        for name, base in self.routed.items():
            with _naming(name):
                shape = self._shape(name, base, self.num_experts[block_of(name)])
                bank = self._bank(shape)
                router = self._router(shape)
            if isinstance(bank, LoRABank) and router is not None:
                bank.activation_routed = router.needs_activations
            layers[name] = MixtureLinear(name, stack_of(self.stacks, name), base, bank, router, self.state)
        return layers

    def _ffn_layers(self) -> dict[str, MixtureLinear]:
        if not isinstance(self.config.experts, LoRAConfig | DoRAConfig):
            raise ConfigError("scope='ffn' needs experts 'lora' or 'dora'")
        if isinstance(self.config.router, ScalingsConfig):
            raise ConfigError("a model-scope router decides for linears; use scope='linear'")
        layers: dict[str, MixtureLinear] = {}
        for block, names in by_block([*self.routed]).items():
            ffn = find_ffn(block, [(name, self.routed[name]) for name in names])
            with _naming(block):
                layers.update(self._one_ffn(ffn, self.num_experts[block]))
        return layers

    def _one_ffn(self, ffn: FFN, num_experts: int) -> dict[str, MixtureLinear]:
        layers: dict[str, MixtureLinear] = {}
        leader: WidenLinear | None = None
        for name in ffn.widen:
            shape = self._shape(name, self.routed[name], num_experts)
            router = self._router(shape) if leader is None else None
            if router is not None and router.needs_activations:
                raise ConfigError("a router that reads A x decides for one linear; use scope='linear'")
            stack = stack_of(self.stacks, name)
            layer = WidenLinear(name, stack, shape.base, self._bank(shape), router, self.state, leader)
            leader = leader or layer
            layers[name] = layer
        assert leader is not None
        shape = self._shape(ffn.narrow, self.routed[ffn.narrow], num_experts)
        bank = self._bank(shape)
        layers[ffn.narrow] = NarrowLinear(ffn.narrow, leader.stack, shape.base, bank, self.state, leader)
        return layers

    def _plain_layer(self, name: str, base: nn.Module) -> MixtureLinear:
        shape = self._shape(name, base, 1)
        kind = self.config.experts if isinstance(self.config.experts, LoRAConfig | DoRAConfig) else LoRAConfig()
        return MixtureLinear(name, stack_of(self.stacks, name), base, kind.build(shape), ConstantRouter(1), self.state)

    def _bank(self, shape: LayerShape) -> ExpertBank:
        bank = self.config.experts.build(shape)
        if not self.config.train_experts:
            bank.requires_grad_(False)
        return bank

    def _router(self, shape: LayerShape) -> Router | None:
        if isinstance(self.config.router, ScalingsConfig):
            return None
        return self.config.router.build(shape.in_features, len(shape.ranks)).to(shape.device)

    def _shape(self, name: str, base: nn.Module, num_experts: int) -> LayerShape:
        sizes = features(base)
        assert sizes is not None
        return LayerShape(
            name=name,
            base=base,
            in_features=sizes[0],
            out_features=sizes[1],
            ranks=self.config.ranks(num_experts),
            scales=self.config.scales(num_experts),
            dropout=self.config.dropout,
            device=execution_device(base),
            dtype=master_dtype(base),
        )

    def _make_pools(self, layers: dict[str, MixtureLinear], config: ShardsConfig) -> None:
        """One pool for each module type: the layers whose names end alike and whose shapes agree."""
        types: dict[str, list[MixtureLinear]] = {}
        for name in self.routed:
            layer = layers[name]
            kind = f"{name.split('.')[-1]}_{layer.in_features}_{layer.out_features}"
            types.setdefault(kind, []).append(layer)
        pools = nn.ModuleDict()
        for kind, members in types.items():
            shape = self._shape(members[0].name, members[0].base, 1)
            pools[kind] = ShardPool(config, len(members), shape)
            for position, layer in enumerate(members):
                assert isinstance(layer.experts, ShardBank)
                layer.experts.join_pool(pools[kind], position)  # type: ignore[arg-type]
        self.shared["pools"] = pools

    def _check_model_scope(self) -> None:
        if len(self.stacks) > 1:
            raise TargetError(
                "xlora reads the model's own last hidden states first: encoder-decoders are not supported"
            )
        if len(set(self.num_experts.values())) > 1:
            raise ConfigError("a model-scope router needs the same number of experts in every layer")

    def _make_head(self, config: ScalingsConfig) -> ScalingsRouter:
        model_config = getattr(self.model, "config", None)
        if not isinstance(model_config, PreTrainedConfig):
            raise TargetError("xlora needs a transformers model: its config names the hidden size the head reads")
        num_experts = next(iter(self.num_experts.values()))
        text_config = model_config.get_text_config()
        # OPT projects its last hidden states to the embeddings' width, which in OPT-350m is not the layers'
        width = getattr(text_config, "word_embed_proj_dim", text_config.hidden_size)
        head = config.build_head(width, num_experts, len(self.routed))
        return head.to(execution_device(next(iter(self.routed.values()))))


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Settings that do not fit one layer: the error says which."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place or 'the model'}: {error}") from error
