"""Model scope: a first pass with the experts off, a head on its hidden states, then the model itself (X-LoRA).

    h = base(tokens) after the final norm;   w = head(h);   y = model(tokens) with w[:, l] in layer l

The first pass has a KV cache of its own, which travels inside the caller's: between two forwards its layers follow the
caller's own in `cache.layers`, so whatever reorders, crops, repeats, selects, copies or resets the cache (beams,
assisted decoding, a saved prefix) acts on both. During a forward the caller's cache holds its own layers alone, as the
model expects. A decoding step therefore costs two tokens of work, however long the prefix is.

The first pass runs without gradients and in the model's own mode: a base with dropout drops there too, as in PEFT.
"""

from collections.abc import Mapping
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, EncoderDecoderCache

from molex.errors import ConfigError, StateError, TargetError
from molex.layer import MixtureLinear
from molex.routers.scalings import ScalingsConfig, ScalingsRouter
from molex.state import MixtureState
from molex.tokens import Stack, bound_arguments

_FIRST = "molex_first_pass"  # the caller's cache keeps the first pass's under this name
_UNREAD = ("output_hidden_states", "output_attentions", "output_router_logits")


def check_model_scope(scope: str, stacks: tuple[Stack, ...], counts: set[int]) -> None:
    """Raises TargetError on an encoder-decoder, ConfigError on feed-forward scope and on layers of unlike counts."""
    if scope == "ffn":
        raise ConfigError("a model-scope router decides for linears; use scope='linear'")
    if len(stacks) > 1:
        raise TargetError("xlora reads the model's own last hidden states first: encoder-decoders are not supported")
    if len(counts) > 1:
        raise ConfigError("a model-scope router needs the same number of experts in every layer")


def build_head(model: nn.Module, config: ScalingsConfig, num_linears: int, num_experts: int) -> ScalingsRouter:
    """The head over the model's last hidden states. Raises TargetError as `head_width` does."""
    return config.build_head(head_width(model), num_experts, num_linears)


def head_width(model: nn.Module) -> int:
    """How wide the hidden states are that a head reads. Raises TargetError on a foreign model."""
    model_config = getattr(model, "config", None)
    if not isinstance(model_config, PreTrainedConfig):
        raise TargetError("xlora needs a transformers model: its config names the hidden size the head reads")
    text_config = model_config.get_text_config()
    # OPT projects its last hidden states to the embeddings' width, which in OPT-350m is not the layers'
    return getattr(text_config, "word_embed_proj_dim", text_config.hidden_size)


def assign(state: MixtureState, router: ScalingsRouter, layers: Mapping[str, MixtureLinear], hidden: Tensor) -> None:
    """Leaves every layer's routing in the state. hidden (..., D): the base's last hidden states."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1]).to(next(router.parameters()).device)
    routings = zip(layers.items(), router.decide(hidden_TD), strict=True)
    state.assigned = {name: routing.to(layer.experts.scale.device) for (name, layer), routing in routings}


class TwoPass:
    """Hooks on the model's stack of layers: `before` runs the first pass and the head, `after` stows its cache."""

    def __init__(self, state: MixtureState, router: ScalingsRouter, layers: Mapping[str, MixtureLinear]):
        self.state, self.router, self.layers = state, router, dict(layers)
        self._caller: Cache | None = None
        self._first: Cache | None = None

    def attach(self, stack: nn.Module) -> list[RemovableHandle]:
        """Registers both hooks."""
        return [
            stack.register_forward_pre_hook(self.before, with_kwargs=True),
            stack.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decides every layer's routing. Raises StateError on a cache that the first pass cannot share."""
        if not self.state.enabled:
            return
        given = bound_arguments(stack, args, kwargs)
        arguments = {name: value for name, value in given.items() if name not in _UNREAD}
        slot = _cache_slot(arguments)
        if slot is not None:
            self._caller = arguments[slot]
            self._first = arguments[slot] = _take_first(arguments[slot])
        assign(self.state, self.router, self.layers, self._first_pass(stack, arguments))

    def after(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Puts the first pass's layers into the cache the caller gets back; also where the forward failed."""
        caller, first, self._caller, self._first = self._caller, self._first, None, None
        caller = _cache_among(output) if caller is None else caller
        if caller is not None and first is not None:
            caller.layers.extend(first.layers)
            setattr(caller, _FIRST, first)

    def _first_pass(self, stack: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """Last hidden states (B, S, D) of the base. `forward` itself: the stack's hooks belong to the second pass."""
        with self.state.replaced(enabled=False), torch.no_grad():
            output = stack.forward(**arguments)
        if self._caller is None:
            self._first = _cache_among(output)
        return output[0]


def _cache_slot(arguments: dict[str, Any]) -> str | None:
    """The name under which the caller passes a cache, if it does."""
    if arguments.get("cache") is not None:
        raise StateError("xlora's first pass has no room in a paged cache: use generate() instead of generate_batch()")
    names = [name for name, value in arguments.items() if isinstance(value, Cache)]
    if names and isinstance(arguments[names[0]], EncoderDecoderCache):
        raise StateError("xlora takes the cache of a decoder, got an EncoderDecoderCache")
    return names[0] if names else None


def _cache_among(output: Any) -> Cache | None:
    """The cache a forward returns, in a tuple or a ModelOutput."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def _take_first(cache: Cache) -> Cache:
    """Takes the first pass's cache out of the caller's; an empty one gets a twin.

    Raises StateError where the two have not seen the same tokens.
    """
    first: Cache | None = getattr(cache, _FIRST, None)
    if _num_seen(cache) != (0 if first is None else _num_seen(first)):
        raise StateError(
            f"this cache holds {_num_seen(cache)} tokens that xlora's first pass has not all seen (they were computed "
            "by the base, by a disabled mixture, or in another call); start from an empty cache"
        )
    if first is None:
        first = copy(cache)
        first.layers = deepcopy(cache.layers)
        return first
    del cache.layers[len(cache.layers) - len(first.layers) :]
    return first


def _num_seen(cache: Cache) -> int:
    """How many tokens a cache holds; of a recurrent state, which cannot tell, whether it holds any."""
    if cache.layers and all(cache.is_linear):
        return int(cache.has_previous_state())
    return int(cache.get_seq_length())
