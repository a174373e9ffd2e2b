"""Multi-head latent attention (DeepSeek-V2 and V3) in a paged cache that has one width for keys and values.

Such a model's `config.head_dim` is its rotary part; its keys are wider, and its values another width again. Pages are
made as wide as the widest, and rows are padded with zeros on their way in and cut on their way out. Attention itself
never sees the padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

Update = Callable[[Tensor, Tensor, int, dict[str, Any]], tuple[Tensor, Tensor]]


def page_width(config: PreTrainedConfig) -> int | None:
    """Of one head; None for other attentions."""
    if not getattr(config, "kv_lora_rank", None):
        return None
    return max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)


@contextmanager
def sized_pages(config: PreTrainedConfig) -> Iterator[None]:
    """Within, who sizes pages by the configuration finds their width. Only there: rotary embeddings read it, too."""
    width = page_width(config)
    if width is None:
        yield
        return
    rotary = config.head_dim
    config.head_dim = width
    try:
        yield
    finally:
        config.head_dim = rotary


def padded(update: Update, width: int) -> Update:
    """A cache's `update` that takes and gives keys and values (1, heads, T, D) of any D up to width."""

    def padded_update(
        key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        of_keys, of_values = key_states.shape[-1], value_states.shape[-1]
        keys = F.pad(key_states, (0, width - of_keys))
        values = F.pad(value_states, (0, width - of_values))
        keys, values = update(keys, values, layer_idx, kwargs)
        return keys[..., :of_keys], values[..., :of_values]

    return padded_update
