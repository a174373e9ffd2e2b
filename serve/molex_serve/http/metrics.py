"""What Prometheus reads at /metrics: how long clients wait, how requests end, and how full engine and adapters are."""

from collections.abc import Iterator
from contextlib import suppress

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from molex_serve.engine.base import Engine
from molex_serve.http.ports import Adapters

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
router = APIRouter()


class Metrics:
    """Times and counts of requests, by adapter: its alias, or the base's name. A registry of its own, so that two
    servers in one process do not meet."""

    def __init__(self, engine: Engine, adapters: Adapters):
        self.registry = CollectorRegistry()
        self.responses = self._counter("responses", "Responses by route and status.", "route", "status")
        self.cancelled = self._counter("cancelled", "Requests whose client left before their end.", "adapter")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.", "adapter")
        self.new_tokens = self._counter("new_tokens", "Tokens that were generated.", "adapter")
        self.lease = self._histogram("adapter_wait_seconds", "Until the adapter was on the device.")
        self.queue = self._histogram("queue_seconds", "From the engine's queue to the first step.")
        self.first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self.next_token = self._histogram("time_per_output_token_seconds", "Between tokens, averaged over a request.")
        self.registry.register(_Scraped(engine, adapters))

    def register(self, collector: Collector) -> None:
        """More figures that are collected at every scrape."""
        self.registry.register(collector)

    def forget(self, adapter: str) -> None:
        """Drops the series of an adapter that is gone, so that they do not pile up."""
        for metric in (self.cancelled, self.prompt_tokens, self.new_tokens, self.lease, self.queue):
            with suppress(KeyError):
                metric.remove(adapter)
        for metric in (self.first_token, self.next_token):
            with suppress(KeyError):
                metric.remove(adapter)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"molex_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"molex_{name}", meaning, ["adapter"], registry=self.registry, buckets=_SECONDS)


class _Scraped(Collector):
    """What the engine and the adapters know themselves, asked when Prometheus asks."""

    def __init__(self, engine: Engine, adapters: Adapters):
        self.engine, self.adapters = engine, adapters

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("molex_engine_alive", "1 while steps can run.", float(self.engine.alive()))
        stats = self.engine.stats()
        yield GaugeMetricFamily("molex_requests_running", "Requests in steps.", stats.running)
        yield GaugeMetricFamily("molex_requests_waiting", "Requests in the queue.", stats.waiting)
        yield GaugeMetricFamily("molex_cache_tokens_free", "Tokens that the KV cache has room for.", stats.cache_free)
        yield GaugeMetricFamily("molex_cache_tokens_total", "Tokens that the KV cache holds.", stats.cache_total)
        yield GaugeMetricFamily("molex_step_adapters", "Different adapters in the last step.", stats.step_adapters)
        yield CounterMetricFamily("molex_steps", "Forward passes.", stats.steps)
        yield CounterMetricFamily("molex_prefix_hit_tokens", "Prompt tokens taken from the cache.", stats.prefix_hits)
        yield self._residency()

    def _residency(self) -> Metric:
        labels = ["adapter", "kind", "residency", "pinned"]
        resident = GaugeMetricFamily("molex_adapter_bytes", "Of each adapter, and where it is.", labels=labels)
        for known in self.adapters.listing():
            pinned = str(known.pinned).lower()
            resident.add_metric([known.alias, known.kind, known.residency, pinned], known.num_bytes)
        return resident


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    face = request.app.state.face
    return Response(await face.waiting(face.metrics.text), media_type=CONTENT_TYPE)
