"""Whose tokens a layer sees, and what a model's forward call says about them: batch shape, which are real, where packed
sequences begin.

Stacks are the modules whose calls say which tokens a model's layers see: one in most models, the stack of layers under
the head ("model"); two in an encoder-decoder. Layers outside of them, such as a vision tower's, have tokens of
their own (""), of which only the shape is known.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molex.errors import ConfigError, StateError
from molex.routing import RouteContext

_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value")


@dataclass(frozen=True)
class Stack:
    """One stack: what it is called here, its name in the model, the module."""

    kind: str  # "model", "encoder" or "decoder"
    name: str
    module: nn.Module

    def holds(self, layer: str) -> bool:
        """Whether a module of this name lies in the stack."""
        return not self.name or layer.startswith(f"{self.name}.")


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model; a module that is no transformers model is its own."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    named = {module: name for name, module in model.named_modules()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder()  # type: ignore[operator]
        if model not in (encoder, decoder):
            return Stack("encoder", named[encoder], encoder), Stack("decoder", named[decoder], decoder)
    return (Stack("model", named[decoder], decoder),)


def stack_of(stacks: tuple[Stack, ...], layer: str) -> str:
    """Whose tokens a layer sees. Keys and values of cross-attention see the encoder's."""
    kind = next((stack.kind for stack in stacks if stack.holds(layer)), "")
    parts = layer.split(".")
    crosses = any(part in _CROSS_ATTENTION for part in parts) and parts[-1] in _KEYS_AND_VALUES
    return "encoder" if kind == "decoder" and crosses else kind


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name; names the forward does not declare stay as they are."""
    signature = inspect.signature(module.forward)
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def read_tokens(arguments: dict[str, Any]) -> RouteContext | None:
    """The context of a call, from its input ids or embeddings; None where it has neither."""
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    num_rows, length = tokens.shape[:2]
    mask = arguments.get("attention_mask")
    positions = arguments.get("position_ids")
    token_mask = _last_columns(mask, num_rows, length)
    packed = mask is None and getattr(positions, "shape", None) == (num_rows, length)
    return RouteContext(
        shape=(num_rows, length),
        token_mask=token_mask,
        segment_ids=_segments(positions) if packed and isinstance(positions, Tensor) else None,
    )


def read_encoder(arguments: dict[str, Any]) -> RouteContext | None:
    """What a decoder's call says about the encoder states it attends to."""
    states = arguments.get("encoder_hidden_states")
    if not isinstance(states, Tensor):
        return None
    num_rows, length = states.shape[:2]
    mask = arguments.get("encoder_attention_mask")
    return RouteContext((num_rows, length), _last_columns(mask, num_rows, length))


def task_tensor(ids: Any) -> Tensor:
    """A caller's task ids as (B,) or (B, S) int64. Raises ConfigError on another shape or fractions."""
    try:
        tasks = torch.as_tensor(ids)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task_ids={ids!r}; give a whole number for each sequence or token") from error
    if tasks.dim() not in (1, 2):
        raise ConfigError(f"task_ids has shape {tuple(tasks.shape)}; give one task id for each sequence or token")
    if tasks.numel() and tasks.is_floating_point():
        raise ConfigError(f"task_ids are {tasks.dtype}; give a whole number for each sequence or token")
    return tasks.long()


def spread_ids(ids: Tensor, context: RouteContext, kind: str) -> Tensor:
    """Per-sequence (B,) or per-token (B, S) ids -> (T,); repeated over beams, continued while decoding.

    Raises StateError where the rows or columns do not fit the batch.
    """
    num_rows, length = context.shape
    if len(ids) == 0 or num_rows % len(ids):
        raise StateError(f"{kind} for {len(ids)} sequences, the batch has {num_rows}; set one for each, or None")
    per_row = ids.repeat_interleave(num_rows // len(ids), dim=0)
    if per_row.dim() == 1:
        per_row = per_row[:, None].expand(-1, length)
    elif per_row.shape[1] != length:
        if length > 1:
            raise StateError(f"{kind} for {per_row.shape[1]} positions, the batch has {length}")
        per_row = per_row[:, -1:]
    return per_row.flatten()


def _last_columns(mask: Any, num_rows: int, length: int) -> Tensor | None:
    """The mask of the current tokens: while decoding it also covers the cached prefix.

    Masks of pairs of tokens, (B, 1, S, S), do not say which tokens are real: all are taken to be.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != num_rows or mask.shape[1] < length:
        return None
    return (mask[:, mask.shape[1] - length :] != 0).flatten()


def _segments(positions: Tensor) -> Tensor:
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts.flatten().cumsum(0) - 1
