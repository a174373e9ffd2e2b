"""Weights that a mixture's own routing gives: each expert's mean gate over the tokens of some batches, layer by layer.

w_e = mean over tokens of G(x)[e]

mixture.merge(rule="linear", weights=usage_weights(mixture, batches))
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from molex.errors import ConfigError
from molex.merging.of_mixture import decider
from molex.mixture import Mixture
from molex.modes import evaluating
from molex.stats import expert_gates


def usage_weights(mixture: Mixture, batches: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Runs the mixture over batches, in evaluation mode, and returns weights by expert and layer, as merges take them.

    Raises ConfigError where there are no batches.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, float] = {}
    with evaluating(mixture.model):
        for batch in batches:
            mixture.model(**batch)
            for name, decision in mixture.state.trace.items():
                mask_T = decision.mask().double()
                gates_TE = expert_gates(decision, mixture.layers[name].experts.num_experts).double()
                sums[name] = sums.get(name, 0) + mask_T @ gates_TE
                tokens[name] = tokens.get(name, 0.0) + float(mask_T.sum())
    if not sums:
        raise ConfigError("usage is measured on batches, and there are none")
    routed = [name for name, layer in mixture.layers.items() if not layer.plain]
    shares = {}
    for name in routed:
        source = decider(mixture, name)
        shares[name] = (sums[source] / tokens[source]).tolist()
    return {
        expert: {name: own[i] if i < len(own) else 0.0 for name, own in shares.items()}
        for i, expert in enumerate(mixture.experts)
    }
