"""Which layers have a routing to show."""

from molex.errors import ConfigError, StateError
from molex.layer import MixtureLinear
from molex.mixture import Mixture


def routed_layers(mixture: Mixture) -> dict[str, MixtureLinear]:
    """The layers that choose between experts. Raises ConfigError where none has more than one, StateError where the
    mixture is disabled."""
    if not mixture.state.enabled:
        raise StateError("the experts are off, so nothing is routed; leave `with mixture.disabled()` first")
    found = {n: layer for n, layer in mixture.layers.items() if not layer.plain and layer.experts.num_experts > 1}
    if not found:
        raise ConfigError(f"{mixture.config.method}: no layer has more than one expert, so there is no routing to show")
    return found
