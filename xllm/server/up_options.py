"""What a user may ask of `xllm up` beside what engines and HTTP servers take."""

from dataclasses import dataclass

from xllm.cluster.instance import check_name
from xllm.cluster.policies import ROUTING
from xllm.config.options import knob
from xllm.core.errors import ConfigError
from xllm.server.cluster_options import ClusterOptions

MOST = 64  # of a kind on one machine: a slip of the finger is refused


@dataclass(frozen=True, kw_only=True)
class UpOptions(ClusterOptions):
    """How many of what run on this machine. Each instance takes the engine options, the router those of the server."""

    etcd: tuple[str, ...] = knob(
        (), "URLs of an etcd to use (default: one is started, and ends with the rest)", metavar="URL"
    )
    instances: int | None = knob(
        None, "engines that serve the model (default: 2, or none beside --prefill and --decode)"
    )
    prefill: int = knob(0, "engines that do nothing but compute prompts for the others")
    decode: int = knob(0, "engines that answer, and have long prompts computed by those")
    routers: int = knob(1, "routers; the second listens on the port after the first, and so on")
    routing_policy: str = knob("prefix_aware", "which instance a request goes to", choices=tuple(ROUTING))
    processes: int = knob(1, "processes of each router, which share its port")
    max_concurrent_requests: int = knob(
        16384, "requests in flight in one router process; more are turned away"
    )
    ttft_slo_ms: float | None = knob(
        None, "with slo_aware: time to the first token that requests without a target of their own are given"
    )
    tpot_slo_ms: float | None = knob(None, "with slo_aware: the same for each token after the first")
    instance_name: str | None = knob(
        None, "instances are called NAME-1, NAME-2, ... (default: instance, or with --etcd this host's name)",
        metavar="NAME",
    )  # fmt: skip
    restart: bool = knob(True, "start again what dies")
    view: bool = knob(True, "show a live table where the output is a terminal")
    log_dir: str | None = knob(None, "write what each process says to a file here as well", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("instances", 0), ("prefill", 0), ("decode", 0), ("routers", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                raise ConfigError(f"--{name} must lie between {least} and {MOST}, not {value}")
        if set(self.roles) <= {"prefill"}:
            raise ConfigError("somebody has to answer: --instances or --decode must be at least 1")
        if self.instance_name is not None:
            check_name(self.instance_name, "--instance-name")

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the instances, in their order."""
        mixed = self.instances
        if mixed is None:
            mixed = 0 if self.prefill or self.decode else 2
        return ("prefill",) * self.prefill + ("decode",) * self.decode + ("both",) * mixed
