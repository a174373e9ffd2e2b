"""Which expert of a mixture had most weight for the token that a new one is drawn after."""

from collections.abc import Callable, Collection
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from molex_serve.engine.base import ExpertShare
from molex_serve.model.routed import Attribution
from molex_serve.model.step import Step

Attribute = Callable[[int], Attribution | None]  # of an adapter's tokens in the last step; None: nothing chose


class Dominant:
    """The expert of some of an adapter's tokens, kept on the device until somebody reads it."""

    def __init__(self, attribution: Attribution, tokens_R: Tensor):
        self._names = attribution.names
        self._share_R, self._expert_R = attribution.shares[tokens_R].max(dim=-1)

    def of_row(self, row: int) -> ExpertShare | None:
        """None where no expert had any."""
        shares, experts = self._read
        return ExpertShare(self._names[experts[row]], shares[row]) if shares[row] > 0 else None

    @cached_property
    def _read(self) -> tuple[list[float], list[int]]:
        return self._share_R.tolist(), self._expert_R.tolist()


def attributed(attribute: Attribute, step: Step, stops: Collection[int]) -> dict[int, tuple[Dominant, int]]:
    """Right after a step's forward, for the last tokens of the spans that end at these stops: where to read a token's
    expert, and in which row. Stops of spans that no mixture computed are missing."""
    found: dict[int, tuple[Dominant, int]] = {}
    for handle in step.present:
        own = [span for span in step.spans if span.handle == handle]
        ends = accumulate(span.stop - span.start for span in own)
        wanted = {span.stop: end - 1 for span, end in zip(own, ends, strict=True) if span.stop in stops}
        attribution = attribute(handle) if wanted else None
        if attribution is not None:
            tokens_R = torch.tensor(list(wanted.values()), device=attribution.shares.device)
            dominant = Dominant(attribution, tokens_R)
            found |= {stop: (dominant, row) for row, stop in enumerate(wanted)}
    return found
