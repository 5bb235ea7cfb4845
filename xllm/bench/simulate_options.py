"""`xllm bench trace` and `xllm bench simulate` on the command line. What they need is imported once they run."""

import argparse
from dataclasses import dataclass

from xllm.cluster.policies import ROUTING
from xllm.config.flags import add_flags, from_namespace
from xllm.config.options import knob
from xllm.core.errors import ConfigError

KINDS = ("conversation", "agents", "code")
FETCH_US = 1.0  # of 8B over a line of 150 GB/s
ARRIVALS = ("poisson", "gamma", "mmpp", "diurnal")


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What the requests are and when they come."""

    kind: str = knob(
        "conversation",
        "conversations with people, coding agents, or single requests about code",
        choices=KINDS,
    )
    requests: int = knob(1000, "how many")
    rate: float = knob(10.0, "requests per second, on average")
    arrivals: str = knob("poisson", "how they, or the sessions they belong to, arrive", choices=ARRIVALS)
    burstiness: float = knob(0.25, "of gamma arrivals: 1 is a Poisson process, less is burstier")
    period: float = knob(600.0, "seconds of a day of diurnal arrivals")
    systems: int = knob(8, "system prompts that sessions share; 0: none")
    system_tokens: int = knob(512, "tokens of a system prompt, in whole blocks of 512")
    max_input: int = knob(12288, "tokens of a prompt at most; a session ends before it grows beyond")
    max_output: int = knob(1024, "tokens of an answer at most")
    seed: int = knob(0, "everything follows from it")
    out: str = knob("trace.jsonl", "where to write it", metavar="FILE")

    def __post_init__(self) -> None:
        for name in ("requests", "rate", "burstiness", "period", "max_input", "max_output"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be more than 0")
        if self.systems < 0 or self.system_tokens < 0 or self.system_tokens % 512:
            raise ConfigError("--system-tokens comes in whole blocks of 512, --systems is 0 or more")
        if self.systems and self.system_tokens >= self.max_input:
            raise ConfigError("--max-input must be more than --system-tokens")


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Modelled instances, and a router over them for one policy after the other."""

    policies: str = knob("prefix_aware,least_loaded,round_robin", f"of {', '.join(ROUTING)}")
    instances: int = knob(32, "how many")
    prefill: int = knob(
        0, "of the instances, so many compute prompts for the others, who fetch the KV and answer"
    )
    fetch_us: float | None = knob(
        None, "microseconds that a token's KV takes from another instance "
        f"(default: {FETCH_US:g} with --prefill, else none goes between them)",
    )  # fmt: skip
    workers: int = knob(2, "processes that they are spread over, at least one for each role")
    time_scale: float = knob(
        1.0, "seconds that a second of the trace takes; more where the host does not keep up"
    )
    requests: int | None = knob(None, "of the trace, from its beginning (default: all)")
    base_ms: float = knob(20.0, "milliseconds of a step")
    token_us: float = knob(60.0, "microseconds for each token of a step")
    context_ns: float = knob(10.0, "nanoseconds for each token of KV that a step reads")
    num_blocks: int = knob(4096, "blocks of each KV cache")
    block_size: int = knob(16, "tokens of a block")
    max_num_seqs: int = knob(32, "sequences at once in an instance")
    max_num_batched_tokens: int = knob(1024, "tokens of a step at most")
    max_num_queued: int | None = knob(None, "requests beyond --max-num-seqs (default: as many as come)")
    patience: float = knob(600.0, "seconds of the trace without any news after which a run is given up")
    plots: bool = knob(True, "pictures in the report; they need matplotlib")
    out: str = knob("simulation", "directory of the report", metavar="DIR")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.names if name not in ROUTING]:
            raise ConfigError(f"--policies: {', '.join(unknown)} unknown; known are {', '.join(ROUTING)}")
        for name in ("instances", "workers", "time_scale", "patience", "requests"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be more than 0")
        if not 0 <= self.prefill < self.instances:
            raise ConfigError("--prefill must be fewer than --instances: somebody is to answer")
        if self.fetch_us is not None and self.fetch_us < 0:
            raise ConfigError("--fetch-us cannot be less than 0")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.policies.split(",") if name.strip()]

    @property
    def moved_us(self) -> float | None:
        """Microseconds for a token's KV; None: none goes between instances."""
        return FETCH_US if self.fetch_us is None and self.prefill else self.fetch_us

    @property
    def max_model_len(self) -> int:
        return self.num_blocks * self.block_size


def add_simulation(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    trace = commands.add_parser("trace", help="make up requests of public shape, as a file")
    add_flags(trace, TraceOptions)
    trace.set_defaults(run=_trace)

    simulate = commands.add_parser(
        "simulate", help="replay a trace over instances without a model, by routing policy"
    )
    simulate.add_argument(
        "trace", metavar="TRACE", help="file of `xllm bench trace`, or in the form of Mooncake's"
    )
    add_flags(simulate, SimulateOptions)
    simulate.set_defaults(run=_simulate)


def _trace(namespace: argparse.Namespace) -> int:
    from xllm.bench.trace import run

    return run(from_namespace(TraceOptions, namespace))


def _simulate(namespace: argparse.Namespace) -> int:
    from xllm.bench.simulate import run

    return run(namespace.trace, from_namespace(SimulateOptions, namespace))
