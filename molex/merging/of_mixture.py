"""A mixture's experts merged into one LoRA for each layer: exactly where routing is constant, else by a rule.

    constant routing   y = base(x) + Σ_e w_e s_e B_e A_e x   is   (W + Σ_e w_e s_e B_e A_e) x

Where the router looks at the token there is no such W: a rule makes one, and `molex.merging.compare` says at what loss.
Plain LoRAs beside the experts (MixLoRA's attention) fold exactly in every case. also_train modules stay as trained.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from molex import library
from molex.architectures import block_of
from molex.errors import ConfigError
from molex.experts.averaged import AveragedBank
from molex.ffn import NarrowLinear, WidenLinear
from molex.library import Factors
from molex.merging.base import MergeRule, make_rule, rules
from molex.merging.cat import CatRule
from molex.merging.folding import check_writable, fold, refuse_twins
from molex.merging.merged import Merged, merge_factors
from molex.merging.weights import Weights
from molex.mixture import Mixture
from molex.routers.constant import ConstantRouter
from molex.routers.static import StaticRouter


def merge_mixture(
    mixture: Mixture,
    rule: str | MergeRule | None = None,
    weights: Weights | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> nn.Module:
    """Folds a mixture into its base, in place, takes the mixture off, and returns the plain model.

    rule: None for the exact equivalent, which constant routing has; otherwise as in `molex.merge`, over the experts.
    weights: of the experts, by their names or in their order. Raises ConfigError where there is no exact equivalent,
    or experts are more than LoRAs, TargetError where the base's weights cannot take it; nothing has then changed.
    """
    merged = merge_experts(mixture, rule, weights, parameters=parameters, rank=rank, energy=energy)
    return fold_into(mixture, merged)


def fold_into(mixture: Mixture, merged: Merged) -> nn.Module:
    """Takes a mixture off and adds the merged updates to its base. Raises TargetError, with nothing changed, where the
    base's weights cannot take them."""
    for name in merged.factors:
        check_writable(name, mixture.layers[name].base)
    refuse_twins(mixture.model, [f"{name}.base.weight" for name in merged.factors])
    model = mixture.revert()
    fold(model, merged.factors)
    return model


def merge_experts(
    mixture: Mixture,
    rule: str | MergeRule | None = None,
    weights: Weights | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    on_layer: Callable[[str], None] = lambda layer: None,
) -> Merged:
    """One LoRA for each layer of a mixture, which stays as it is. Arguments and errors as `merge_mixture`.

    on_layer: told of each layer merged.
    """
    experts = experts_of(mixture)
    if rule is None:
        reason = why_not_exact(mixture)
        if reason:
            raise ConfigError(f"{reason}, so it has no exact dense equivalent; merge by a rule: {', '.join(rules)}")
        if weights is not None or parameters:
            raise ConfigError("an exact merge has the router's own weights; with weights or parameters give a rule too")
        rule, weights = CatRule(), _routers_weights(mixture, experts)
    ready = make_rule(rule, parameters)
    if weights is None:
        weights = _default_weights(mixture, experts, ready)
    names = [name for name, _ in mixture.model.named_modules()]
    merged = merge_factors(experts, ready, weights, names=names, rank=rank, energy=energy, on_layer=on_layer)
    plain = merge_factors({"plain": plain_of(mixture)}, CatRule())
    return Merged(factors={**merged.factors, **plain.factors}, layers=merged.layers + plain.layers)


def offered(mixture: Mixture) -> dict[str, str]:
    """What `merge_mixture` can do here: "exact" to what that is or why it is not, then each rule."""
    reason = why_not_exact(mixture)
    exact = f"no: {reason}" if reason else "yes: the dense model computes what the mixture does"
    try:
        experts_of(mixture)
    except ConfigError as error:
        return {"exact": exact, **dict.fromkeys(rules, f"no: {error}")}
    return {"exact": exact, **dict.fromkeys(rules, "yes: an approximation, compare its loss")}


def why_not_exact(mixture: Mixture) -> str | None:
    """Why no dense model computes what a mixture does; None where one does."""
    for name, layer in mixture.layers.items():
        weights = constant_weights(mixture, name)
        if weights is None:
            return f"{name} routes each token by what it is"
        if isinstance(layer.experts, AveragedBank):
            return f"{name} averages A and B apart"
        if isinstance(layer, WidenLinear | NarrowLinear) and weights != [1.0]:
            return f"{name} mixes its experts behind a nonlinearity"
    return None


def constant_weights(mixture: Mixture, layer: str) -> list[float] | None:
    """The weights that a layer's router gives to every token alike; None where they depend on the token."""
    router = mixture.layers[decider(mixture, layer)].router
    if isinstance(router, ConstantRouter):
        return [1.0] * mixture.layers[layer].experts.num_experts
    if isinstance(router, StaticRouter):
        return router.weights.tolist()
    return None


def decider(mixture: Mixture, layer: str) -> str:
    """The layer under whose name a layer's decisions are recorded: in a feed-forward block, the one with the router."""
    if mixture.layers[layer].router is not None or mixture.head is not None:
        return layer
    block = block_of(layer)
    return next(n for n, own in mixture.layers.items() if block_of(n) == block and isinstance(own, WidenLinear))


def experts_of(mixture: Mixture) -> dict[str, Factors]:
    """The experts by name, over the routed layers that have them. Raises ConfigError where they are no LoRAs."""
    routed = {name: layer for name, layer in mixture.layers.items() if not layer.plain}
    experts = {}
    for expert_id, expert in enumerate(mixture.experts):
        holders = {name: layer for name, layer in routed.items() if expert_id < layer.experts.num_experts}
        experts[expert] = library.factors_of(holders, expert_id)
    return experts


def plain_of(mixture: Mixture) -> Factors:
    """The plain LoRAs beside the experts."""
    return library.factors_of({name: layer for name, layer in mixture.layers.items() if layer.plain}, 0)


def _routers_weights(mixture: Mixture, experts: Mapping[str, Factors]) -> dict[str, dict[str, float]]:
    known = {name: constant_weights(mixture, name) for name, layer in mixture.layers.items() if not layer.plain}
    return _by_layer(experts, {name: weights for name, weights in known.items() if weights is not None})


def _default_weights(mixture: Mixture, experts: Mapping[str, Factors], rule: MergeRule) -> dict[str, dict[str, float]]:
    """The rule's own for as many experts as each layer has, which may differ."""
    routed = {name: layer.experts.num_experts for name, layer in mixture.layers.items() if not layer.plain}
    return _by_layer(experts, {name: rule.default_weights(count) for name, count in routed.items()})


def _by_layer(experts: Mapping[str, Factors], weights: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Weights by layer, of its experts in order, as weights by expert; 0 in layers that lack it."""
    return {
        expert: {layer: own[i] if i < len(own) else 0.0 for layer, own in weights.items()}
        for i, expert in enumerate(experts)
    }
