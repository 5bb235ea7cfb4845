"""What a user may ask of a cluster: where its etcd is, how an instance joins it, how a router spreads requests."""

import math
import os
from dataclasses import dataclass
from typing import get_args

from xllm.cluster.instance import Role, check_name
from xllm.cluster.policies import ROUTING
from xllm.config.options import knob
from xllm.core.errors import ConfigError

TOKEN_VARIABLE = "XLLM_CLUSTER_TOKEN"
MOST_PROCESSES = 64
KV_TRANSPORTS = ("auto", "nixl", "tcp", "mooncake", "none")
FAULTY = "faulty:"  # a transport for tests: it takes settings, and no help speaks of it


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Which cluster."""

    etcd: tuple[str, ...] = knob(
        (), "URLs of the cluster's etcd, such as http://10.0.0.5:2379", metavar="URL"
    )
    cluster: str = knob("default", "name of the cluster: several may share one etcd")

    def __post_init__(self) -> None:
        check_name(self.cluster, "--cluster")

    def token(self) -> str | None:
        """What routers show to instances, from the environment: a flag would be in the list of processes. None: there is none."""
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None


@dataclass(frozen=True, kw_only=True)
class JoinOptions(ClusterOptions):
    """With --etcd the engine is an instance of a cluster, which routers use beside its own HTTP server."""

    instance_id: str | None = knob(
        None, "name of this instance, the same after a restart (default: host name and port)"
    )
    listen: str = knob(
        "tcp://127.0.0.1:*", "where routers reach the engine; tcp://0.0.0.0:* on several machines"
    )
    advertise: str | None = knob(
        None,
        "host that routers connect to (default: that of --listen, or this machine's address)",
        metavar="HOST",
    )

    role: str = knob(
        "both",
        "what routers send here: prefill computes the KV of prompts for others, decode goes on from it",
        choices=get_args(Role),
    )
    kv_transport: str = knob(
        "auto",
        "how KV goes between instances; auto: nixl on a card where it is installed, else tcp; mooncake: host memory only",
        metavar=f"{{{','.join(KV_TRANSPORTS)}}}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_transport not in KV_TRANSPORTS and not self.kv_transport.startswith(FAULTY):
            raise ConfigError(
                f"--kv-transport is one of {', '.join(KV_TRANSPORTS)}; not {self.kv_transport!r}"
            )
        if self.role != "both" and self.kv_transport == "none":
            raise ConfigError(
                f"--role {self.role} is of no use without KV from or for others: --kv-transport none"
            )
        if self.instance_id is not None:
            check_name(self.instance_id, "--instance-id")
        if not self.listen.startswith("tcp://"):
            raise ConfigError(f"--listen is tcp://HOST:PORT (port * for a free one), not {self.listen}")


@dataclass(frozen=True, kw_only=True)
class RouterOptions(ClusterOptions):
    """Whom a router sends requests to, and how it chooses. The model's tokenizer is read here, its weights are not."""

    routing_policy: str = knob("prefix_aware", "which instance a request goes to", choices=tuple(ROUTING))
    processes: int = knob(1, "processes that share the port: one handles some thousand tokens a second")
    max_concurrent_requests: int = knob(16384, "requests in flight in one process; more are turned away")
    ttft_slo_ms: float | None = knob(
        None, "with slo_aware: time to the first token that requests without a target of their own are given"
    )
    tpot_slo_ms: float | None = knob(None, "with slo_aware: the same for each token after the first")
    tokenizer: str | None = knob(None, "tokenizer directory or hub id, when not the model's own")
    revision: str | None = knob(None, "branch, tag or commit of a hub model")
    served_model_name: str | None = knob(None, "name the instances serve the model under (default: MODEL)")
    generation_config: str = knob(
        "auto", "auto: sampling defaults from the model's generation_config.json; none: ours", choices=("auto", "none")
    )  # fmt: skip
    max_logprobs: int = knob(20, "most log-probabilities a request may ask for per token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.processes <= MOST_PROCESSES:
            raise ConfigError(f"--processes must lie between 1 and {MOST_PROCESSES}, not {self.processes}")
        if self.max_concurrent_requests < 1:
            raise ConfigError("--max-concurrent-requests must be at least 1")
        for flag, value in (("--ttft-slo-ms", self.ttft_slo_ms), ("--tpot-slo-ms", self.tpot_slo_ms)):
            if value is None:
                continue
            if self.routing_policy != "slo_aware":
                raise ConfigError(
                    f"{flag} needs --routing-policy slo_aware: no other policy looks at targets"
                )
            if not 0 < value < math.inf:
                raise ConfigError(f"{flag} must be a positive number of milliseconds, not {value:g}")
