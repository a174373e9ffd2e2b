"""What Prometheus reads about adapters: where they are, how they came there, and what room is left for others."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from molex_serve.adapters.worker import Counts
from molex_serve.model.columns import ColumnPool
from molex_serve.model.experts import ExpertPool
from molex_serve.model.served import ServedModel


class Pools(Collector):
    """Asked at every scrape. counts: the residency's."""

    def __init__(self, counts: Callable[[], Counts], served: ServedModel):
        self.counts, self.served = counts, served

    def collect(self) -> Iterator[Metric]:
        yield from _of_residency(self.counts())
        yield from _of_columns(self.served.pool)
        if self.served.experts is not None:
            yield from _of_experts(self.served.experts)


def _of_residency(counts: Counts) -> Iterator[Metric]:
    hits = CounterMetricFamily("molex_adapter_hits", "Requests by where their adapter was found.", labels=["residency"])
    for level, number in counts.hits.items():
        hits.add_metric([level], number)
    yield hits
    yield CounterMetricFamily("molex_adapter_loads", "Adapters brought to the device.", counts.loads)
    yield CounterMetricFamily("molex_adapter_load_seconds", "Spent on that, readings included.", counts.load_seconds)
    yield CounterMetricFamily("molex_adapter_reads", "Adapters read from disk.", counts.reads)
    yield CounterMetricFamily("molex_adapter_failures", "Readings and loads that failed.", counts.failures)
    yield CounterMetricFamily("molex_adapter_evictions", "Adapters that left the device for others.", counts.evictions)
    yield GaugeMetricFamily("molex_adapters_resident", "Adapters on the device.", counts.resident)
    yield GaugeMetricFamily("molex_adapters_waiting", "Requests that wait for their adapter.", counts.waiting)
    yield GaugeMetricFamily("molex_adapters_draining", "Unloaded adapters that still serve requests.", counts.draining)
    yield GaugeMetricFamily("molex_adapter_host_bytes", "Of adapters kept in the host's memory.", counts.host_bytes)


def _of_columns(pool: ColumnPool) -> Iterator[Metric]:
    yield GaugeMetricFamily("molex_adapter_columns_free", "Ranks that low-rank adapters may take.", pool.num_free())
    yield GaugeMetricFamily("molex_adapter_columns_total", "Ranks of all low-rank adapters.", pool.num_columns)
    yield GaugeMetricFamily("molex_low_rank_bytes", "Of low-rank adapters on the device.", pool.committed_bytes())


def _of_experts(pool: ExpertPool) -> Iterator[Metric]:
    yield GaugeMetricFamily("molex_expert_slots_free", "Of the layer that has fewest.", pool.free_slots())
    yield GaugeMetricFamily("molex_expert_slots_total", "Of each layer, beside the base's.", pool.num_slots)
    yield GaugeMetricFamily("molex_expert_bytes", "Of all experts, the base's too.", pool.committed_bytes())
    yield GaugeMetricFamily("molex_step_experts", "Different ones in a layer's last rerouted step.", pool.distinct())
