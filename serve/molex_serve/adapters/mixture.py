"""Saved molex mixtures as they are served: loaded onto a model of their own that shares the served base's weights."""

from pathlib import Path

from transformers import PreTrainedModel

import molex
from molex.checks import listed
from molex.io.checkpoint import read_record
from molex.mixture import Mixture
from molex_serve.adapters.base import Routed
from molex_serve.adapters.content import generation_of, unchanged
from molex_serve.errors import BadAdapter
from molex_serve.model.twin import twin_of


def read_mixture(folder: Path, model: PreTrainedModel) -> Routed:
    """Raises BadAdapter where it changes more than linears; otherwise as `molex.load` does."""
    with unchanged(folder):
        config = read_record(folder).config
        whole = sorted({*config.also_train, *config.also_keep})
        if whole:  # asked before loading, which would write them into the weights that all share
            raise BadAdapter(f"{folder} replaces {listed(whole)} whole, which requests of other adapters share")
        mixture, generation = molex.load(twin_of(model), folder), generation_of(folder)
    mixture.model.eval()
    return Routed(
        kind="mixture",
        generation=generation,
        num_bytes=_num_bytes(mixture),
        source=str(folder),
        mixture=mixture,
    )


def _num_bytes(mixture: Mixture) -> int:
    named = (*mixture.model.named_parameters(), *mixture.model.named_buffers())
    return sum(tensor.nbytes for name, tensor in named if mixture.owns(name))
