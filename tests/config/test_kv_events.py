import json

import pytest

from tests.config.test_resolve import decide
from xllm.config.kv_events import read_kv_events
from xllm.core.errors import ConfigError


def read(**asked):
    return read_kv_events(json.dumps({"enable_kv_cache_events": True, **asked}))


def test_defaults_stay_on_this_machine():
    config = read()
    assert config is not None
    assert (config.endpoint, config.bind, config.replay_endpoint) == ("tcp://127.0.0.1:5557", True, None)
    assert (config.topic, config.buffer_steps, config.hwm, config.max_queue_size) == (
        "",
        10_000,
        10_000,
        100_000,
    )


@pytest.mark.parametrize(
    ("endpoint", "bind"),
    [
        ("tcp://*:5557", True),
        ("tcp://0.0.0.0:5557", True),
        ("tcp://127.0.0.1:*", True),
        ("tcp://[::]:5557", True),
        ("tcp://[::1]:5557", True),
        ("ipc:///tmp/events", True),
        ("tcp://localhost:5557", False),
        ("tcp://epp.llm-d.svc.cluster.local:5557", False),
        ("tcp://10.1.2.3:5557", False),
    ],
)
def test_an_address_of_this_machine_is_listened_at_and_any_other_connected_to(endpoint, bind):
    config = read(endpoint=endpoint)
    assert config is not None
    assert config.bind is bind


@pytest.mark.parametrize("text", ['{"enable_kv_cache_events": false}', '{"enable_kv_cache_events": true, "publisher": "null"}'])  # fmt: skip
def test_off_is_off(text):
    assert read_kv_events(text) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "truncated"),
        ("[]", "object"),
        ("{}", "enable_kv_cache_events"),
        ('{"endpoint": "tcp://*:5557"}', "enable_kv_cache_events"),
        ('{"enable_kv_cache_events": true, "end_point": "tcp://*:5557"}', "end_point"),
        ('{"enable_kv_cache_events": "yes"}', "bool"),
        ('{"enable_kv_cache_events": true, "publisher": "nats"}', "nats"),
        ('{"enable_kv_cache_events": true, "endpoint": "5557"}', "tcp://HOST:PORT"),
        ('{"enable_kv_cache_events": true, "endpoint": "tcp://*"}', "tcp://HOST:PORT"),
        ('{"enable_kv_cache_events": true, "endpoint": "tcp://*:70000"}', "tcp://HOST:PORT"),
        ('{"enable_kv_cache_events": true, "endpoint": "inproc://x"}', "tcp://HOST:PORT"),
        ('{"enable_kv_cache_events": true, "endpoint": "ipc://"}', "tcp://HOST:PORT"),
        ('{"enable_kv_cache_events": true, "replay_endpoint": "nowhere"}', "nowhere"),
        ('{"enable_kv_cache_events": true, "replay_endpoint": "tcp://127.0.0.1:5557"}', "both"),
        ('{"enable_kv_cache_events": true, "buffer_steps": 0}', "buffer_steps"),
        ('{"enable_kv_cache_events": true, "hwm": -1}', "hwm"),
        ('{"enable_kv_cache_events": true, "max_queue_size": 0}', "max_queue_size"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(text, word):
    with pytest.raises(ConfigError) as refused:
        read_kv_events(text)
    assert refused.value.message.startswith("--kv-events-config")
    assert word in refused.value.message


def test_resolve_says_where_they_go():
    assert decide().kv_events is None
    asked = '{"enable_kv_cache_events": true, "replay_endpoint": "tcp://*:5558", "buffer_steps": 7}'
    config = decide(kv_events_config=asked)
    assert config.kv_events == read_kv_events(asked)
    (reason,) = [reason for reason in config.reasons if "KV events" in reason]
    assert reason == "KV events at tcp://127.0.0.1:5557, the last 7 batches again at tcp://*:5558"
    asked = '{"enable_kv_cache_events": true, "endpoint": "tcp://epp:5557"}'
    assert any(
        "collector at tcp://epp:5557, no replay" in reason
        for reason in decide(kv_events_config=asked).reasons
    )


def test_there_are_no_events_without_a_prefix_cache():
    asked = '{"enable_kv_cache_events": true}'
    with pytest.raises(ConfigError, match="--no-enable-prefix-caching"):
        decide(kv_events_config=asked, enable_prefix_caching=False)
    assert decide(kv_events_config='{"enable_kv_cache_events": false}', enable_prefix_caching=False)
