"""Which processes `xllm up` starts, with which flags and environment. Pure, but for the question of which cards there are."""

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from xllm.config.facts import DeviceFacts
from xllm.config.flags import to_argv
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError
from xllm.server.children import Spec
from xllm.server.cluster_options import TOKEN_VARIABLE, RouterOptions
from xllm.server.options import API_KEY_VARIABLE, ServerOptions
from xllm.server.up_options import UpOptions

ASK_S = 20.0  # a driver that wakes a card takes seconds
DEFAULT_NAME = "instance"
_COMMAND = (sys.executable, "-m", "xllm.cli")

# what a router is asked of `xllm up`, and what it has to know of the engines
_OF_THE_ROUTER = (
    "cluster",
    "routing_policy",
    "processes",
    "max_concurrent_requests",
    "ttft_slo_ms",
    "tpot_slo_ms",
)
_OF_THE_ENGINE = ("tokenizer", "revision", "served_model_name", "generation_config", "max_logprobs")
# what of the server options every instance's own HTTP server takes too
_OF_EVERY_SERVER = ("shutdown_timeout", "disable_log_requests", "disable_log_stats", "log_level")


@dataclass(frozen=True, slots=True)
class Plan:
    instances: tuple[Spec, ...]
    routers: tuple[Spec, ...]
    decisions: tuple[str, ...]  # sentences for people


def plan(
    options: UpOptions,
    engine: EngineOptions,
    server: ServerOptions,
    facts: DeviceFacts,
    cards: Sequence[str],
    etcd: Sequence[str],
    token: str,
) -> Plan:
    """`cards`: what CUDA_VISIBLE_DEVICES may name. Raises ConfigError where the machine or a flag does not allow so many."""
    _check(options, engine, server)
    roles = options.roles
    if facts.name == "cuda" and len(cards) < len(roles):
        raise ConfigError(
            f"{len(roles)} instances: each takes a card of its own, and {len(cards)} can be seen here "
            f"({', '.join(cards) or 'none'})"
        )
    each, decision = _share(len(roles), engine, facts)
    common = ("--etcd", *etcd, "--cluster", options.cluster)
    environment = {TOKEN_VARIABLE: token}
    if server.api_key:  # in the environment, because the list of processes shows flags to everybody
        environment[API_KEY_VARIABLE] = server.api_key[0]
    instances = []
    for i, (name, role) in enumerate(zip(names(options), roles, strict=True)):
        own = replace(each, kv_disk_path=_of_its_own(each.kv_disk_path, name))
        flags = (
            *common, "--instance-id", name, "--role", role, "--host", "127.0.0.1", "--port", "0",
            *to_argv(own), *_some(server, _OF_EVERY_SERVER),
        )  # fmt: skip
        card = {"CUDA_VISIBLE_DEVICES": cards[i]} if facts.name == "cuda" else {}
        argv = (*_COMMAND, "serve", engine.model, *flags)
        instances.append(Spec(name, argv, {**environment, **card}))
    keys = [f"--api-key={key}" for key in server.api_key] if len(server.api_key) > 1 else []
    routing = RouterOptions(
        etcd=tuple(etcd),
        **{name: getattr(options, name) for name in _OF_THE_ROUTER},
        **{name: getattr(engine, name) for name in _OF_THE_ENGINE},
    )
    routers = []
    for i, port in enumerate(ports(options, server)):
        flags = (*to_argv(routing), *to_argv(replace(server, port=port)), *keys)
        called = "router" if options.routers == 1 else f"router-{i + 1}"
        routers.append(
            Spec(called, (*_COMMAND, "router", engine.model, *flags), environment, options.processes)
        )
    return Plan(tuple(instances), tuple(routers), (decision,))


def ports(options: UpOptions, server: ServerOptions) -> list[int]:
    """One of each router; all 0 where any free one will do."""
    found = [server.port + i if server.port else 0 for i in range(options.routers)]
    if found[-1] > 65535:
        raise ConfigError(f"--port {server.port} leaves no ports for {options.routers} routers")
    return found


def names(options: UpOptions) -> list[str]:
    """Of the instances: `instance-1`, or by role `prefill-1`, `decode-1`; behind a name of ours where others are in the cluster."""
    own = instance_name(options)
    called = {"both": own}
    for role in ("prefill", "decode"):
        called[role] = role if own == DEFAULT_NAME else f"{own}-{role}"
    counts: Counter[str] = Counter()
    found = []
    for role in options.roles:
        counts[role] += 1
        found.append(f"{called[role]}-{counts[role]}")
    return found


def instance_name(options: UpOptions) -> str:
    if options.instance_name is not None:
        return options.instance_name
    if not options.etcd:
        return DEFAULT_NAME
    host = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in socket.gethostname())
    return host or "instance"


def visible_cards() -> list[str]:
    """What each instance's CUDA_VISIBLE_DEVICES can be: those that ours leaves, else all that nvidia-smi knows."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [card.strip() for card in chosen.split(",") if card.strip() not in ("", "-1")]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        raise ConfigError(f"--device cuda: nvidia-smi did not tell the cards ({type(e).__name__})") from e
    return done.stdout.split()


def _check(options: UpOptions, engine: EngineOptions, server: ServerOptions) -> None:
    if len(options.roles) > 1 and engine.kv_events_config is not None:
        raise ConfigError(
            "--kv-events-config names one endpoint, which several instances cannot share; use --instances 1"
        )
    if engine.enable_sleep_mode:
        raise ConfigError(
            "--enable-sleep-mode is for `xllm serve`: instances read each other's KV memory, and a router has none to give back"
        )
    if server.profiler_dir is not None:
        raise ConfigError("--profiler-dir is for `xllm serve`: a router has no device to trace")


def _share(instances: int, engine: EngineOptions, facts: DeviceFacts) -> tuple[EngineOptions, str]:
    """One instance's part of the machine, and a sentence about it."""
    if facts.name == "cuda":
        return engine, f"each of {instances} instances has a card of its own"
    if engine.threads is not None:
        threads, why = engine.threads, "--threads"
    else:
        threads = max(1, facts.cores // instances)
        why = f"{facts.cores} core{'s' if facts.cores > 1 else ''} shared out; --threads for another number"
    each = replace(
        engine,
        threads=threads,
        gpu_memory_utilization=round(engine.gpu_memory_utilization / instances, 4),
    )
    return each, (
        f"{threads} thread{'s' if threads > 1 else ''} and 1/{instances} of the memory for each of {instances} "
        f"instances ({why})"
    )


def _of_its_own(directory: str | None, name: str) -> str | None:
    return None if directory is None else str(Path(directory) / name)


def _some(options: ServerOptions, names: Sequence[str]) -> list[str]:
    """The flags of these alone."""
    defaults = ServerOptions()
    others = {f.name: getattr(defaults, f.name) for f in fields(options) if f.name not in names}
    return to_argv(replace(options, **others))
