"""How long an HTTP request waited for what, as its metrics."""

import time
from dataclasses import dataclass, field

from molex_serve.engine.base import Event
from molex_serve.http.metrics import Metrics


@dataclass
class Timing:
    """Of one HTTP request to one adapter, with one or several requests in the engine.

    A request's first event says that its turn has come: by it the wait in the queue is known.
    """

    metrics: Metrics
    adapter: str
    begun: float = field(default_factory=time.perf_counter)
    queued: float = 0.0
    started: set[int] = field(default_factory=set)
    first: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def ready(self) -> None:
        """The adapter is there."""
        self.metrics.lease.labels(self.adapter).observe(time.perf_counter() - self.begun)

    def submitted(self) -> None:
        """The engine gets to know of it now."""
        self.queued = time.perf_counter()

    def arrived(self, index: int, event: Event) -> None:
        now = time.perf_counter()
        if not event.token_ids:
            if event.finish_reason is None and index not in self.first:
                self.metrics.queue.labels(self.adapter).observe(now - self.queued)
        elif index not in self.first:
            self.first[index] = now
            self.metrics.first_token.labels(self.adapter).observe(now - self.begun)
        self.counts[index] = self.counts.get(index, 0) + len(event.token_ids)
        if event.finish_reason is not None and self.counts[index] > 1:
            spent = now - self.first[index]
            self.metrics.next_token.labels(self.adapter).observe(spent / (self.counts[index] - 1))

    def closed(self, prompt_tokens: int, new_tokens: int, cancelled: bool) -> None:
        self.metrics.prompt_tokens.labels(self.adapter).inc(prompt_tokens)
        self.metrics.new_tokens.labels(self.adapter).inc(new_tokens)
        if cancelled:
            self.metrics.cancelled.labels(self.adapter).inc()
