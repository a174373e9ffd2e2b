"""A roofline: how long the steps of a plan take, from what they multiply and what they move.

    seconds = Σ over steps of max(operations / peak, bytes / bandwidth) + launches · latency

Only the ratios matter, to tell which plans are worth trying for a shape; each backend says its own steps. The experts'
share of a layer is limited by what it reads and writes, so a step counts the tensors that have to come and go, once.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from molex.kernels.columns import Columns
from molex.routing import Routing

WIDE = 4  # bytes of a gate and of a sum, float32


class Shape(NamedTuple):
    """One linear with experts, as far as its cost goes."""

    num_tokens: int
    num_in: int
    num_out: int
    num_columns: int
    num_slots: int  # experts a token
    num_experts: int
    rank: int  # of the largest expert
    itemsize: int  # bytes of a number
    backward: bool  # whether the pass back counts too

    @staticmethod
    def of(x: Tensor, columns: Columns, routing: Routing, num_tokens: int) -> "Shape":
        sizes = (x.shape[-1], columns.B.shape[0], len(columns.expert_of_column), routing.expert_ids.shape[1])
        largest = len(columns.ranks), max(columns.ranks, default=1)
        return Shape(num_tokens, *sizes, *largest, x.element_size(), torch.is_grad_enabled())


class Step(NamedTuple):
    """One or several launches that follow each other."""

    operations: float = 0
    bytes: float = 0
    launches: int = 1


class Ceilings(NamedTuple):
    """What a device reaches: operations a second in 16 and 32 bits, bytes a second, seconds of a launch."""

    half: float
    single: float
    bandwidth: float
    latency: float

    @staticmethod
    def of(device: torch.device) -> "Ceilings":
        """Measured on an H200, and on a processor's core; other devices have other numbers and much the same ratios."""
        if device.type == "cuda":
            return Ceilings(half=790e12, single=50e12, bandwidth=4.3e12, latency=4e-6)
        return Ceilings(half=60e9, single=60e9, bandwidth=4e9, latency=3e-6)


def seconds(steps: Iterable[Step], itemsize: int, ceilings: Ceilings) -> float:
    peak = ceilings.half if itemsize == 2 else ceilings.single
    return sum(
        max(step.operations / peak, step.bytes / ceilings.bandwidth) + step.launches * ceilings.latency
        for step in steps
    )


def product(rows: int, wide: int, deep: int, itemsize: int, onto: bool = False) -> Step:
    """(rows, deep) times (deep, wide). onto: added to a result that is there, which is read too."""
    return Step(2 * rows * wide * deep, itemsize * ((rows + wide) * deep + rows * wide * (1 + onto)))


def moved(rows: int, width: int, bytes_each: int, launches: int = 1) -> Step:
    """Elementwise work on (rows, width), so many bytes in and out for each."""
    return Step(0, rows * width * bytes_each, launches)
