"""Prometheus metrics: one table of definitions, each shown under our name and under the one dashboards know.

Labels are the model's name, the engine's number and words of our own: nothing a caller sends.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from xllm.core.output import Finish, RequestMetrics, RequestOutput
from xllm.core.stats import SchedulerStats

OWN_PREFIX = "xllm:"
PREFIXES = (OWN_PREFIX, "vllm:")
CONTENT_TYPE = CONTENT_TYPE_LATEST

_SHORT = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
)
_LONG = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.0,
    3.0,
    5.0,
    7.5,
    10.0,
    15.0,
    30.0,
    60.0,
    120.0,
    300.0,
    900.0,
)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Definition:
    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()  # besides model_name and engine
    buckets: tuple[float, ...] = ()


# what is read off the engine's snapshot at every scrape: metric -> attribute of `SchedulerStats`
FROM_STATS = {
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
    "kv_cache_usage_perc": "kv_usage",
    "prefix_cache_queries": "prefix_queried_tokens",
    "prefix_cache_hits": "prefix_hit_tokens",
    "num_preemptions": "preemptions",
    "steps": "executor.steps",
    "graph_steps": "executor.graph_steps",
    "graph_capture_failures": "executor.graph_failures",
    "device_seconds": "executor.device_s",
    "device_bubble_seconds": "executor.bubble_s",
    "kv_event_batches": "kv_events.batches",
    "kv_event_batches_dropped": "kv_events.dropped",
}

# KV from and to other engines: metric -> attribute of `PeerStats`
FROM_PEERS = {
    "kv_peer_fetching": "fetching",
    "kv_peer_providing": "providing",
    "kv_peer_fetches": "fetches",
    "kv_peer_fetched_blocks": "fetched_blocks",
    "kv_peer_fetched_bytes": "fetched_bytes",
    "kv_peer_fetch_seconds": "fetch_s",
    "kv_peer_provisions": "provisions",
    "kv_peer_provided_blocks": "provided_blocks",
    "kv_peer_provision_failures": "provision_failures",
}

# the same for each tier of KV below the device: metric -> attribute of `TierStats`
FROM_TIERS = {
    "kv_tier_blocks": "capacity",
    "kv_tier_used_blocks": "used",
    "kv_tier_hits": "hits",
    "kv_tier_stored": "stored",
    "kv_tier_evictions": "evicted",
    "kv_tier_failures": "failures",
    "kv_tier_skipped": "skipped",
}

# of an elastic KV pool: metric -> attribute of `SegmentStats`
FROM_SEGMENTS = {
    "kv_segments": "capacity",
    "kv_segments_mapped": "mapped",
    "kv_segments_grown": "grown",
    "kv_segments_shrunk": "shrunk",
    "kv_segments_refused": "refused",
}

# of a contiguous KV pool: metric -> attribute of `PlaceStats`
FROM_PLACES = {
    "kv_places_shown": "places",
    "kv_places_mapped": "mapped",
    "kv_places_cleared": "cleared",
    "kv_places_refused": "refused",
    "kv_places_waits": "waited",
    "kv_places_decode_waits": "waited_decoding",
    "kv_places_wait_seconds": "waited_s",
    "kv_places_mapping_seconds": "seconds",
}

_TIER = ("tier",)
_CACHE_LABELS = ("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype")
_LORA_LABELS = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")

DEFINITIONS = (
    Definition("num_requests_running", Gauge, "Sequences that hold a slot of the batch"),
    Definition("num_requests_waiting", Gauge, "Sequences that wait to be scheduled"),
    Definition("kv_cache_usage_perc", Gauge, "Share of the KV blocks in use, 0 to 1"),
    Definition("prefix_cache_queries", Counter, "Prompt tokens looked up in the prefix cache"),
    Definition("prefix_cache_hits", Counter, "Prompt tokens found in the prefix cache"),
    Definition("num_preemptions", Counter, "Times a running sequence gave up its blocks"),
    Definition("prompt_tokens", Counter, "Prompt tokens of requests that ended"),
    Definition("generation_tokens", Counter, "Tokens generated"),
    Definition("request_success", Counter, "Completions that ended, by reason", ("finished_reason",)),
    Definition("time_to_first_token_seconds", Histogram, "Arrival to first token", (), _LONG),
    Definition("inter_token_latency_seconds", Histogram, "Between two tokens of a sequence", (), _SHORT),
    Definition(
        "request_time_per_output_token_seconds", Histogram, "Mean time per token after the first", (), _SHORT
    ),
    Definition("e2e_request_latency_seconds", Histogram, "Arrival to last token", (), _LONG),
    Definition("request_queue_time_seconds", Histogram, "Arrival to first scheduled", (), _LONG),
    Definition("request_prefill_time_seconds", Histogram, "First scheduled to first token", (), _LONG),
    Definition("request_decode_time_seconds", Histogram, "First token to last token", (), _LONG),
    Definition(
        "iteration_tokens_total", Histogram, "Tokens of an engine step, sampled each second", (), _TOKENS
    ),
    Definition(
        "cache_config_info", Gauge, "The KV cache as configured; the value is always 1", _CACHE_LABELS
    ),
    Definition("lora_requests_info", Gauge, "LoRA adapters in use; none can be loaded yet", _LORA_LABELS),
    Definition("spec_decode_num_drafts", Counter, "Drafts made by speculative decoding"),
    Definition("spec_decode_num_draft_tokens", Counter, "Tokens in those drafts"),
    Definition("spec_decode_num_accepted_tokens", Counter, "Draft tokens the model agreed with"),
    # ours alone: shown under no other name
    Definition("steps", Counter, "Steps of the engine"),
    Definition("graph_steps", Counter, "Of those, replayed as one device graph"),
    Definition(
        "graph_capture_failures", Counter, "Graphs that could not be captured; those steps run eagerly"
    ),
    Definition("device_seconds", Counter, "Seconds the device spent on steps"),
    Definition("device_bubble_seconds", Counter, "Seconds the device waited between steps while it had work"),
    Definition("kv_event_batches", Counter, "Batches of KV cache events published"),
    Definition(
        "kv_event_batches_dropped", Counter, "Batches of KV cache events that nobody can get any more"
    ),
    Definition("kv_peer_fetching", Gauge, "Requests that wait for KV from another instance"),
    Definition("kv_peer_providing", Gauge, "Prompts whose KV is computed or held for other instances"),
    Definition("kv_peer_fetches", Counter, "Times KV was fetched from another instance"),
    Definition("kv_peer_fetched_blocks", Counter, "KV blocks that came from other instances"),
    Definition("kv_peer_fetched_bytes", Counter, "Bytes of those"),
    Definition("kv_peer_fetch_seconds", Counter, "Seconds that requests waited for them, one by one"),
    Definition("kv_peer_fetch_failures", Counter, "Fetches that brought less than was wanted", ("reason",)),
    Definition("kv_peer_provisions", Counter, "Prompts whose KV other instances asked for"),
    Definition("kv_peer_provided_blocks", Counter, "KV blocks that other instances took"),
    Definition("kv_peer_provision_failures", Counter, "Of the prompts, those of which not all was taken"),
    Definition("kv_tier_blocks", Gauge, "KV blocks that a tier below the device can hold", _TIER),
    Definition("kv_tier_used_blocks", Gauge, "Of those, in use", _TIER),
    Definition("kv_tier_hits", Counter, "KV blocks that were loaded instead of computed", _TIER),
    Definition("kv_tier_stored", Counter, "KV blocks that a tier took in", _TIER),
    Definition("kv_tier_evictions", Counter, "KV blocks it gave up for others", _TIER),
    Definition("kv_tier_failures", Counter, "KV blocks it could not keep or give back sound", _TIER),
    Definition("kv_tier_skipped", Counter, "KV blocks it had no room or no time for at that moment", _TIER),
    Definition("kv_segments", Gauge, "Segments of memory that an elastic KV pool could have"),
    Definition("kv_segments_mapped", Gauge, "Of those, with memory"),
    Definition("kv_segments_grown", Counter, "Times a segment got memory"),
    Definition("kv_segments_shrunk", Counter, "Times a segment gave it back"),
    Definition("kv_segments_refused", Counter, "Times there was no memory for a segment"),
    Definition("kv_places_shown", Gauge, "Places in the address ranges of sequences where a KV page lies"),
    Definition("kv_places_mapped", Counter, "Times a KV page was mapped there"),
    Definition("kv_places_cleared", Counter, "Times one was taken away"),
    Definition("kv_places_refused", Counter, "Times the system could not map one"),
    Definition("kv_places_waits", Counter, "Steps that waited for a KV page to be mapped"),
    Definition("kv_places_decode_waits", Counter, "Of these, steps that brought nobody new"),
    Definition("kv_places_wait_seconds", Counter, "How long they waited"),
    Definition("kv_places_mapping_seconds", Counter, "Seconds spent mapping, beside the steps"),
)
_OURS = frozenset(
    {
        "steps",
        "graph_steps",
        "graph_capture_failures",
        "device_seconds",
        "device_bubble_seconds",
        "kv_event_batches",
        "kv_event_batches_dropped",
        "kv_peer_fetch_failures",
        *FROM_PEERS,
        *FROM_TIERS,
        *FROM_SEGMENTS,
        *FROM_PLACES,
    }
)


class Metrics:
    def __init__(self, model: str, cache: dict[str, str]):
        self._registry = CollectorRegistry()
        self._common = {"model_name": model, "engine": "0"}
        self._by_name = {d.name: self._make(d) for d in DEFINITIONS}
        self._totals: dict[str, float] = {}  # the engine's, as of the last scrape
        self._labelled("cache_config_info", **cache).set(1)
        self._labelled(
            "lora_requests_info", max_lora="0", running_lora_adapters="", waiting_lora_adapters=""
        ).set(0)
        for reason in Finish:
            self._labelled("request_success", finished_reason=reason.value)
        self._shown = CollectorRegistry()
        for prefix in PREFIXES:
            self._shown.register(_Renamed(self._registry, prefix))

    def meter(self) -> "Meter":
        return Meter(self)

    def add(self, collector: Collector) -> None:
        """Shown with the rest, under its own names."""
        self._shown.register(collector)

    def text(self, stats: SchedulerStats | None) -> bytes:
        """The page that a scrape gets; with `stats` None the engine's last known figures."""
        if stats is not None:
            self._read(stats)
        return generate_latest(self._shown)

    def sample_step(self, stats: SchedulerStats) -> None:
        if stats.step_tokens and stats.running:
            self._by_name["iteration_tokens_total"].observe(stats.step_tokens)

    def token_gap(self, seconds: float, tokens: int) -> None:
        """`tokens` tokens of a sequence came `seconds` after the one before them."""
        histogram = self._by_name["inter_token_latency_seconds"]
        for _ in range(tokens):
            histogram.observe(seconds / tokens)

    def request_ended(self, meter: "Meter", prompt_tokens: int) -> None:
        self._by_name["prompt_tokens"].inc(prompt_tokens)
        self._by_name["generation_tokens"].inc(meter.tokens)
        for reason in meter.reasons:
            self._labelled("request_success", finished_reason=reason).inc()
        if meter.metrics is not None:
            for name, seconds in _times(meter.metrics, meter.longest):
                self._by_name[name].observe(max(0.0, seconds))

    def _read(self, stats: SchedulerStats) -> None:
        for name, attribute in FROM_STATS.items():
            self._tell(self._by_name[name], name, float(attrgetter(attribute)(stats)))
        for tier in stats.tiers:
            label = tier.medium.lower()
            for name, attribute in FROM_TIERS.items():
                self._tell(
                    self._labelled(name, tier=label), f"{name} {label}", float(getattr(tier, attribute))
                )

        for reason, failures in stats.peers.failures.items():
            name = "kv_peer_fetch_failures"
            self._tell(self._labelled(name, reason=reason), f"{name} {reason}", float(failures))
        parts = (
            (stats.peers, FROM_PEERS),
            (stats.segments, FROM_SEGMENTS),
            (stats.executor.places, FROM_PLACES),
        )
        for part, found in parts:
            for name, attribute in found.items() if part is not None else ():
                self._tell(self._by_name[name], name, float(getattr(part, attribute)))

    def _tell(self, metric: Any, key: str, value: float) -> None:
        if isinstance(metric, Gauge):
            metric.set(value)
        else:  # the engine's total starts anew with a new engine
            metric.inc(max(0.0, value - self._totals.get(key, 0.0)))
            self._totals[key] = value

    def _make(self, d: Definition) -> Any:
        """The metric where it has labels of its own, else its one child, shown as zero from the start."""
        name, labels = "xllm:" + d.name, (*self._common, *d.labels)
        more: dict[str, Any] = {"buckets": d.buckets} if d.kind is Histogram else {}
        made = d.kind(name, d.help, labels, registry=self._registry, **more)
        return made if d.labels else made.labels(**self._common)

    def _labelled(self, name: str, **labels: str) -> Any:
        return self._by_name[name].labels(**self._common, **labels)


