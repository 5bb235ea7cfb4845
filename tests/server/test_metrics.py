"""/metrics: every name under both prefixes from one table, and values that follow what happened."""

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_page

from tests.server.live import until
from xllm.core.output import CompletionOutput, RequestMetrics, RequestOutput
from xllm.core.places import PlaceStats
from xllm.core.stats import EventStats, ExecutorStats, SchedulerStats
from xllm.core.transfer import TierStats
from xllm.server.metrics import DEFINITIONS, PREFIXES, Metrics
from xllm.server.stats_log import line, worked

CONVENTIONS = """num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits
num_preemptions prompt_tokens generation_tokens request_success time_to_first_token_seconds inter_token_latency_seconds
request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds
request_prefill_time_seconds request_decode_time_seconds iteration_tokens_total cache_config_info lora_requests_info
spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens""".split()


def samples(text, name):
    return {
        tuple(sorted(s.labels.items())): s.value
        for family in parse_page(text)
        for s in family.samples
        if s.name == name
    }


def value(text, name, **labels):
    found = [v for k, v in samples(text, name).items() if labels.items() <= dict(k).items()]
    assert len(found) == 1, (name, found)
    return found[0]


def test_every_name_under_both_prefixes_before_anything_happened():
    names = [d.name for d in DEFINITIONS]
    assert names[: len(CONVENTIONS)] == CONVENTIONS
    page = Metrics(
        "m", {"block_size": "16", "num_gpu_blocks": "4", "enable_prefix_caching": "True", "cache_dtype": "f"}
    )
    families = {family.name: family for family in parse_page(page.text(None).decode())}
    for prefix in PREFIXES:
        for name in CONVENTIONS:
            family = families[prefix + name]
            assert family.documentation
            assert family.samples, family.name
            for sample in family.samples:
                assert sample.labels["model_name"] == "m"
                assert sample.labels["engine"] == "0"
    assert not any("_created" in s.name for f in families.values() for s in f.samples)
    for name in names[len(CONVENTIONS) :]:  # what only we have is not called by others' names
        assert "xllm:" + name in families
        assert "vllm:" + name not in families


def test_every_tier_of_kv_has_its_own_figures():
    def stats(hits, used):
        host = TierStats("CPU", 10, used, hits, 5, 1, 0, 2)
        disk = TierStats("DISK", 100, 7, 3, 7, 0, 4, 0)
        return SchedulerStats(0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, tiers=(host, disk))

    cache = {"block_size": "16", "num_gpu_blocks": "4", "enable_prefix_caching": "True", "cache_dtype": "f"}
    metrics = Metrics("m", cache)
    metrics.text(stats(4, 6))
    page = metrics.text(stats(9, 5)).decode()
    assert value(page, "xllm:kv_tier_hits_total", tier="cpu") == 9
    assert value(page, "xllm:kv_tier_hits_total", tier="disk") == 3
    assert value(page, "xllm:kv_tier_used_blocks", tier="cpu") == 5
    assert value(page, "xllm:kv_tier_failures_total", tier="disk") == 4
    page = metrics.text(stats(2, 5)).decode()  # another engine, whose totals began anew
    assert value(page, "xllm:kv_tier_hits_total", tier="cpu") == 9
    assert "vllm:kv_tier" not in page


def test_places_of_a_contiguous_pool_are_told():
    def stats(mapped, waited):
        places = PlaceStats(7, mapped, 1, 0, waited, 1, 0.25, 0.5)
        return SchedulerStats(0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, executor=ExecutorStats(places=places))

    metrics = Metrics(
        "m", {"block_size": "16", "num_gpu_blocks": "4", "enable_prefix_caching": "True", "cache_dtype": "f"}
    )
    metrics.text(stats(4, 1))
    page = metrics.text(stats(9, 3)).decode()
    assert value(page, "xllm:kv_places_shown") == 7
    assert value(page, "xllm:kv_places_mapped_total") == 9
    assert value(page, "xllm:kv_places_waits_total") == 3
    assert value(page, "xllm:kv_places_decode_waits_total") == 1
    assert value(page, "xllm:kv_places_mapping_seconds_total") == 0.5


def test_a_served_request_is_counted_once(http, live):
    before = http.get("/metrics").text
    for stream in (False, True):
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 5, "stream": stream}
        assert http.post("/v1/completions", json=body).status_code == 200
    after = http.get("/metrics").text
    for prefix in PREFIXES:

        def grown(name, prefix=prefix, **labels):
            return value(after, prefix + name, **labels) - value(before, prefix + name, **labels)

        assert grown("prompt_tokens_total") == 6
        assert grown("generation_tokens_total") == 10
        assert grown("request_success_total", finished_reason="length") == 2
        assert grown("request_success_total", finished_reason="stop") == 0
        for name in (
            "time_to_first_token",
            "e2e_request_latency",
            "request_queue_time",
            "request_prefill_time",
        ):
            assert grown(f"{name}_seconds_count") == 2
        assert grown("inter_token_latency_seconds_count") == 8
        assert grown("request_time_per_output_token_seconds_count") == 2


