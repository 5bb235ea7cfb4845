"""Metrics of a router: its instances as it sees them, and what it did with requests."""

from collections import Counter
from collections.abc import Iterable

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from xllm.cluster.client import ClusterClient

STATES = ("serving", "draining", "leaving", "away", "stalled")


class RouterMetrics(Collector):
    """Read off the client at every scrape. Labels are the model's name, ids of instances and words of our own."""

    def __init__(self, client: ClusterClient, model: str):
        self._client = client
        self._model = model

    def describe(self) -> Iterable[Metric]:
        return []  # or registering would collect

    def collect(self) -> Iterable[Metric]:
        instances, counts = self._client.instances(), self._client.counts
        yield self._gauge(
            "instances", "Instances by how they stand", "state",
            dict.fromkeys(STATES, 0) | Counter(instance.state for instance in instances),
        )  # fmt: skip
        yield self._gauge(
            "instance_requests", "Requests of this router there", "instance", {i.id: i.requests for i in instances}
        )  # fmt: skip
        yield self._gauge(
            "instance_kv_usage", "Share of its KV blocks in use", "instance", {i.id: i.kv_usage for i in instances}
        )  # fmt: skip
        yield self._gauge(
            "instance_cached_blocks", "KV blocks on the device that this router knows of", "instance",
            {i.id: i.cached_blocks[0] for i in instances},
        )  # fmt: skip
        yield self._counter("requests", "Requests that an instance was found for", counts.requests)
        yield self._counter("moves", "Times a request went on at another instance", counts.moves)
        yield self._counter("refused", "Requests that nobody could take", counts.refused)
        yield self._counter("failed", "Requests that ended with an error of an instance", counts.failed)
        sent = CounterMetricFamily(
            "xllm:router_instance_sent", "Requests sent to an instance", labels=("model_name", "instance")
        )
        for id, number in counts.by_instance.items():
            sent.add_metric((self._model, id), number)
        yield sent

    def _gauge(self, name: str, help: str, label: str, values: "dict[str, int] | dict[str, float]") -> Metric:
        made = GaugeMetricFamily("xllm:router_" + name, help, labels=("model_name", label))
        for key, value in values.items():
            made.add_metric((self._model, key), value)
        return made

    def _counter(self, name: str, help: str, value: int) -> Metric:
        made = CounterMetricFamily("xllm:router_" + name, help, labels=("model_name",))
        made.add_metric((self._model,), value)
        return made
