"""Who served a token, read from a trace: the weight of each expert, also where one has several gates (MHR's heads)."""

from torch import Tensor

from molex.errors import ConfigError, StateError
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.routing import Decision


def routed_layers(mixture: Mixture) -> dict[str, MixtureLinear]:
    """The layers that choose between experts. Raises ConfigError where none has more than one, StateError where the
    mixture is disabled."""
    if not mixture.state.enabled:
        raise StateError("the experts are off, so nothing is routed; leave `with mixture.disabled()` first")
    found = {n: layer for n, layer in mixture.layers.items() if not layer.plain and layer.experts.num_experts > 1}
    if not found:
        raise ConfigError(f"{mixture.config.method}: no layer has more than one expert, so there is no routing to show")
    return found


def expert_gates(decision: Decision, num_experts: int) -> Tensor:
    """(T, E): each expert's weight for each token, the mean over its heads; zero where it was not chosen."""
    return decision.routing.gates().detach().unflatten(-1, (-1, num_experts)).mean(-2)
