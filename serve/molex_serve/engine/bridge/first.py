"""A second cache for the pass that some mixtures take over the base first (X-LoRA, molex.model_scope).

    a step with tokens of such a mixture:   base over all tokens, this cache -> heads decide;   model, its own cache

It is another tensor under the very pages of the model's own. Whatever becomes of a request's pages, prompts in chunks,
fresh starts after a preemption, prefixes found by others, becomes of both: the two sequences are always equally long,
and nothing has to keep them in step. A page means the same in both, since prefixes are found among one adapter's own.
The pass runs over the other requests' tokens too, to no effect but time: a step that has such a mixture is two.

Copies between pages would leave this tensor behind; transformers makes them for forks and for pages that move to
the host's memory, neither of which is asked for here.
"""

from copy import copy

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import CachePool


def first_cache(cache: PagedAttentionCache) -> PagedAttentionCache:
    """Only to be updated with the indices of `cache`. Zeros: what nobody wrote is masked, and must be finite for it."""
    twin, tensor = copy(cache), torch.zeros_like(cache.cache_tensor)
    twin.cache_tensor = tensor
    twin.cache_allocators = {name: copy(allocator) for name, allocator in cache.cache_allocators.items()}
    unused = CachePool(cache.num_sectors, len(cache.cache_allocators))
    for allocator in twin.cache_allocators.values():
        data_bytes = cache.num_sectors * cache.bytes_per_sector
        allocator.register_cache_tensor(cache.bytes_per_sector, data_bytes, tensor, unused)
    twin.layer_to_allocator = {
        layer: allocator for allocator in twin.cache_allocators.values() for layer in allocator.layer_indices
    }
    return twin
