"""Memory of serving: ExpertWeave's figures by arithmetic beside the paper's, low-rank adapters, and what is resident.

    python -m benchmarks.serving_memory [--hidden 256] [--inner 175]

Arithmetic: DeepSeek-V2-Lite's shape on a device in which it leaves room for 810K tokens, as in arXiv 2508.17624,
figure 9 and table 1. Measured: experts of hidden by inner numbers, as many as three of its adapters bring, written into
slots of reserved memory on this machine, by the kernel's count of resident pages.
"""

import argparse
import random
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import write
from molex_serve.memory.arena import Arena, arena
from molex_serve.memory.calculator import (
    SwapBase,
    Tuned,
    expert_bytes,
    grouped_cache_bytes,
    latent_cache_bytes,
    low_rank_bytes,
)
from molex_serve.memory.slots import Ranges

LAYERS, EXPERTS = 26, 64
BASE = SwapBase(
    num_bytes=int(29.25 * 2**30),
    num_layers=LAYERS,
    num_experts=EXPERTS,
    expert_bytes=expert_bytes(2048, 1408, 2),
    cache_bytes=latent_cache_bytes(LAYERS + 1, 512, 64, 2),
)
PAPER_MERGED, PAPER_SLOTS, PAPER_FRAGMENTATION = 810_000, {2: 572_000, 3: 477_000}, 1.51
LLAMA = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)] * 32
LLAMA_CACHE = grouped_cache_bytes(32, 8, 128, 2)


class Adapter(NamedTuple):
    """Table 1 of the paper: experts in a layer, at most and on average."""

    most: int
    mean: float

    @property
    def tuned(self) -> Tuned:
        return [self.mean] * LAYERS


ADAPTERS = {
    "gate-math": Adapter(12, 7.04),
    "gate-intent": Adapter(12, 9.50),
    "token-math": Adapter(9, 6.12),
    "token-intent": Adapter(8, 7.12),
    "gate-summary": Adapter(11, 7.73),
    "token-summary": Adapter(8, 5.15),
    "gate-law": Adapter(12, 7.35),
    "token-law": Adapter(10, 6.58),
    "gate-translation": Adapter(13, 4.69),
    "token-translation": Adapter(6, 3.85),
}
SERVED = [ADAPTERS[name] for name in ("gate-math", "gate-intent", "token-math")]  # figure 9, in this order


def cache_tokens(num_adapters: int) -> dict[str, int]:
    """With so many of figure 9's adapters: in slots, padded to the largest of all three, merged."""
    usable, served = BASE.usable(PAPER_MERGED), SERVED[:num_adapters]
    most = max(adapter.most for adapter in SERVED)
    return {
        "slots": BASE.cache_tokens(usable, BASE.slots([adapter.tuned for adapter in served])),
        "padded": BASE.cache_tokens(usable, BASE.padded(num_adapters, most)),
        "merged": BASE.cache_tokens(usable, 0, copies=num_adapters),
    }


def fragmentation() -> float:
    """F_mem of all ten."""
    most = max(adapter.most for adapter in ADAPTERS.values())
    return BASE.fragmentation([adapter.tuned for adapter in ADAPTERS.values()], most)


def counts(adapter: Adapter, dice: random.Random) -> list[int]:
    """Whole experts for each layer that have an adapter's mean, and its most in one of them."""
    found = [adapter.most] + [1] * (LAYERS - 1)
    while sum(found) < round(adapter.mean * LAYERS):
        layer = dice.randrange(LAYERS)
        found[layer] += found[layer] < adapter.most
    return found


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measured(hidden: int, inner: int) -> dict[str, float]:
    """MiB that figure 9's adapters take with small experts: by arithmetic, in pages, resident, and padded. unloaded:
    what two of three gave back, of what they took."""
    dice, most = random.Random(0), max(adapter.most for adapter in SERVED)
    rows, device, dtype = EXPERTS + len(SERVED) * most, torch.device("cpu"), torch.bfloat16
    shapes = ((rows, 2 * inner, hidden), (rows, hidden, inner))
    pools = [[arena(shape, dtype, device) for shape in shapes] for _ in range(LAYERS)]
    free = [Ranges(rows - EXPERTS) for _ in range(LAYERS)]
    tuned, levels, taken = [counts(adapter, dice) for adapter in SERVED], [resident()], []
    for own in tuned:
        taken.append([load(pool, ranges, count) for pool, ranges, count in zip(pools, free, own, strict=True)])
        levels.append(resident())
    pages = sum(memory.committed_bytes for pool in pools for memory in pool)
    for own in taken[:2]:
        for pool, found in zip(pools, own, strict=True):
            for memory in pool:
                memory.release(found.start, found.stop)
    returned = levels[-1] - resident()
    one = expert_bytes(hidden, inner, 2)
    return {
        "arithmetic": mib(one * sum(map(sum, tuned))),
        "pages": mib(pages),
        "resident": mib(levels[-1] - levels[0]),
        "padded": mib(one * LAYERS * len(SERVED) * most),
        "unloaded": mib(returned),
        "unloaded_arithmetic": mib(one * sum(map(sum, tuned[:2]))),
    }


def load(pool: list[Arena], ranges: Ranges, count: int) -> range:
    """Writes so many experts of a layer, and says where."""
    found = ranges.take(count)
    assert found is not None
    slots = range(EXPERTS + found.start, EXPERTS + found.stop)
    for memory in pool:
        memory.commit(slots.start, slots.stop)
        memory.tensor[slots.start : slots.stop] = 1
    return slots


def mib(num_bytes: float) -> float:
    return round(num_bytes / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of serving, by arithmetic and measured")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=175, help="odd: an expert then ends inside a page")
    arguments = parser.parse_args()
    print("adapters  GiB in slots  tokens in slots (paper)  padded  merged")
    tokens = {num: cache_tokens(num) for num in range(1, len(SERVED) + 1)}
    for num, found in tokens.items():
        gib = BASE.slots([adapter.tuned for adapter in SERVED[:num]]) / 2**30
        paper = f"({PAPER_SLOTS[num]})" if num in PAPER_SLOTS else ""
        print(f"{num:8}  {gib:12.2f}  {found['slots']:15} {paper:8}  {found['padded']}  {found['merged']}")
    print(f"padding allocates {fragmentation():.3f} times what is there (paper {PAPER_FRAGMENTATION})")
    ranks = {rank: low_rank_bytes(rank, LLAMA, 2) for rank in (8, 16, 64, 256)}
    for rank, num_bytes in ranks.items():
        print(f"a LoRA of rank {rank} at all of an 8 B Llama's linears: {mib(num_bytes)} MiB")
    measured(16, 16)  # what is allocated once
    row = {
        "device": "cpu",
        "hidden": arguments.hidden,
        "inner": arguments.inner,
        "tokens": tokens,
        "paper_tokens": {1: PAPER_MERGED, **PAPER_SLOTS},
        "fragmentation": round(fragmentation(), 3),
        "lora_mib": {rank: mib(num_bytes) for rank, num_bytes in ranks.items()},
        "lora_as_cached_tokens": {rank: num_bytes // LLAMA_CACHE for rank, num_bytes in ranks.items()},
        "mib": measured(arguments.hidden, arguments.inner),
    }
    write("serving_memory", row)


if __name__ == "__main__":
    main()
