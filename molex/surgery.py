"""convert: swap a model's linears for mixture layers, in place, reversibly.

Everything is checked and built before the model is touched, so a refused conversion leaves it as it was. The base
objects themselves stay, wrapped; the base is frozen; hooks tell the mixture's state about each forward.
"""

import torch
from torch import nn

from molex.allocation import allocate
from molex.config import MixtureConfig
from molex.errors import ConfigError, StateError, TargetError
from molex.experts import ExpertBank, LayerShape
from molex.experts.dora import DoRAConfig
from molex.experts.lora import LoRABank, LoRAConfig
from molex.experts.shards import ShardBank, ShardPool, ShardsConfig
from molex.ffn import FFN, NarrowLinear, WidenLinear, find_ffn
from molex.kernels import Planner
from molex.layer import MixtureLinear, features
from molex.losses import block_of
from molex.mixture import Mixture
from molex.routers import Router
from molex.routers.constant import ConstantRouter
from molex.routers.scalings import ScalingsConfig, ScalingsRouter
from molex.state import MixtureState
from molex.targets import by_block, find_modules, find_targets, stack_of
from molex.two_pass import TwoPass


def convert(model: nn.Module, config: MixtureConfig) -> Mixture:
    """Turns a dense model into a mixture of LoRA experts, in place, and returns the handle.

    Raises StateError on a second conversion, TargetError where a pattern or an architecture does not fit,
    ConfigError on settings that contradict each other. The base's parameters are frozen.
    """
    if hasattr(model, "molex_mixture"):
        raise StateError("this model is a mixture already; mixture.revert() gives the base back")
    builder = _Builder(model, config)
    layers = builder.build()
    also_trained = find_modules(model, config.also_train)
    mixture = Mixture(model, config, layers, also_trained, builder.state)
    mixture.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for name in also_trained:
        model.get_submodule(name).requires_grad_(True)
    if builder.shared:
        model.add_module("molex", builder.shared.train(model.training))
    _add_hooks(mixture)
    model.molex_mixture = mixture  # type: ignore[assignment]
    return mixture


class _Builder:
    """Builds every new module of a conversion before the model is touched."""

    def __init__(self, model: nn.Module, config: MixtureConfig):
        self.model, self.config = model, config
        self.routed = find_targets(model, config.targets)
        self.plain = find_targets(model, config.plain_targets) if config.plain_targets else {}
        both = sorted(set(self.routed) & set(self.plain))
        if both:
            raise TargetError(f"{both[0]} is both in targets and in plain_targets; leave it in one")
        if not self.routed:
            raise TargetError("targets is empty: nothing to convert")
        blocks = list(by_block([*self.routed]))
        counts = allocate(len(blocks), config.num_experts, config.allocation)
        self.num_experts = dict(zip(blocks, counts, strict=True))
        self.state = MixtureState(Planner(config.backend), [*self.routed, *self.plain])
        self.shared = nn.ModuleDict()

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
            self.shared["router"] = self._make_head(self.config.router)
        return ordered

    def _linear_layers(self) -> dict[str, MixtureLinear]:
        layers = {}
        for name, base in self.routed.items():
            shape = self._shape(name, base, self.num_experts[block_of(name)])
            bank = self._bank(shape)
            router = self._router(shape)
            if isinstance(bank, LoRABank) and router is not None:
                bank.activation_routed = router.needs_activations
            layers[name] = MixtureLinear(name, stack_of(self.model, name), base, bank, router, self.state)
        return layers

    def _ffn_layers(self) -> dict[str, MixtureLinear]:
        if not isinstance(self.config.experts, LoRAConfig | DoRAConfig):
            raise ConfigError("scope='ffn' needs experts 'lora' or 'dora'")
        if isinstance(self.config.router, ScalingsConfig):
            raise ConfigError("a model-scope router decides for linears; use scope='linear'")
        layers: dict[str, MixtureLinear] = {}
        for block, names in by_block([*self.routed]).items():
            ffn = find_ffn(block, [(name, self.routed[name]) for name in names])
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
            stack = stack_of(self.model, name)
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
        return MixtureLinear(name, stack_of(self.model, name), base, kind.build(shape), ConstantRouter(1), self.state)

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
            device=_execution_device(base),
            dtype=_master_dtype(base),
        )

    def _make_pools(self, layers: dict[str, MixtureLinear], config: ShardsConfig) -> None:
        """One pool for each module type: the layers whose names end alike and whose shapes agree."""
        types: dict[str, list[MixtureLinear]] = {}
        for name, layer in layers.items():
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
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise TargetError(
                "xlora reads the model's own last hidden states first: encoder-decoders are not supported"
            )
        if len(set(self.num_experts.values())) > 1:
            raise ConfigError("a model-scope router needs the same number of experts in every layer")

    def _make_head(self, config: ScalingsConfig) -> ScalingsRouter:
        hidden_size = getattr(getattr(self.model, "config", None), "hidden_size", None)
        if hidden_size is None:
            raise TargetError("xlora needs a transformers model: its config names the hidden size the head reads")
        num_experts = next(iter(self.num_experts.values()))
        device = next(self.model.parameters()).device
        return config.build_head(hidden_size, num_experts, len(self.routed)).to(device)


