"""How fast this machine copies and multiplies, measured, and the time no layer can stay under.

    floor = max(multiplications / peak, least bytes / bandwidth)

The floor of a mixture lets every token pay for its own K · r ranks alone, and moves each tensor once: what a kernel
would take that hides all else behind the base's product.
"""

from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.harness import interleave
from benchmarks.problem import Layer

SIZES = {"cpu": (1024, 2**25), "cuda": (8192, 2**30)}  # rows of a square product, bytes of a copy
PASSES = {"forward": 1, "backward": 2, "forward and backward": 3}  # of the experts' products; the base's has no dW


@dataclass(frozen=True)
class Ceilings:
    """The best of ten: multiply-adds count twice, a byte copied is read and written."""

    flops_per_second: float
    bytes_per_second: float

    def row(self) -> dict[str, dict[str, float]]:
        return {"ceilings": {name: float(f"{value:.3g}") for name, value in asdict(self).items()}}


def measure(device: str, dtype: torch.dtype) -> Ceilings:
    size, num_bytes = SIZES[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    times = interleave({"gemm": partial(torch.mm, a, b), "copy": partial(target.copy_, source)}, 10, 3, device)
    return Ceilings(2 * size**3 / min(times["gemm"]), 2 * num_bytes / min(times["copy"]))


def floor_seconds(layer: Layer, timed: str, ceilings: Ceilings) -> float:
    """Of the layer with its experts. timed: a key of PASSES."""
    num_tokens, num_in = layer.x.shape
    num_out, num_used = len(layer.B), layer.expert_ids.shape[1] * layer.rank
    base_passes = 2 if timed == "forward and backward" else 1
    products = num_tokens * (base_passes * num_in * num_out + PASSES[timed] * num_used * (num_in + num_out))
    return max(2 * products / ceilings.flops_per_second, least_bytes(layer, timed) / ceilings.bytes_per_second)


def least_bytes(layer: Layer, timed: str) -> int:
    """forward reads x, W, A, B and writes y; backward reads them and dy, and writes dx, dA, dB."""
    factors = layer.A.nbytes + layer.B.nbytes
    W = sum(parameter.nbytes for parameter in layer.base.parameters())
    y = layer.x.shape[0] * len(layer.B) * layer.x.itemsize
    one_way = {"forward": layer.x.nbytes + W + factors + y, "backward": 2 * layer.x.nbytes + W + 2 * factors + y}
    return one_way["forward"] + one_way["backward"] if timed == "forward and backward" else one_way[timed]
