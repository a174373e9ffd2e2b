"""Pretrained adapters become the experts of one mixture, and join one that runs already.

    y = base(x) + Σ_e w_e(x) s_e B_e A_e x        A_e, B_e, s_e as they were trained, w by the router

Adapters may differ in rank, alpha and targets: experts keep their own ranks, and one that does not change a layer is a
zero expert there. Everything is read and compared before the model is touched.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

from torch import nn

from molex import library
from molex.checks import listed
from molex.config import MixtureConfig
from molex.errors import CheckpointError, ConfigError, TargetError
from molex.experts import LoRA
from molex.io.adapter import Adapter
from molex.io.fitting import adapted_layers, agreed_whole, replace_whole
from molex.io.peft import read_adapter
from molex.io.record import frozen_experts
from molex.mixture import Mixture
from molex.presets import preset, presets
from molex.surgery import convert
from molex.targets import find_linears, find_modules

NOBODY = "nobody"
Source = str | Path | Adapter


def from_peft(
    model: nn.Module,
    adapters: Mapping[str, Source],
    router: str | MixtureConfig = "meteora",
    *,
    nobody: bool = False,
    allow_bin: bool = False,
) -> Mixture:
    """Converts a model into a mixture whose experts are these adapters, under these names; returns the handle.

    adapters: folders or hub ids that PEFT wrote, or `Adapter`s. router: a preset, a router's name (its top_k is lowered
    to the number of experts), or a configuration; its experts and targets become the adapters'. nobody: one more
    expert that adds nothing, so that a router can choose the base. allow_bin: see `read_adapter`.

    Raises CheckpointError on damaged adapters and on what experts cannot be, TargetError where they do not fit the
    model, ConfigError where they do not fit the router; then the model is as it was.
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise ConfigError(f"adapters={adapters!r:.80}; give a mapping of experts' names to folders that PEFT wrote")
    for name in adapters:
        library.check_name(name)
    read = [as_adapter(source, name, allow_bin) for name, source in adapters.items()]
    layers = adapted_layers(model, read)
    whole = agreed_whole(model, read)
    experts = [*read, Adapter(name=NOBODY, factors={})] if nobody else read
    config = dataclasses.replace(
        _router_config(router, len(experts)),
        targets=_short_targets(model, layers),
        plain_targets=(),
        also_keep=tuple(sorted({name.rpartition(".")[0] for name in whole})),
        num_experts=len(experts),
        allocation=None,
        rank=tuple(map(_usual_rank, experts)),
        alpha=tuple(map(_usual_alpha, experts)),
        scaling="alpha/rank",
    )
    ranks = {layer: tuple(_rank(adapter.factors.get(layer)) for adapter in experts) for layer in layers}
    mixture = convert(model, config, ranks=ranks)
    for layer in mixture.layers.values():  # their first names are numbers, which adapters may be called too
        layer.experts.names = [adapter.name for adapter in experts]
    try:
        for expert_id, adapter in enumerate(experts):
            mixture.load_expert(expert_id, adapter.name, adapter.factors)
    except BaseException:  # an interrupt too must leave the model as it was
        mixture.revert()
        raise
    replace_whole(model, whole)
    mixture.origins = {adapter.name: origin_of(adapter) for adapter in read if adapter.config}
    return mixture


def add_expert(mixture: Mixture, source: Source, name: str) -> None:
    """See `Mixture.add_expert`."""
    library.check_name(name)
    adapter = as_adapter(source, name)
    adapted_layers(mixture.model, [adapter])
    kept = find_modules(mixture.model, mixture.config.also_keep)
    lacking = [module for module in kept if not any(key.startswith(f"{module}.") for key in adapter.whole)]
    if lacking:
        raise CheckpointError(f"{name} was trained without the {listed(lacking)} that the experts here came with")
    if agreed_whole(mixture.model, [adapter]):
        raise CheckpointError(f"{name} replaces {listed([*adapter.whole])}: what is trained whole cannot be routed")
    library.append_expert(mixture.layers, mixture.head, name, adapter.factors)
    if not any(map(frozen_experts, mixture.layers.values())):  # else it describes the experts before `mixture.grow`
        mixture.config = _described(mixture, _usual_rank(adapter), _usual_alpha(adapter))
    if adapter.config:
        mixture.origins[name] = origin_of(adapter)


def _described(mixture: Mixture, rank: int, alpha: float) -> MixtureConfig:
    """The configuration with the expert that was just added: lists of ranks and alphas get one entry more; single
    numbers stay, and layers record what differs."""
    config = mixture.config
    ranks = (*config.rank, rank) if isinstance(config.rank, tuple) else config.rank
    alphas = (*config.alpha, alpha) if isinstance(config.alpha, tuple) else config.alpha
    return dataclasses.replace(config, rank=ranks, alpha=alphas, num_experts=len(mixture.experts), allocation=None)


def as_adapter(source: Source, name: str, allow_bin: bool = False) -> Adapter:
    """An adapter under a name of the caller's, read where it is a folder or a hub id."""
    if isinstance(source, Adapter):
        return dataclasses.replace(source, name=name)
    return read_adapter(source, name, allow_bin=allow_bin)


def origin_of(adapter: Adapter) -> dict[str, Any]:
    """What an expert's own folder said besides its factors: its configuration, and the dtype it was stored in."""
    dtype = next(iter(adapter.factors.values())).A.dtype
    return {"config": dict(adapter.config), "dtype": str(dtype).removeprefix("torch.")}


def _router_config(router: str | MixtureConfig, num_experts: int) -> MixtureConfig:
    """A configuration that says how to route; what it says about experts does not matter."""
    if isinstance(router, MixtureConfig):
        return router
    if not isinstance(router, str):
        raise ConfigError(f"router={router!r}; give a preset's or a router's name, or a MixtureConfig")
    config = preset(router) if router in presets else MixtureConfig(train_experts=False).override({"router": router})
    top_k = getattr(config.router, "top_k", None)
    return config if top_k is None or top_k <= num_experts else config.override({"top_k": num_experts})


def _short_targets(model: nn.Module, layers: list[str]) -> tuple[str, ...]:
    """The layers' last names where these mean just them, else the layers' full names."""
    ends = tuple(dict.fromkeys(layer.split(".")[-1] for layer in layers))
    try:
        meant = [*find_linears(model, ends)]
    except TargetError:  # a head may end alike
        meant = []
    return ends if meant == layers else tuple(layers)


def _rank(lora: LoRA | None) -> int:
    """A layer that an adapter does not change takes the smallest room."""
    return 1 if lora is None else lora.A.shape[0]


def _usual_rank(adapter: Adapter) -> int:
    """What most of an adapter's layers have."""
    return mode(map(_rank, adapter.factors.values())) if adapter.factors else 1


def _usual_alpha(adapter: Adapter) -> float:
    return mode(abs(lora.scale) * _rank(lora) or 1.0 for lora in adapter.factors.values()) if adapter.factors else 1.0
