"""The engine for models that continuous batching refuses, such as state-space ones; and what tests compare it with.

Every request is computed on its own by the model's own forward with the cache that the model makes, so there is
no padding, no page and no mask to get wrong. Running requests take turns, a token each.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molex.errors import BackendError
from molex_serve.engine.attribution import attributed
from molex_serve.engine.base import EngineStats, FinishReason
from molex_serve.engine.common import AdaptedModel, RosterEngine, keeps_logits
from molex_serve.engine.logprobs import Logprobs
from molex_serve.engine.roster import Live
from molex_serve.engine.sampling import Row, draw, pack
from molex_serve.errors import ServeError
from molex_serve.model.step import BASE, Span, Step
from molex_serve.settings import EngineSettings

logger = logging.getLogger("molex")

_CACHES = ("past_key_values", "cache_params", "state", "mems")  # what models call theirs


@dataclass(eq=False)
class _Sequence:
    live: Live
    tokens: list[int]
    cache: dict[str, Any] = field(default_factory=dict)
    first_cache: dict[str, Any] = field(default_factory=dict)  # of the first pass
    num_fed: int = 0

    @property
    def num_tokens(self) -> int:
        """That it may have in the end."""
        return len(self.live.request.prompt_ids) + self.live.request.sampling.max_tokens


class StaticEngine(RosterEngine):
    """`cache_tokens` and `step_requests` bound which requests run at a time; a step is a token of each."""

    two_passes = True

    def __init__(self, served: AdaptedModel, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings):
        self._set_up(served, tokenizer, settings)
        self._bound(settings.cache_tokens)
        self._arrivals: SimpleQueue[_Sequence] = SimpleQueue()
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._num_steps = self._num_adapters = 0
        self._turn, self._pausing = threading.Condition(), False  # who has it may call the model
        self._due = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._loop, name="molex-static-engine")
        self._last_logits: dict[str, Any] = {"logits_to_keep": 1} if keeps_logits(self.model) else {}

    def start(self) -> None:
        self.roster.open()
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def stats(self) -> EngineStats:
        used = sum(sequence.num_tokens for sequence in list(self._running))
        return EngineStats(
            running=len(self._running),
            waiting=max(0, len(self.roster) - len(self._running)),
            cache_free=self.settings.cache_tokens - used,
            cache_total=self.settings.cache_tokens,
            steps=self._num_steps,
            step_adapters=self._num_adapters,
            prefix_hits=0,
        )

    def _loop(self) -> None:
        try:
            while not self._ending:
                with self._turn:
                    self._turn.wait_for(lambda: not self._pausing)
                    self._step()
                if not self._running and not self._waiting:
                    self._due.wait()
                self._due.clear()
            self.roster.close("the engine stopped")
        except Exception as error:
            logger.exception("the engine failed")
            self._running.clear()
            self.roster.close(f"the engine failed: {error}")

    @torch.no_grad()
    def _step(self) -> None:
        while not self._arrivals.empty():
            self._waiting.append(self._arrivals.get())
        self._let_go()
        while self._waiting and self._fits(self._waiting[0]):
            self._running.append(self._waiting.popleft())
            self.roster.begin(self._running[-1].live)
        self._num_adapters = len({sequence.live.request.handle for sequence in self._running} - {BASE})
        self._num_steps += bool(self._running)
        for sequence in tuple(self._running):
            try:
                self._advance(sequence)
            except ServeError as error:  # of this request alone
                self._running.remove(sequence)
                self.roster.finish(sequence.live, "error", str(error))

    def _let_go(self) -> None:
        leaving = [sequence for sequence in (*self._running, *self._waiting) if sequence.live.leaving]
        for sequence in leaving:
            (self._running if sequence in self._running else self._waiting).remove(sequence)
            self.roster.finish(sequence.live, "cancelled")

    def _fits(self, sequence: _Sequence) -> bool:
        used = sum(other.num_tokens for other in self._running)
        places = len(self._running) < self.settings.step_requests
        return places and used + sequence.num_tokens <= self.settings.cache_tokens

    def _advance(self, sequence: _Sequence) -> None:
        live, request = sequence.live, sequence.live.request
        logits_1V = self._forward(sequence)
        position, num_prompt = len(sequence.tokens), len(request.prompt_ids)
        row = Row(request.sampling, live.seed, position, sequence.tokens, num_prompt, matcher=live.matcher)
        last_1 = torch.tensor(sequence.tokens[-1:], device=logits_1V.device)
        drawn_1V = draw(logits_1V, last_1, pack([row]).to(logits_1V.device), [row])
        token_1 = drawn_1V.argmax(dim=-1)
        if request.sampling.logprobs is not None:
            live.logprobs[position] = Logprobs(logits_1V, token_1, request.sampling.logprobs), 0
        sequence.tokens.append(int(token_1))
        reason = _finish_reason(sequence)
        if reason is not None:
            self._running.remove(sequence)
        self.roster.advance(live, sequence.tokens[-1:], reason)

    def _forward(self, sequence: _Sequence) -> Tensor:
        """(1, V) the logits after a sequence's tokens, of which it feeds those that the cache lacks."""
        request, tokens = sequence.live.request, sequence.tokens[sequence.num_fed :]
        ids_1T = torch.tensor([tokens], device=self.model.device)
        step = Step.of((Span(request.handle, 0, len(tokens), request.task),), self.model.device)
        self.served.begin_step(step, partial(self._first_pass, sequence, ids_1T))
        try:
            outputs = self.model(input_ids=ids_1T, use_cache=True, **sequence.cache, **self._last_logits)
        finally:
            self.served.begin_step(None)
        sequence.cache = _cache_of(outputs)
        sequence.num_fed = len(sequence.tokens)
        if request.experts:
            for place in attributed(self.served.attribution, step, [len(tokens)]).values():
                sequence.live.experts[sequence.num_fed] = place
        return outputs.logits[:, -1].float()

    def _first_pass(self, sequence: _Sequence, ids_1T: Tensor, stack: nn.Module) -> Tensor:
        """(1, T, D) last hidden states of what is about to be fed."""
        outputs = stack(input_ids=ids_1T, use_cache=True, **sequence.first_cache)
        sequence.first_cache = _cache_of(outputs)
        return outputs[0]

    def _num_running(self) -> int:
        return len(self._running)

    def _send(self, live: Live) -> None:
        self._arrivals.put(_Sequence(live, list(live.request.prompt_ids)))
        self._due.set()

    def _wake(self) -> None:
        self._due.set()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        self._pausing = True
        with self._turn:
            try:
                yield
            finally:
                self._pausing = False
                self._turn.notify_all()

    def _plain_attention(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _end(self) -> None:
        self._ending = True
        self._due.set()
        if self._thread.is_alive():
            self._thread.join()


def _cache_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """To be passed with the next tokens."""
    cache = {name: outputs[name] for name in _CACHES if name in outputs}
    if not cache:
        raise BackendError("this model returns no cache by a known name, so it can only be called as a whole")
    return cache


def _finish_reason(sequence: _Sequence) -> FinishReason | None:
    if sequence.tokens[-1] in sequence.live.ends:
        return "stop"
    return "length" if len(sequence.tokens) == sequence.num_tokens else None