def _times(times: RequestMetrics, tokens: int) -> Iterator[tuple[str, float]]:
    """(histogram, seconds) of a request whose longest completion has `tokens` tokens."""
    if times.queued_s is not None:
        yield "request_queue_time_seconds", times.queued_s
    if times.prefill_s is not None:
        yield "request_prefill_time_seconds", times.prefill_s
    if times.first_token is None:
        return
    yield "time_to_first_token_seconds", times.first_token - times.arrival
    if times.finished is None:
        return
    decode_s = times.finished - times.first_token
    yield "e2e_request_latency_seconds", times.finished - times.arrival
    yield "request_decode_time_seconds", decode_s
    if tokens > 1:
        yield "request_time_per_output_token_seconds", decode_s / (tokens - 1)


class Meter:
    """What one engine request did, as its outputs go by. Reported once, at its end, however it ends."""

    def __init__(self, owner: Metrics):
        self._owner = owner
        self._last: dict[int, float] = {}  # completion index -> when its newest token came
        self._counts: dict[int, int] = {}
        self.tokens = 0
        self.reasons: list[str] = []
        self.metrics: RequestMetrics | None = None

    @property
    def longest(self) -> int:
        return max(self._counts.values(), default=0)

    def saw(self, output: RequestOutput) -> None:
        self.metrics = output.metrics
        now = time.monotonic()
        for completion in output.outputs:
            count, index = len(completion.token_ids), completion.index
            if count:
                self.tokens += count
                self._counts[index] = self._counts.get(index, 0) + count
                if index in self._last:
                    self._owner.token_gap(now - self._last[index], count)
                self._last[index] = now
            if completion.finish_reason is not None:
                self.reasons.append(completion.finish_reason)

    def ended(self, prompt_tokens: int) -> None:
        self._owner.request_ended(self, prompt_tokens if self.metrics is not None else 0)


class _Renamed(Collector):
    """A registry's metrics under another prefix."""

    def __init__(self, registry: CollectorRegistry, prefix: str):
        self._registry = registry
        self._prefix = prefix

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            if self._prefix != OWN_PREFIX and metric.name.partition(":")[2] in _OURS:
                continue
            copy = Metric(self._name(metric.name), metric.documentation, metric.type, metric.unit)
            copy.samples = [
                Sample(self._name(s.name), *s[1:]) for s in metric.samples if not s.name.endswith("_created")
            ]
            yield copy

    def _name(self, name: str) -> str:
        return self._prefix + name.partition(":")[2]
