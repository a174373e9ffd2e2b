"""What a model's forward call says about its tokens: batch shape, which are real, where packed sequences begin."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from molex.errors import StateError
from molex.routing import RouteContext


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


def spread_ids(ids: Tensor, context: RouteContext, kind: str = "task ids") -> Tensor:
    """Per-sequence (B,) or per-token (B, S) ids -> (T,); repeated over beams, continued while decoding, 0 on padding.

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
    flat = per_row.flatten()
    return flat if context.token_mask is None else flat.where(context.token_mask, 0)


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
