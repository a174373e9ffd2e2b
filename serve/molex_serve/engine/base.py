"""The engine as the HTTP face sees it: requests go in, events come out, adapters change between steps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from molex_serve.errors import BadRequest

MOST_LOGPROBS = 20  # alternatives of a token, as in OpenAI's API
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 = the most likely; top_k 0 = all; logprobs: how many alternatives of each
    token, 0 = the chosen one alone, None = none; json_schema: what the text must conform to. Raises BadRequest."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    json_schema: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, 1 << 20),
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("top_k", 0, 1 << 30),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.01, 100.0),
            ("logprobs", 0, MOST_LOGPROBS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # a NaN is in no range
                raise BadRequest(f"{name}={value}; give a number from {low} to {high}")
        if self.top_p == 0:
            raise BadRequest("top_p=0 leaves no token to draw; give temperature=0 for the most likely one")


@dataclass(frozen=True, kw_only=True)
class Request:
    """handle, generation: whose adapter serves it, 0 and "" = the base. task: for mixtures that are routed by tasks.
    experts: its events say which expert had most weight for each token."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    handle: int = 0
    generation: str = ""
    task: int | None = None
    experts: bool = False


class TokenLogprob(NamedTuple):
    """top: the most likely tokens and their log-probabilities, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class ExpertShare(NamedTuple):
    """The expert that had most weight for a token over all layers, and its share of it."""

    name: str
    share: float


@dataclass(frozen=True)
class Event:
    """New tokens of a request. The first one has none, when the request's turn has come; the last one of every request,
    and no other, has a finish_reason."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    experts: tuple[ExpertShare | None, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


Deliver = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """running and waiting: requests. cache_free, cache_total: tokens of KV cache. steps, step_adapters: of the last
    step, how many different adapters. prefix_hits: prompt tokens that were not computed again."""

    running: int
    waiting: int
    cache_free: int
    cache_total: int
    steps: int
    step_adapters: int
    prefix_hits: int


class Engine(ABC):
    """Runs on a thread of its own from `start` to `stop`."""

    longest: int  # tokens of a prompt and its answer together
    two_passes: bool  # whether an adapter may look at the base's hidden states first

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self, drain_seconds: float) -> None:
        """Refuses new requests, lets running ones finish for so long, cancels the others."""

    @abstractmethod
    def submit(self, request: Request, deliver: Deliver) -> None:
        """deliver is called on the engine's thread. Raises BadRequest, Overloaded, Unavailable; then nothing is
        delivered."""

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Its last event comes within a step; nothing happens where it is over already."""

    @abstractmethod
    def score(self, prompt_ids: Sequence[int], handle: int, task: int | None, num_top: int) -> list[TokenLogprob]:
        """Log-probabilities of a prompt's own tokens, from the second on. Raises BadRequest, Unavailable."""

    @abstractmethod
    def paused(self) -> AbstractContextManager[None]:
        """Between two steps: here adapters are attached and detached."""

    @abstractmethod
    def stats(self) -> EngineStats: ...

    @abstractmethod
    def alive(self) -> bool: ...
