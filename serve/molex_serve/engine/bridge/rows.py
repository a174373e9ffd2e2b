"""What a step carries beside its tokens: by which adapter each is computed, and how each new one is drawn."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from molex_serve.engine.attribution import Attribute, attributed
from molex_serve.engine.common import AdaptedModel, keeps_logits
from molex_serve.engine.logprobs import Logprobs
from molex_serve.engine.roster import Live
from molex_serve.engine.sampling import NUMBERS, Row, draw, needs_tokens, pack
from molex_serve.model.step import Span, Step


def live_of(state: RequestState) -> Live:
    """Survives forks, fresh starts and offloading: transformers copies what a request says to logits processors."""
    return state.logit_processor_kwargs["live"]


class StepRows(ContinuousBatchingLogitsProcessorList):
    """Stands in the place of transformers' logits processors: draws tokens, and knows whose tokens a step has.

    Its rows of the step's int32 tensor: NUMBERS for each new token, and in the last one every token's adapter.
    """

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.tensors_required = NUMBERS + 1
        self.supported_keys = {"live": Live}
        self.do_processing = True
        self.num_steps = 0
        self.last = Step((), torch.empty(0, dtype=torch.int64))
        self._spans: tuple[Span, ...] = ()
        self._lives: list[Live] = []  # those that get a token, whose spans end at _stops
        self._stops: list[int] = []
        self._rows: list[Row] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        self._spans = tuple(_spans(requests_in_batch))
        pairs = zip(requests_in_batch, self._spans, strict=True)
        new = [(request.state, span.stop) for request, span in pairs if request.has_new_token]
        drawing, self._stops = [state for state, _ in new], [stop for _, stop in new]
        self._lives = [live_of(state) for state in drawing]
        self._rows = [_row(state) for state in drawing]
        handles = [span.handle for span in self._spans for _ in range(span.start, span.stop)]
        arg_storage[-1].zero_()  # what pads a step is the base's
        arg_storage[-1, : len(handles)] = torch.tensor(handles, dtype=torch.int32)
        if drawing:
            arg_storage[:NUMBERS, : len(drawing)] = pack(self._rows).to(arg_storage.device)
        return arg_storage

    def step(self, rows: Tensor, num_tokens: int) -> Step:
        """What is about to run. rows: a part of the step's int32 tensor, on the model's device."""
        whole = rows._base
        assert whole is not None
        self.num_steps += 1
        self.last = Step(self._spans, whole[-1, :num_tokens].long())
        return self.last

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        num_new = len(self._rows)  # the rest belongs to prompts that are not over yet
        if not num_new:
            return scores
        new_RV = scores[:num_new]
        drawn_RV = draw(new_RV, input_ids[:num_new], logits_processor_args[:NUMBERS, :num_new], self._rows)
        self._note_logprobs(new_RV, drawn_RV)
        return torch.cat([drawn_RV, scores[num_new:]]) if num_new < len(scores) else drawn_RV

    def note_experts(self, attribute: Attribute) -> None:
        """After the forward."""
        asked = [stop for live, stop in zip(self._lives, self._stops, strict=True) if live.request.experts]
        found = attributed(attribute, self.last, asked)
        for live, row, stop in zip(self._lives, self._rows, self._stops, strict=True):
            if stop in found:
                live.experts[row.position] = found[stop]

    def _note_logprobs(self, logits_RV: Tensor, drawn_RV: Tensor) -> None:
        asked = {r: row.sampling.logprobs for r, row in enumerate(self._rows) if row.sampling.logprobs is not None}
        if not asked:
            return
        index = torch.tensor(list(asked), device=logits_RV.device)
        found = Logprobs(logits_RV[index], drawn_RV[index].argmax(dim=-1), max(asked.values()))
        for number, r in enumerate(asked):
            self._lives[r].logprobs[self._rows[r].position] = (found, number)


def _spans(requests: list[FutureRequestState]) -> Iterator[Span]:
    start = 0
    for future in requests:
        request = live_of(future.state).request
        yield Span(request.handle, start, start + future.query_length, request.task)
        start += future.query_length


def _row(state: RequestState) -> Row:
    live = live_of(state)
    sampling, num_prompt = live.request.sampling, len(live.request.prompt_ids)
    num_known = len(state.initial_tokens) + len(state.generated_tokens)  # while a step is in flight, one less than fed
    tokens = state.initial_tokens + state.generated_tokens if needs_tokens(sampling) else ()
    pending = num_known < state.position_offset
    return Row(sampling, live.seed, state.position_offset, tokens, num_prompt, pending, live.matcher)


class SteppedModel(nn.Module):
    """The model, as transformers calls it: says whose tokens they are, before and after."""

    model: PreTrainedModel

    first_cache: PagedAttentionCache | None = None  # of the first pass

    def __init__(self, served: AdaptedModel, rows: StepRows):
        super().__init__()
        self.served, self.model, self.rows = served, served.model, rows

    def forward(self, **inputs: Any) -> Any:
        num_tokens = inputs["input_ids"].shape[1]
        step = self.rows.step(inputs["logits_processor_args"], num_tokens)
        self.served.begin_step(step, None if self.first_cache is None else partial(self._first_pass, inputs))
        try:
            outputs = self.model(**inputs)
        finally:
            self.served.begin_step(None)
        self.rows.note_experts(self.served.attribution)
        return outputs

    def _first_pass(self, inputs: dict[str, Any], stack: nn.Module) -> Tensor:
        """(1, T, D) last hidden states."""
        whole = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
        return stack(**{**whole, "cache": self.first_cache})[0]

    def _supports_logits_to_keep(self) -> bool:
        return keeps_logits(self.model)
