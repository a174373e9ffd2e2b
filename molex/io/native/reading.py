"""What of a mixture a native architecture can hold: one renormalised choice of experts per feed-forward block.

Everything else is refused here, before a file is touched, with the reason and a way out. Layers may differ in their
number of experts only where copies of an expert change nothing: where each token takes one expert (a copy is as good),
or all of them (copies share the weight). A copy among the top k of several would take a second place.
"""

from torch import Tensor, nn
from transformers import PretrainedConfig

from molex.checks import listed
from molex.errors import ConfigError, StateError, TargetError
from molex.io.native.blocks import PROJECTIONS, Block, Experts
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.routers import Router
from molex.routers.soft import SoftRouter
from molex.routers.topk import TopKRouter

_INSTEAD = "serve this mixture as mixture.save writes it, or train one with molex.preset('mixlora') to export it"


def read_experts(mixture: Mixture) -> Experts:
    """The mixture's decoder layers as native ones. Raises ConfigError where routing or experts cannot be expressed,
    TargetError where the base is of no architecture with a native one, StateError where weights are elsewhere."""
    _check_scope(mixture)
    _check_weights(mixture.model)
    layers = _decoder_layers(mixture)
    routers = {name: _router_of(module, name) for name, module in layers.items()}
    shared = {name: router for name, router in routers.items() if router is not None and router.num_experts > 1}
    if not shared:
        raise ConfigError("no layer has more than one expert, so there is nothing to choose: merge it into the base")
    counts = {name: router.num_experts for name, router in shared.items()}
    chosen = {name: _top_k(router, name) for name, router in shared.items()}
    num_experts = max(counts.values())
    blocks = []
    for name, module in layers.items():
        places = range(num_experts)
        slots = tuple(place % counts[name] for place in places) if name in counts else (0,) * num_experts
        blocks.append(Block(name, module, _gate(shared[name]) if name in shared else None, slots))
    return Experts(tuple(blocks), num_experts, _common_top_k(counts, chosen))


def base_config(mixture: Mixture) -> PretrainedConfig:
    """The base's configuration. Raises TargetError where it is of no transformers model, or quantised."""
    config = getattr(mixture.model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise TargetError(f"{type(mixture.model).__name__} has no transformers configuration to make a native one from")
    if getattr(config, "quantization_config", None) is not None:
        raise TargetError(
            "the base is quantised, and experts cannot be added to codes: load the base in 16 or 32 bits, "
            "molex.load the mixture onto it, export that, and quantise the export"
        )
    return config


def _check_scope(mixture: Mixture) -> None:
    config = mixture.config
    if config.router.model_scope:
        raise ConfigError(
            f"{config.method} routes the whole model after a first pass; no native model does: {_INSTEAD}"
        )
    if config.scope != "ffn":
        raise ConfigError(
            f"scope={config.scope!r}: each linear chooses experts of its own, and native models choose once for a "
            f"whole feed-forward block: {_INSTEAD}"
        )
    routed = [name for name, layer in mixture.layers.items() if not layer.plain]
    outside = [name for name in routed if not name.endswith(tuple(f".mlp.{projection}" for projection in PROJECTIONS))]
    if outside:
        raise ConfigError(
            f"{listed(outside)}: native models have experts only in gate_proj, up_proj and down_proj of their blocks "
            f"(fused, attention and two-layer ones have no counterpart): {_INSTEAD}"
        )


def _check_weights(model: nn.Module) -> None:
    """Raises where a weight is not here, or is no 16-bit or wider float."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
            raise StateError(f"{name} is offloaded or sharded: molex.load the saved mixture whole, and export that")
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise TargetError(f"{name} is {parameter.dtype}: load the base in 16 or 32 bits, and export that")


def _decoder_layers(mixture: Mixture) -> dict[str, nn.Module]:
    """Name -> decoder layer, those without experts too. Raises TargetError where they are not Llama-shaped."""
    layers = getattr(getattr(mixture.model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(mixture.model, "lm_head"):
        raise TargetError(f"{type(mixture.model).__name__} is no stack model.layers under an lm_head: {_INSTEAD}")
    named = {f"model.layers.{number}": layer for number, layer in enumerate(layers)}
    for name, layer in named.items():
        mlp = getattr(layer, "mlp", None)
        missing = [projection for projection in PROJECTIONS if not hasattr(mlp, projection)]
        if missing:
            raise TargetError(
                f"{name}.mlp has no {listed(missing)}; native experts have all of {', '.join(PROJECTIONS)}"
            )
        if any(getattr(mlp, projection).bias is not None for projection in PROJECTIONS):
            raise TargetError(f"{name}.mlp has biases (mlp_bias), and no native expert has any: {_INSTEAD}")
    return named


def _router_of(layer: nn.Module, name: str) -> Router | None:
    """The router of a feed-forward block, which one of its ways in holds; None where it is not converted."""
    inside = [layer.get_submodule(f"mlp.{projection}") for projection in PROJECTIONS]
    routers = [part.router for part in inside if isinstance(part, MixtureLinear) and not part.plain and part.router]
    assert len(routers) <= 1, f"{name} has {len(routers)} routers"
    return routers[0] if routers else None


def _top_k(router: Router, name: str) -> int:
    """How many experts a token takes. Raises ConfigError where weights are no softmax over those alone."""
    if type(router) is SoftRouter:
        return router.num_experts
    if type(router) is not TopKRouter:
        raise ConfigError(
            f"{name}: a {type(router).__name__} is not a softmax over its k largest logits, which is all that native "
            f"models compute: {_INSTEAD}"
        )
    if not router.config.renormalise and router.config.top_k < router.num_experts:
        raise ConfigError(
            f"{name}: renormalise=False leaves the base the rest of each token's weight, and native models have no "
            "such share; train with renormalise=True"
        )
    return router.config.top_k


def _gate(router: Router) -> Tensor:
    """(E, D), the temperature folded in."""
    assert isinstance(router, SoftRouter | TopKRouter)
    weight = router.gate.weight.detach()
    return weight / router.config.temperature if isinstance(router, TopKRouter) else weight


def _common_top_k(counts: dict[str, int], chosen: dict[str, int]) -> int:
    """How many experts a token takes in every layer of the exported model, the smaller ones filled with copies.
    Raises ConfigError where that would not be exact."""
    most = max(counts.values())
    if len(set(counts.values())) == 1 or set(chosen.values()) == {1}:
        return next(iter(chosen.values()))
    if chosen == counts and all(most % count == 0 for count in counts.values()):
        return most
    raise ConfigError(
        f"layers have {min(counts.values())} to {most} experts, and native models have one number for all: copies that "
        "fill a smaller layer up would take places among the top k. Exact are equal counts, top_k=1, and a soft router "
        "whose counts divide the largest; convert with allocation=None"
    )
