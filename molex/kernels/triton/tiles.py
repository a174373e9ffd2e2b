"""Tile sizes, how a long sum is split, and what all kernels share.

Sizes are functions of the shapes and of nothing else. An autotuner would time candidates on the first call, which a
CUDA graph cannot capture, and could change the order of summation from one run to the next.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of what is multiplied; gates and sums are float32

INTERPRETED = knobs.runtime.interpret
INTERPRETED_PROCESSORS = 8  # splits happen at toy sizes too, and so are tested

P = ParamSpec("P")
Result = TypeVar("Result")


@triton.jit
def widened(tile: tl.tensor, UP: tl.constexpr) -> tl.tensor:
    """The interpreter multiplies and adds the bit patterns of bfloat16, without a word."""
    return tile.to(tl.float32) if UP else tile


@triton.jit
def rounded(tile: tl.tensor, UP: tl.constexpr) -> tl.tensor:
    """A float32 result on its way to bfloat16: a GPU rounds to the nearest, the interpreter cuts off."""
    if UP:
        bits = tile.to(tl.int32, bitcast=True)
        tile = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tile


def must_widen(dtype: torch.dtype) -> bool:
    """The UP of kernels that read and write this dtype."""
    return INTERPRETED and dtype == torch.bfloat16


def on_its_device(launch: Callable[P, Result]) -> Callable[P, Result]:
    """Launches where the first tensor is: Triton takes the current device, which models over many GPUs never set."""

    @functools.wraps(launch)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> Result:
        with torch.cuda.device_of(args[0]):
            return launch(*args, **kwargs)

    return guarded


def check_dtypes(*factors: Tensor) -> None:
    """What is multiplied has one dtype, that a kernel exists for: nothing is converted on the way."""
    dtypes = {factor.dtype for factor in factors}
    assert len(dtypes) == 1, f"factors of one product have different dtypes: {dtypes}"
    assert dtypes <= set(DTYPES), f"the Triton kernels multiply {DTYPES}, not {dtypes}"


def row_major(tensor: Tensor) -> Tensor:
    """A tensor whose rows are contiguous, so that one stride describes it; a copy where it was not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block(size: int, largest: int) -> int:
    """The power of two that holds `size`, from 16, the least that tensor cores take, to `largest`."""
    return min(max(1 << (max(size, 1) - 1).bit_length(), 16), largest)


def block_depth(dtype: torch.dtype) -> int:
    """How much of the summed dimension a program loads at a time."""
    return 32 if dtype == torch.float32 else 64


def split(length: int, num_tiles: int, device: torch.device, at_least: int, each: int = 1) -> tuple[int, int]:
    """Cuts a sum of `length` terms where its tiles are fewer than `each` a processor: (number of parts, part).

    A part is a multiple of `at_least`. The parts' sums are added in their order by whoever reads them.
    """
    parts = min(-(-length // at_least), max(1, each * _num_processors(device) // max(num_tiles, 1)))
    part = -(-length // (max(parts, 1) * at_least)) * at_least
    return max(1, -(-length // part)) if part else 1, part


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
