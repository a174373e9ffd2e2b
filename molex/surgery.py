"""convert: swap a model's linears for mixture layers, in place, reversibly.

Everything is checked and built before the model is touched, so a refused conversion leaves it as it was. The base
objects themselves stay, wrapped; the base is frozen; hooks tell the mixture's state about each forward.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from molex.building import Builder
from molex.config import MixtureConfig
from molex.errors import ConfigError, StateError, TargetError
from molex.gated import join_blocks
from molex.hooks import leave_fused_paths, refuse_base_names, tell_of_empty_slots, watch_calls
from molex.io.pretrained import SavePretrained
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.model_scope import TwoPass


def convert(
    model: nn.Module,
    config: MixtureConfig,
    *,
    ranks: Mapping[str, tuple[int, ...]] | None = None,
    device: torch.device | str | None = None,
) -> Mixture:
    """Turns a dense model into a mixture of LoRA experts, in place, and returns the handle.

    ranks: each expert's rank, by layer name, in layers where it is not what the configuration says. device: of experts
    and routers, by default each linear's own; a model without memory (on "meta") can so have experts that exist. The
    base's parameters are frozen. Raises StateError on a second conversion, TargetError where a pattern or an
    architecture does not fit, ConfigError on settings that contradict each other.
    """
    _check(model, config)
    builder = Builder(model, config, ranks or {}, None if device is None else torch.device(device))
    layers = builder.build()
    targets = builder.targets
    mixture = Mixture(model, config, layers, [*targets.also_trained, *targets.also_kept], builder.state)
    mixture.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for name in targets.also_trained:
        model.get_submodule(name).requires_grad_(True)
    if builder.shared:
        model.add_module("molex", builder.shared.train(model.training))
    mixture.hooks += watch_calls(model, builder.stacks, builder.state) + leave_fused_paths(model, layers)
    mixture.hooks.append(refuse_base_names(model, layers))
    mixture.hooks += join_blocks(model, layers.values())
    if not config.train_experts:
        mixture.hooks.append(tell_of_empty_slots(builder.stacks[-1], layers))
    if config.router.model_scope:
        decided = {name: layer for name, layer in layers.items() if layer.router is None}
        two_pass = TwoPass(builder.state, builder.shared["router"], decided)  # type: ignore[arg-type]
        mixture.hooks += two_pass.attach(builder.stacks[0].module)
    model.molex_mixture = mixture  # type: ignore[assignment]
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = SavePretrained(model)
    return mixture


def _check(model: nn.Module, config: MixtureConfig) -> None:
    if not isinstance(model, nn.Module):
        raise TargetError(f"{model!r} is no model; give one, such as AutoModelForCausalLM.from_pretrained(...)")
    if not isinstance(config, MixtureConfig):
        raise ConfigError(f"{config!r} is no MixtureConfig; give molex.preset(name, ...), see `molex methods`")
    if any(isinstance(module, MixtureLinear) for module in model.modules()):
        raise StateError("this model is a mixture already; mixture.revert() gives the base back")
    taken = [name for name in ("molex", "molex_mixture") if hasattr(model, name)]
    if taken:
        raise TargetError(f"this model has a {taken[0]!r} of its own, the name under which molex keeps its part")
