"""Model scope: a first pass with the experts off, a head on its hidden states, then the model itself (X-LoRA).

The first pass has a KV cache of its own, kept inside the caller's: its layers are appended to the cache's list of
layers, so whatever reorders, crops or selects the cache (beams, assisted decoding) acts on both. A decoding step
therefore costs two tokens of work, however long the prefix is.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from molex.routers.scalings import ScalingsRouter
from molex.state import MixtureState
from molex.tokens import bound_arguments


class TwoPass:
    """A forward pre-hook on the model's stack of layers."""

    def __init__(self, state: MixtureState, router: ScalingsRouter, layer_names: list[str]):
        self.state, self.layer_names = state, layer_names
        self._router = (router,)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.state.enabled:
            return
        arguments = bound_arguments(module, args, kwargs)
        arguments["past_key_values"] = self._first_cache(arguments.get("past_key_values"), module)
        arguments["use_cache"] = arguments["past_key_values"] is not None
        self.state.enabled = False
        try:
            with torch.no_grad():
                hidden = module(**arguments).last_hidden_state
        finally:
            self.state.enabled = True
        routings = self._router[0].decide(hidden.reshape(-1, hidden.shape[-1]))
        self.state.assigned = dict(zip(self.layer_names, routings, strict=True))

    def _first_cache(self, cache: Cache | None, module: nn.Module) -> Cache | None:
        return None