def test_gauges_follow_the_engine(http, live):
    live.fake.held = True
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(live.http.post, "/v1/completions", json={"prompt": "x"})
        until(lambda: live.fake.active == 1, "the request to run")
        until(
            lambda: value(http.get("/metrics").text, "xllm:num_requests_running") in (0, 1),
            "the page to answer",
        )
        live.fake.release()
        assert answer.result().status_code == 200


def test_kv_events_are_counted_under_our_name_alone():
    page = Metrics(
        "m", dict.fromkeys(("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"), "x")
    )
    text = page.text(stats(kv_events=EventStats(batches=7, dropped=2))).decode()
    assert value(text, "xllm:kv_event_batches_total") == 7
    assert value(text, "xllm:kv_event_batches_dropped_total") == 2
    assert "vllm:kv_event" not in text


def test_engine_totals_only_grow_even_across_a_restart():
    page = Metrics(
        "m", dict.fromkeys(("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"), "x")
    )
    for hits, total in ((5, 5), (9, 9), (2, 9), (4, 11)):
        text = page.text(stats(prefix_hit_tokens=hits)).decode()
        assert value(text, "vllm:prefix_cache_hits_total") == total
    assert value(text, "vllm:kv_cache_usage_perc") == 0.5


def test_callers_cannot_make_labels(http):
    before = set(labels_of(http.get("/metrics").text))
    http.post("/v1/completions", json={"prompt": "x", "user": "eve", "model": "fake", "cache_salt": "eve"})
    http.get("/eve")
    http.post("/v1/completions", json={"prompt": "x", "model": "eve"})
    assert set(labels_of(http.get("/metrics").text)) == before


def labels_of(text):
    return [tuple(sorted(s.labels.items())) for f in parse_page(text) for s in f.samples]


def test_the_page_answers_when_the_engine_does_not(http, live, monkeypatch):
    import asyncio

    async def never():
        await asyncio.sleep(60)

    monkeypatch.setattr("xllm.server.routes.metrics.STATS_TIMEOUT_S", 0.05)
    monkeypatch.setattr(live.engine, "stats", never)
    assert http.get("/metrics").status_code == 200


def test_steps_are_sampled():
    page = Metrics(
        "m", dict.fromkeys(("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"), "x")
    )
    page.sample_step(stats(step_tokens=40))
    page.sample_step(stats(step_tokens=40, running=0))  # an old step of an idle engine
    text = page.text(None).decode()
    assert value(text, "vllm:iteration_tokens_total_count") == 1
    assert value(text, "vllm:iteration_tokens_total_sum") == 40


def test_a_request_that_never_began_is_not_counted():
    page = Metrics(
        "m", dict.fromkeys(("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"), "x")
    )
    page.meter().ended(100)
    assert value(page.text(None).decode(), "xllm:prompt_tokens_total") == 0


def test_several_tokens_in_one_delta_share_its_gap(monkeypatch):
    page = Metrics(
        "m", dict.fromkeys(("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"), "x")
    )
    now = [10.0]
    monkeypatch.setattr("xllm.server.metrics.time.monotonic", lambda: now[0])
    meter = page.meter()
    for ids, at in (([1], 10.0), ([2, 3, 4], 10.3), ([], 10.4)):
        now[0] = at
        meter.saw(delta(ids))
    text = page.text(None).decode()
    assert value(text, "xllm:inter_token_latency_seconds_count") == 3
    assert value(text, "xllm:inter_token_latency_seconds_sum") == pytest.approx(0.3)
    assert meter.longest == meter.tokens == 4


def delta(ids):
    completion = CompletionOutput(0, token_ids=ids)
    return RequestOutput("r", None, [1], None, [completion], False, RequestMetrics(9.0))


def test_the_line_about_load():
    before, now = (
        stats(),
        stats(prompt_tokens=100, generation_tokens=50, prefix_queried_tokens=80, prefix_hit_tokens=20),
    )
    assert worked(before, now)
    assert not worked(stats(running=0), stats(running=0))
    assert line(before, now, 10.0) == (
        "1 running, 0 waiting, 10.0 prompt tok/s, 5.0 output tok/s, KV 50%, prefix hits 25%"
    )


def stats(**changes):
    usual = {
        "running": 1, "waiting": 0, "steps_in_flight": 0, "kv_usage": 0.5, "prefix_queried_tokens": 0, "prefix_hit_tokens": 0,
        "preemptions": 0, "evictions": 0, "prompt_tokens": 0, "generation_tokens": 0, "step_tokens": 0,
    }  # fmt: skip
    return SchedulerStats(**{**usual, **changes})
