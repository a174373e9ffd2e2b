"""The metrics of all replicas as one page, each figure with its replica's name."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class Merged(Collector):
    """texts: a replica's figures, by its name."""

    def __init__(self, texts: Mapping[str, str]):
        self.texts = texts

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        yield from merged.values()


def merged(texts: Mapping[str, str]) -> bytes:
    registry = CollectorRegistry()
    registry.register(Merged(texts))
    return generate_latest(registry)
