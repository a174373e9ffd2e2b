"""What serving costs in memory, by arithmetic: expert-swap adapters in slots and padded, low-rank ones, the KV cache.

    cache tokens = (usable - base - Σ_i Σ_l e_i(l) · expert) / bytes of a cached token
    padded:        Σ_l e_i(l)  becomes  L · E_max  for each of N adapters
    F_mem        = L (M + N · E_max) / Σ_l (M + Σ_i e_i(l))

with M experts in each of L layers of the base, of which adapter i brings e_i(l) of its own (ExpertWeave, arXiv
2508.17624, sections 3.1 and 5.4). Bytes everywhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Tuned = Sequence[float]  # e_i(l), l = 1 … L: how many experts an adapter brings to each layer


def latent_cache_bytes(num_layers: int, rank: int, rope_dim: int, itemsize: int) -> int:
    """Of a token where attention caches a latent and one rotary key (MLA)."""
    return num_layers * (rank + rope_dim) * itemsize


def grouped_cache_bytes(num_layers: int, num_heads: int, head_dim: int, itemsize: int) -> int:
    """Of a token where attention caches the keys and values of so many heads (GQA; all of them without groups)."""
    return num_layers * 2 * num_heads * head_dim * itemsize


def expert_bytes(hidden: int, inner: int, itemsize: int) -> int:
    """Of a gated expert: gate, up and down."""
    return 3 * hidden * inner * itemsize


@dataclass(frozen=True, kw_only=True)
class SwapBase:
    """A mixture-of-experts base over which expert-swap adapters are served."""

    num_bytes: int
    num_layers: int  # L, those with experts
    num_experts: int  # M
    expert_bytes: int
    cache_bytes: int  # of a token

    def slots(self, adapters: Sequence[Tuned]) -> float:
        """Bytes of the adapters where each expert has a slot of its own."""
        return self.expert_bytes * sum(map(sum, adapters))

    def padded(self, num_adapters: int, most: int) -> int:
        """Bytes of as many adapters where each has `most` places in every layer."""
        return self.expert_bytes * self.num_layers * num_adapters * most

    def fragmentation(self, adapters: Sequence[Tuned], most: int) -> float:
        """F_mem: experts that padding allocates, for each that is there."""
        there = self.num_layers * self.num_experts + sum(map(sum, adapters))
        return self.num_layers * (self.num_experts + len(adapters) * most) / there

    def cache_tokens(self, usable: float, adapters: float, copies: int = 1) -> int:
        """What fits beside the adapters' bytes. copies: of the base, one for each adapter where they are merged.
        Negative: as many do not fit."""
        return int((usable - copies * self.num_bytes - adapters) // self.cache_bytes)

    def usable(self, cache_tokens: int) -> int:
        """The memory in which the base alone leaves room for so many tokens."""
        return self.num_bytes + cache_tokens * self.cache_bytes


def low_rank_bytes(rank: int, linears: Iterable[tuple[int, int]], itemsize: int) -> int:
    """Of A (R, D) and B (O, R) at every linear of D in- and O out-features."""
    return rank * itemsize * sum(num_in + num_out for num_in, num_out in linears)