def _master_dtype(base: nn.Module) -> torch.dtype:
    """float32 over 16-bit and quantised bases; a wider base's own."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return torch.float32
    return torch.promote_types(weight.dtype, torch.float32)


def _execution_device(base: nn.Module) -> torch.device:
    """Where the base computes: for offloaded modules, whose weights are elsewhere, accelerate's hook knows."""
    hook = getattr(base, "_hf_hook", None)
    for candidate in (hook, *getattr(hook, "hooks", ())):
        device = getattr(candidate, "execution_device", None)
        if device is not None:
            return torch.device(device)
    weight = getattr(base, "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) else torch.device("cpu")


def _add_hooks(mixture: Mixture) -> None:
    model, state = mixture.model, mixture.state
    for stack, module in _stacks(model).items():
        mixture.hooks.append(module.register_forward_pre_hook(state.enter(stack), with_kwargs=True))
        if isinstance(mixture.config.router, ScalingsConfig):
            decided = {name: layer for name, layer in mixture.layers.items() if layer.router is None}
            mixture.hooks += TwoPass(state, model.molex["router"], decided).attach(module)  # type: ignore[index, arg-type]
    mixture.hooks.append(model.register_forward_hook(_Unseen(state)))
    mixers = {name.rpartition(".")[0] for name in mixture.layers if name.split(".")[-2:-1] == ["mixer"]}
    for name in sorted(mixers):
        mixer = model.get_submodule(name)
        mixture.hooks.append(mixer.register_forward_pre_hook(_leave_fused_path))
        mixture.hooks.append(mixer.register_forward_hook(_restore_training, always_call=True))


def _stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose calls tell about tokens: an encoder and a decoder, or the stack of layers under the head."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"encoder": model.get_encoder(), "decoder": model.get_decoder()}  # type: ignore[operator]
    if hasattr(model, "get_decoder"):  # OPT's head calls it past the backbone
        return {"model": model.get_decoder()}  # type: ignore[operator]
    return {"model": model}


class _Unseen:
    """After the first forward, a converted layer that was never called is an error naming it."""

    def __init__(self, state: MixtureState):
        self.state = state

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if not self.state.unseen or set(self.state.stacks) == {"decoder"}:
            return
        names = ", ".join(sorted(self.state.unseen)[:5])
        raise TargetError(
            f"{len(self.state.unseen)} converted layers were never called in this forward, so training them would do "
            f"nothing: {names}. The model reads their weights directly; leave them out of targets"
        )


def _leave_fused_path(mixer: nn.Module, args: object) -> None:
    """A Mamba mixer in training hands its linears' weights to one fused kernel, past their experts; it does so only
    where its own flag says training (its linears keep theirs)."""
    mixer.training = False


def _restore_training(mixer: nn.Module, args: object, output: object) -> None:
    mixer.training = mixer.conv1d.training  # type: ignore[union-attr, assignment]
