"""ESFT folders as they are served: experts that stand in the place of the base's for an adapter's tokens."""

from pathlib import Path

from torch import nn

from molex.esft.files import bound, read_folder
from molex.esft.layers import find_layers
from molex_serve.adapters.base import ExpertSwap
from molex_serve.adapters.content import generation_of, unchanged


def read_esft(folder: Path, model: nn.Module) -> ExpertSwap:
    """Raises molex's CheckpointError and TargetError on what cannot be served over this base: a folder that is damaged,
    one that changes more than routed experts, and one for other experts than the base has."""
    layers = find_layers(model)
    with unchanged(folder):
        read, generation = read_folder(folder), generation_of(folder)
    swaps = bound(read, layers)
    return ExpertSwap(
        kind="esft",
        generation=generation,
        num_bytes=sum(weights.nbytes for own in swaps.values() for weights in own.values()),
        source=str(folder),
        experts={layers[number].name: own for number, own in swaps.items()},
    )
