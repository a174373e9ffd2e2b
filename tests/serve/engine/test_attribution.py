"""Every new token comes with the expert that had most weight for the token before it, where a mixture served it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from molex_serve.engine.attribution import attributed
from molex_serve.engine.base import ExpertShare
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.engine.static import StaticEngine
from molex_serve.model.routed import Attribution
from molex_serve.model.step import Span, Step
from tests.serve.engine.serving import CHUNKED, Adapted, greedy, running, submit, tokenizer

NAMES = ["law", "code", "math"]


class Mixtures(Adapted):
    """Adapters from 2 on are mixtures: a token's expert is told by its id, so it is known which token was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ids_T = torch.empty(0)
        self.num_asked = 0
        self.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: object, args: object, inputs: dict[str, Any]) -> None:
        self.ids_T = inputs["input_ids"][0]

    def attribution(self, handle: int) -> Attribution | None:
        self.num_asked += 1
        if handle < 2:
            return None
        own_T = self.ids_T[self.steps[-1].rows_of(handle)].long()
        shares_TE = torch.full((len(own_T), 3), 0.2)
        shares_TE[torch.arange(len(own_T)), own_T % 3] = 0.6
        shares_TE[own_T % 7 == 0] = 0
        return Attribution(shares_TE, NAMES)


@pytest.mark.parametrize("kind", [ContinuousEngine, StaticEngine])
def test_experts_come_with_their_tokens(kind: type[ContinuousEngine] | type[StaticEngine]) -> None:
    mixtures = Mixtures()
    handles = (2, 0, 3, 2, 1)
    requests = [replace(greedy(str(i), 4 + 5 * i, handle), experts=i != 3) for i, handle in enumerate(handles)]
    with running(kind(mixtures, tokenizer(), CHUNKED)) as engine:
        listeners = [listener.wait() for listener in submit(engine, requests)]
    for request, listener in zip(requests, listeners, strict=True):
        found = [share for event in listener.events for share in event.experts]
        before = [request.prompt_ids[-1], *listener.tokens[:-1]]
        expected = [ExpertShare(NAMES[token % 3], pytest.approx(0.6)) if token % 7 else None for token in before]
        assert found == (expected if request.handle >= 2 and request.experts else [])


@pytest.mark.parametrize("kind", [ContinuousEngine, StaticEngine])
def test_nobody_pays_for_experts_that_were_not_asked_for(kind: type[ContinuousEngine] | type[StaticEngine]) -> None:
    mixtures = Mixtures()
    with running(kind(mixtures, tokenizer(), CHUNKED)) as engine:
        submit(engine, [greedy("a", 4, handle=2)])[0].wait()
    assert mixtures.num_asked == 0


def test_only_adapters_that_get_a_token_are_asked() -> None:
    """The third span's prompt is not over; an adapter's tokens are counted among its own."""
    spans = (Span(2, 0, 3), Span(3, 3, 5), Span(4, 5, 9), Span(2, 9, 10))
    asked = []

    def attribute(handle: int) -> Attribution:
        asked.append(handle)
        return Attribution(torch.eye(4) if handle == 2 else torch.eye(2, 4), ["a", "b", "c", "d"])

    found = attributed(attribute, Step.of(spans, torch.device("cpu")), [3, 5, 10])
    assert asked == [2, 3]
    assert {stop: rows.of_row(row).name for stop, (rows, row) in found.items()} == {3: "c", 10: "d", 5: "b"}
