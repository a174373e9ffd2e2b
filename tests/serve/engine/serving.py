"""What the engine's tests share: a model whose adapters are known, and listeners.

An adapter here is a vector that is added to the embeddings of its tokens (and another one for each task), so one
wrong handle on one token changes what comes out.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from molex.workbench.tokenizer import build_tokenizer
from molex_serve.engine.base import Engine, Event, Request, Sampling
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.errors import BadRequest
from molex_serve.model.routed import Attribution
from molex_serve.model.step import FirstPass, Step
from molex_serve.settings import EngineSettings
from tests.models import tiny

NUM_HANDLES = 9
SECONDS = 20.0

ROOMY = EngineSettings(cache_tokens=1024, page_tokens=4, step_tokens=64)
CHUNKED = EngineSettings(cache_tokens=1024, page_tokens=4, step_tokens=8)
CRAMPED = EngineSettings(cache_tokens=96, page_tokens=4, step_tokens=16)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


class Adapted:
    """A model with such adapters, as an engine takes it; `steps` is what it was told."""

    def __init__(self, name: str = "llama", model: PreTrainedModel | None = None):
        self.model = model or tiny(name)
        self.steps: list[Step] = []
        embeddings = self.model.get_input_embeddings()
        width = embeddings.weight.shape[1]
        generator = torch.Generator().manual_seed(5)
        self.handle_vectors = 0.3 * torch.randn(NUM_HANDLES, width, generator=generator)
        self.handle_vectors[0] = 0
        self.task_vectors = 0.3 * torch.randn(4, width, generator=generator)
        self._now: Step | None = None
        self._always: tuple[int, int | None] | None = None
        embeddings.register_forward_hook(self._add)

    def begin_step(self, step: Step | None, first_pass: FirstPass | None = None) -> None:
        self._now = step
        if step is not None:
            self.steps.append(step)

    def attribution(self, handle: int) -> Attribution | None:
        return None

    def check_task(self, handle: int, task: int | None) -> None:
        if task is not None and task >= len(self.task_vectors):
            raise BadRequest(f"task={task}")

    @property
    def num_fed(self) -> int:
        return sum(len(step.handles) for step in self.steps)

    def _add(self, module: nn.Module, args: object, embedded_BTD: Tensor) -> Tensor:
        if self._always is not None:
            handle, task = self._always
            return embedded_BTD + self.handle_vectors[handle] + (0 if task is None else self.task_vectors[task])
        if self._now is None:
            return embedded_BTD
        added_TD = self.handle_vectors[self._now.handles]
        for span in self._now.spans:
            if span.task is not None:
                added_TD[span.start : span.stop] += self.task_vectors[span.task]
        return embedded_BTD + added_TD

    @contextmanager
    def alone(self, handle: int, task: int | None = None) -> Iterator[None]:
        self._always = handle, task
        try:
            yield
        finally:
            self._always = None

    def generate(self, request: Request) -> list[int]:
        """What transformers' own generate says, for this adapter alone."""
        with self.alone(request.handle, request.task), torch.no_grad():
            ids = self.model.generate(
                torch.tensor([request.prompt_ids]), max_new_tokens=request.sampling.max_tokens, do_sample=False
            )
        return ids[0, len(request.prompt_ids) :].tolist()

    def engine(self, settings: EngineSettings = ROOMY, **options: bool) -> ContinuousEngine:
        return ContinuousEngine(self, tokenizer(), settings, **options)


def prompt(length: int, seed: int = 0, vocabulary: int = 64) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())


def greedy(name: str, length: int, handle: int = 0, new: int = 10, task: int | None = None, seed: int = 0) -> Request:
    return Request(
        id=name,
        prompt_ids=prompt(length, seed),
        sampling=Sampling(max_tokens=new, temperature=0),
        handle=handle,
        generation=f"generation{handle}" if handle else "",
        task=task,
    )


def mixed(number: int, new: int = 10) -> list[Request]:
    """Requests of all adapters and the base, of different lengths."""
    return [greedy(str(i), 3 + 5 * i % 29, i % NUM_HANDLES, new, seed=i) for i in range(number)]


class Listener:
    """Collects a request's events, and checks that the first one has no tokens, and the last one is the last and the
    only one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.started, self.over = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.over.is_set(), f"{event} came after the last event"
        assert self.events or not event.token_ids, f"{event} came before the request's turn"
        self.events.append(event)
        if event.token_ids:
            self.started.set()
        if event.finish_reason is not None:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]

    @property
    def reason(self) -> str | None:
        return self.events[-1].finish_reason

    def wait(self) -> "Listener":
        assert self.over.wait(SECONDS), "no last event came"
        return self


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0)


def submit(engine: Engine, requests: Iterable[Request]) -> list[Listener]:
    listeners = []
    for request in requests:
        listeners.append(Listener())
        engine.submit(request, listeners[-1])
    return listeners


def serve(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens of each, after all were submitted at once and came to their ends."""
    return [listener.wait().tokens for listener in submit(engine, requests)]
