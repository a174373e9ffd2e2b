"""A mixture's experts as a library: whole experts, over all layers, put in, taken out, added and found by name.

An expert over several layers is one LoRA for each, by layer name. What does not fit is refused before any layer has
changed.
"""

import dataclasses
import logging
from collections.abc import Mapping

from molex.architectures import block_of
from molex.config import MixtureConfig
from molex.distributed import num_elements
from molex.errors import ConfigError, TargetError
from molex.experts import LoRA
from molex.experts.lora import LoRABank
from molex.layer import MixtureLinear
from molex.routers import Router
from molex.stats import LayerStats

logger = logging.getLogger("molex")

Layers = Mapping[str, MixtureLinear]
Factors = Mapping[str, LoRA]  # by layer name


def expert_names(layers: Layers) -> list[str]:
    """The experts' names, of the layer that has most."""
    return max((layer.experts.names for layer in layers.values()), key=len)


def find_expert(layers: Layers, name: str | None) -> int:
    """An expert's number by its name; -1 for None, the base alone. Raises ConfigError where a layer lacks it."""
    if name is None:
        return -1
    names = expert_names(layers)
    if name not in names:
        raise ConfigError(f"no expert {name!r}; this mixture has: {', '.join(names)}")
    expert_id = names.index(name)
    for layer_name, layer in layers.items():
        if expert_id >= layer.experts.num_experts and not layer.plain:
            raise ConfigError(f"{layer_name} has no expert {name!r}, only {layer.experts.num_experts}")
    return expert_id


def check_name(name: object) -> None:
    """Raises ConfigError unless it can be an expert's name: a text that is not empty."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an expert's name is a text that is not empty, got {name!r}")


def load_expert(layers: Layers, expert_id: int, name: str, factors: Factors) -> None:
    """See `Mixture.load_expert`."""
    names = expert_names(layers)
    check_name(name)
    if not isinstance(factors, Mapping):
        raise ConfigError(f"an expert is a name and a LoRA for each layer name, got {factors!r:.60}")
    if name in names and names.index(name) != expert_id:
        raise ConfigError(f"expert {names.index(name)} is called {name!r} already; choose another name")
    unknown = sorted(set(factors) - set(layers))
    if unknown:
        raise TargetError(f"expert {name!r} has layers that are not converted: {', '.join(unknown[:5])}")
    filled = {n: layer for n, layer in layers.items() if n in factors or not layer.plain}
    missing = len(filled) - len(factors)
    if missing and factors:
        logger.warning("expert %r has no %d of %d layers; they add nothing", name, missing, len(filled))
    loras = {n: factors.get(n) or layer.zero_expert(expert_id) for n, layer in filled.items()}
    for layer_name, lora in loras.items():
        try:
            layers[layer_name].experts.check_expert(expert_id, lora)
        except ConfigError as error:
            raise ConfigError(f"{layer_name}: {error}") from error
    for layer_name, lora in loras.items():
        layers[layer_name].load_expert(expert_id, name, lora)


def append_expert(layers: Layers, head: Router | None, name: str, factors: Factors) -> None:
    """See `Mixture.append_expert`; head: what routes for all layers, if one router does."""
    names = expert_names(layers)
    if name in names:
        raise ConfigError(f"there is an expert {name!r} already; choose another name")
    routed = {layer_name: layer for layer_name, layer in layers.items() if not layer.plain}
    unknown = sorted(set(factors) - set(routed))
    if unknown or not factors:
        raise TargetError(f"expert {name!r} has layers that are not routed here: {', '.join(unknown[:5]) or 'none'}")
    for layer_name, layer in routed.items():
        if type(layer.experts) is not LoRABank:
            raise ConfigError(f"{layer_name}: only plain LoRA experts can be joined by one more")
        if layer.experts.num_experts != len(names):
            raise ConfigError("layers have unlike numbers of experts, so that one more would have no common number")
        if layer_name in factors:
            rank = factors[layer_name].A.shape[0]
            layer.experts.check_lora(factors[layer_name], rank, name)
            if layer.experts.activation_routed and rank != 1:
                raise ConfigError(
                    f"{layer_name}: this router decides on A x, of single ranks; {name!r} has rank {rank}"
                )
    routers = [layer.router for layer in routed.values() if layer.router is not None]
    for router in routers if head is None else [head]:
        router.add_expert()
    for layer in routed.values():
        assert isinstance(layer.experts, LoRABank)
        lora = factors.get(layer.name)
        layer.experts.append(1 if lora is None else lora.A.shape[0])
        expert_id = layer.experts.num_experts - 1
        layer.load_expert(expert_id, name, layer.zero_expert(expert_id) if lora is None else lora)


def factors_of(layers: Layers, expert_id: int) -> Factors:
    """See `Mixture.factors`."""
    found = {}
    for name, layer in layers.items():
        try:
            A_RD, B_OR, scale = layer.experts.expert(expert_id)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        found[name] = LoRA(A_RD.detach().clone(), B_OR.detach().clone(), scale)
    return found


def active_parameters(layers: Layers, stats: Mapping[str, LayerStats]) -> float:
    """Parameters of the layers' experts and routers that one token used, on average, by a forward's statistics."""
    shares = {
        name: min(1.0, float(layer.counts.sum()) / max(layer.tokens or 0, 1) / layers[name].experts.num_experts)
        for name, layer in stats.items()
    }
    of_block = {block_of(name): share for name, share in shares.items()}  # a feed-forward block routes once
    total = 0.0
    for name, layer in layers.items():
        share = 1.0 if layer.experts.num_experts == 1 else shares.get(name, of_block.get(block_of(name), 1.0))
        total += share * layer.experts.num_parameters()
        total += 0 if layer.router is None else sum(num_elements(p) for p in layer.router.parameters())
    return total


def _common_shape(config: MixtureConfig) -> MixtureConfig:
    """The configuration with one rank and one alpha. Raises ConfigError where experts have their own."""
    for setting in ("rank", "alpha"):
        own = getattr(config, setting)
        if isinstance(own, tuple) and len(set(own)) > 1:
            raise ConfigError(f"experts here have {setting} {own}, new ones would have none: add_expert brings its own")
    rank, alpha = (own[0] if isinstance(own, tuple) else own for own in (config.rank, config.alpha))
    return dataclasses.replace(config, rank=rank, alpha=alpha)


def grow(layers: Layers, config: MixtureConfig, num_experts: int) -> None:
    """See `Mixture.grow`."""
    if not isinstance(num_experts, int) or num_experts < 1:
        raise ConfigError(f"num_experts={num_experts}: growing adds at least 1")
    shape = _common_shape(config)
    for name, layer in layers.items():
        bank = layer.experts
        if type(bank) is not LoRABank or layer.router is None or not layer.router.growable:
            raise ConfigError(f"{name}: these experts or their router cannot grow; convert with more experts")
        taken = {str(bank.num_experts + i) for i in range(num_experts)} & set(bank.names)
        if taken:
            raise ConfigError(
                f"{name}: an expert is called {taken.pop()!r}, as a new one would be; give it another name"
            )
    for layer in layers.values():
        assert isinstance(layer.experts, LoRABank)
        assert layer.router is not None
        layer.experts.grow(shape.ranks(1) * num_experts, shape.scales(1)[0])
        layer.router.num_experts += num_experts
