"""Which processes `xllm up` starts with what."""

import argparse
from dataclasses import replace
from typing import Any

import pytest

from xllm.config.facts import DeviceFacts
from xllm.config.flags import from_namespace
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError
from xllm.server import up_plan
from xllm.server.children import Spec
from xllm.server.cluster_options import RouterOptions
from xllm.server.options import ServerOptions
from xllm.server.up_options import UpOptions
from xllm.server.up_plan import Plan, plan, ports

CPU = DeviceFacts(name="cpu", description="", cores=8, total_bytes=1 << 34, free_bytes=1 << 34)
CUDA = replace(CPU, name="cuda")
ETCD = ("http://127.0.0.1:1", "http://127.0.0.1:2")


def made(facts: DeviceFacts = CPU, cards: tuple[str, ...] = (), **given: Any) -> Plan:
    kinds: dict[type, dict[str, Any]] = {UpOptions: {}, EngineOptions: {}, ServerOptions: {}}
    for name, value in given.items():
        kind = next(kind for kind in kinds if name in kind.__dataclass_fields__)  # type: ignore[attr-defined]
        kinds[kind][name] = value
    up, engine, server = (kind(**values) for kind, values in kinds.items())
    return plan(up, engine, server, facts, cards, ETCD, "secret")


def parsed(spec: Spec) -> argparse.Namespace:
    """As the command itself will read it."""
    from xllm.cli import _parser

    arguments = list(spec.argv[3:])
    return _parser(arguments[0]).parse_args(arguments)


def test_instances_take_the_engine_flags_and_a_share_of_the_machine():
    found = made(model="some/model", instances=3, max_num_seqs=7, shutdown_timeout=4.0, port=9000)
    assert [spec.name for spec in found.instances] == ["instance-1", "instance-2", "instance-3"]
    for spec in found.instances:
        namespace = parsed(spec)
        engine, server = from_namespace(EngineOptions, namespace), from_namespace(ServerOptions, namespace)
        assert (engine.model, engine.max_num_seqs, engine.threads) == ("some/model", 7, 2)
        assert engine.gpu_memory_utilization == pytest.approx(0.3)
        assert (server.host, server.port, server.shutdown_timeout) == ("127.0.0.1", 0, 4.0)
        assert (namespace.instance_id, namespace.etcd) == (spec.name, list(ETCD))
        assert spec.env == {"XLLM_CLUSTER_TOKEN": "secret"}
    assert found.decisions == (
        "2 threads and 1/3 of the memory for each of 3 instances (8 cores shared out; --threads for another number)",
    )


def test_a_router_takes_the_server_flags_and_what_it_needs_of_the_text():
    found = made(
        host="0.0.0.0", port=9000, routers=2, routing_policy="slo_aware", ttft_slo_ms=300.0, processes=2, served_model_name="m",
        allowed_origins=("a", "b"), chat_template="t", max_num_seqs=7,
    )  # fmt: skip
    assert [spec.name for spec in found.routers] == ["router-1", "router-2"]
    for spec, port in zip(found.routers, (9000, 9001), strict=True):
        namespace = parsed(spec)
        server = from_namespace(ServerOptions, namespace)
        assert (server.host, server.port, server.chat_template) == ("0.0.0.0", port, "t")
        assert server.allowed_origins == ("a", "b")
        routing = from_namespace(RouterOptions, namespace)
        assert (routing.routing_policy, routing.served_model_name) == ("slo_aware", "m")
        assert (routing.etcd, routing.processes, routing.ttft_slo_ms) == (ETCD, 2, 300.0)
        assert not hasattr(namespace, "max_num_seqs") and spec.processes == 2


def test_threads_that_are_given_are_each_instances():
    found = made(instances=2, threads=5)
    assert from_namespace(EngineOptions, parsed(found.instances[1])).threads == 5
    assert "(--threads)" in found.decisions[0]


def test_more_instances_than_cores_have_a_thread_each():
    assert "1 thread and 1/9" in made(instances=9).decisions[0]


def test_each_instance_has_a_card():
    found = made(CUDA, ("2", "GPU-abc", "5"), instances=2)
    assert [spec.env["CUDA_VISIBLE_DEVICES"] for spec in found.instances] == ["2", "GPU-abc"]
    assert from_namespace(EngineOptions, parsed(found.instances[0])).gpu_memory_utilization == 0.9
    with pytest.raises(ConfigError, match=r"4 instances: each takes a card of its own, and 3 can be seen"):
        made(CUDA, ("2", "GPU-abc", "5"), instances=4)


def test_keys_are_not_on_command_lines_where_one_does():
    found = made(api_key=("k1",))
    for spec in (*found.instances, *found.routers):
        assert spec.env["XLLM_API_KEY"] == "k1" and not any("k1" in argument for argument in spec.argv)
    found = made(api_key=("k1", "k2"))
    assert from_namespace(ServerOptions, parsed(found.routers[0])).api_key == ("k1", "k2")


def test_directories_on_disk_are_not_shared():
    found = made(instances=2, kv_disk_path="/kv", kv_disk_size=1.0)
    paths = [from_namespace(EngineOptions, parsed(spec)).kv_disk_path for spec in found.instances]
    assert paths == ["/kv/instance-1", "/kv/instance-2"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="--kv-events-config"):
        made(instances=2, kv_events_config='{"enable_kv_cache_events": true}')
    with pytest.raises(ConfigError, match="--profiler-dir"):
        made(profiler_dir="/p")
    with pytest.raises(ConfigError, match="--ttft-slo-ms needs"):
        made(ttft_slo_ms=300.0)
    for wrong in (
        {"instances": 0},
        {"prefill": 2},
        {"decode": -1},
        {"routers": 65},
        {"cluster": "a/b"},
        {"instance_name": "a b"},
    ):
        with pytest.raises(ConfigError):
            made(**wrong)
    with pytest.raises(ConfigError, match="leaves no ports"):
        ports(UpOptions(routers=2), ServerOptions(port=65535))
    with pytest.raises(ConfigError, match="--enable-sleep-mode is for `xllm serve`"):
        made(instances=2, enable_sleep_mode=True)


def test_names_are_the_hosts_where_the_etcd_is_shared(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "a_host.b")
    assert made(etcd=ETCD).instances[0].name == "a-host.b-1"
    assert made(etcd=ETCD, instance_name="n").instances[1].name == "n-2"


def test_cards_are_those_that_are_not_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    assert up_plan.visible_cards() == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert up_plan.visible_cards() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="nvidia-smi did not tell the cards"):
        up_plan.visible_cards()


def test_roles():
    found = made(prefill=1, decode=2)
    assert [spec.name for spec in found.instances] == ["prefill-1", "decode-1", "decode-2"]
    assert [spec.argv[spec.argv.index("--role") + 1] for spec in found.instances] == [
        "prefill",
        "decode",
        "decode",
    ]
    assert [spec.name for spec in made(prefill=1, instances=1, instance_name="n").instances] == [
        "n-prefill-1",
        "n-1",
    ]
