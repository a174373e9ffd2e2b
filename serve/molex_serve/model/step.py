"""Whose tokens a forward has: known on the host before it starts, so that nothing waits for the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

BASE = 0  # the handle of the base model


class Span(NamedTuple):
    """Neighbouring tokens [start, stop) of one request. task: what task-routed mixtures are told, None = nothing."""

    handle: int
    start: int
    stop: int
    task: int | None = None


@dataclass(frozen=True)
class Step:
    """spans lie side by side from token 0; tokens after the last one are padding, and the base's.

    handles (T,) int64 lies on the model's device; an engine with static inputs passes its own tensor.
    """

    spans: tuple[Span, ...]
    handles: Tensor

    @staticmethod
    def of(spans: tuple[Span, ...], device: torch.device) -> "Step":
        """With a tensor of handles made here."""
        handles = [span.handle for span in spans for _ in range(span.start, span.stop)]
        return Step(spans, torch.tensor(handles, dtype=torch.int64, device=device))

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The adapters' handles in this step, ascending, without the base."""
        return tuple(sorted({span.handle for span in self.spans} - {BASE}))

    def spans_of(self, handle: int) -> Iterator[Span]:
        return (span for span in self.spans if span.handle == handle)

    def rows_of(self, handle: int) -> Tensor:
        """(N,) the tokens of an adapter."""
        ranges = [torch.arange(span.start, span.stop) for span in self.spans_of(handle)]
        return torch.cat(ranges).to(self.handles.device)
