"""Whose tokens a forward has: known on the host before it starts, so that nothing waits for the device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

BASE = 0  # the handle of the base model

# Runs the model's stack of layers over a step's tokens, with a cache of its own -> last hidden states (..., D).
FirstPass = Callable[[nn.Module], Tensor]


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

    def rows_of(self, handle: int) -> Tensor:
        """(N,) the tokens of an adapter."""
        return self._rows(lambda span: span.handle == handle)

    def rows_without(self, handles: frozenset[int]) -> Tensor:
        """(N,) the tokens of all others, padding included."""
        own = self._rows(lambda span: span.handle in handles)
        keep = torch.ones(len(self.handles), dtype=torch.bool)
        keep[own.cpu()] = False
        return keep.nonzero().squeeze(1).to(self.handles.device)

    def without(self, handles: frozenset[int]) -> "Step":
        """The step of these others alone, their tokens moved together."""
        spans, end = [], 0
        for span in self.spans:
            if span.handle not in handles:
                spans.append(span._replace(start=end, stop=end + span.stop - span.start))
                end = spans[-1].stop
        return Step(tuple(spans), self.handles[self.rows_without(handles)])

    def tasks_of(self, handle: int) -> Tensor | None:
        """(N,) the tasks of an adapter's tokens; None where any of its requests has none."""
        own = [span for span in self.spans if span.handle == handle]
        if any(span.task is None for span in own):
            return None
        return torch.tensor([span.task for span in own for _ in range(span.start, span.stop)])

    def _rows(self, mine: Callable[[Span], bool]) -> Tensor:
        ranges = [torch.arange(span.start, span.stop) for span in self.spans if mine(span)]
        return torch.cat(ranges).to(self.handles.device) if ranges else self.handles.new_empty(0)
