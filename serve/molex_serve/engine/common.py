"""What every engine does around its steps: accept requests, let them go, pause, score a prompt."""

import inspect
import secrets
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex_serve.engine.admission import Bounds, end_tokens, longest_sequence, vocabulary_size
from molex_serve.engine.base import Deliver, Engine, Request, TokenLogprob
from molex_serve.engine.grammar import Grammars
from molex_serve.engine.logprobs import logprobs_of
from molex_serve.engine.roster import Live, Roster
from molex_serve.model.routed import Attribution
from molex_serve.model.step import FirstPass, Span, Step
from molex_serve.settings import EngineSettings

_LEAVING_SECONDS = 60.0  # a step may take long; a request leaves between two


class AdaptedModel(Protocol):
    """A model with adapters, as an engine needs it; `ServedModel` is one."""

    @property
    def model(self) -> PreTrainedModel: ...

    def begin_step(self, step: Step | None, first_pass: FirstPass | None = None) -> None:
        """The next forward has these tokens; None: it is over. first_pass is called where an adapter needs it."""

    def attribution(self, handle: int) -> Attribution | None:
        """Which experts served an adapter's tokens in the last step; None: nothing chose."""

    def check_task(self, handle: int, task: int | None) -> None:
        """Raises BadRequest where an adapter is routed by tasks and this is none of them."""


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether it can be told which positions' logits are wanted."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


class RosterEngine(Engine):
    """A subclass calls `_set_up` when it knows how many tokens its cache holds, and runs the steps."""

    def _set_up(self, served: AdaptedModel, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings) -> None:
        self.served, self.model, self.settings = served, served.model, settings
        self.ends = end_tokens(self.model, tokenizer)
        self.grammars = Grammars(tokenizer, self.ends, vocabulary_size(self.model))
        self.roster = Roster(settings.queue, self._num_running)
        self._alone = threading.RLock()

    def _bound(self, cache_tokens: int) -> None:
        self.longest = longest_sequence(self.model, cache_tokens)
        self.bounds = Bounds(self.longest, vocabulary_size(self.model))

    def submit(self, request: Request, deliver: Deliver) -> None:
        self.bounds.check(request)
        self.served.check_task(request.handle, request.task)
        sampling = request.sampling
        matcher = None if sampling.json_schema is None else self.grammars.matcher(sampling.json_schema)
        # nothing but its end may follow a finished document
        ends = frozenset() if sampling.ignore_eos and matcher is None else self.ends
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        live = Live(request, deliver, ends | frozenset(sampling.stop_token_ids), seed, matcher)
        self.roster.enter(live)
        self._send(live)

    def cancel(self, request_id: str) -> None:
        if self.roster.ask_to_leave(request_id):
            self._wake()

    def score(self, prompt_ids: Sequence[int], handle: int, task: int | None, num_top: int) -> list[TokenLogprob]:
        self.bounds.check_prompt(prompt_ids, 0)
        self.served.check_task(handle, task)
        with self.paused(), torch.no_grad(), self._plain_attention():
            ids_1T = torch.tensor([list(prompt_ids)], device=self.model.device)
            self.served.begin_step(
                Step.of((Span(handle, 0, len(prompt_ids), task),), self.model.device),
                lambda stack: stack(input_ids=ids_1T, use_cache=False)[0],
            )
            try:
                logits_TV = self.model(input_ids=ids_1T, use_cache=False).logits[0]
            finally:
                self.served.begin_step(None)
            return logprobs_of(logits_TV, prompt_ids, num_top)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """One caller at a time. Not for the engine's own thread, on which events are delivered."""
        with self._alone, self._between_steps():
            yield
            if self.model.device.type != "cpu":  # the next step runs on another stream
                torch.accelerator.synchronize(self.model.device)

    def stop(self, drain_seconds: float) -> None:
        self.roster.refuse("the engine is stopping")
        if self.alive() and not self.roster.wait_until_empty(drain_seconds):
            self.roster.ask_all_to_leave()
            self._wake()
            self.roster.wait_until_empty(_LEAVING_SECONDS)
        self._end()
        self.roster.close("the engine stopped")

    @abstractmethod
    def _num_running(self) -> int: ...

    @abstractmethod
    def _send(self, live: Live) -> None:
        """It starts as soon as there is a place for it."""

    @abstractmethod
    def _wake(self) -> None:
        """Somebody is leaving: a step may not be due."""

    @abstractmethod
    def _between_steps(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def _plain_attention(self) -> AbstractContextManager[None]:
        """Within, the model may be called as anybody calls it."""

    @abstractmethod
    def _end(self) -> None:
        """No step runs after this."""
