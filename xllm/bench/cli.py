"""`xllm bench ...` on the command line. What a bench needs is imported once it runs: `--help` stays quick."""

import argparse

from xllm.bench.options import (
    DatasetOptions,
    LatencyOptions,
    ServeBenchOptions,
    StartupOptions,
    ThroughputOptions,
)
from xllm.bench.simulate_options import add_simulation
from xllm.config.flags import add_flags, from_namespace
from xllm.config.options import EngineOptions


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `bench` and its commands. Each parsed namespace carries `run`: namespace -> exit code."""
    bench = subparsers.add_parser("bench", help="measure a server or the engine")
    commands = bench.add_subparsers(required=True, metavar="WHAT")

    serve = commands.add_parser("serve", help="load on any OpenAI-compatible server")
    add_flags(serve, ServeBenchOptions, DatasetOptions)
    serve.set_defaults(run=_serve)

    throughput = commands.add_parser("throughput", help="tokens per second of the engine in this process")
    _add_model(throughput)
    add_flags(throughput, ThroughputOptions, DatasetOptions, EngineOptions)
    throughput.set_defaults(run=_throughput)

    latency = commands.add_parser("latency", help="seconds for one batch in this process")
    _add_model(latency)
    add_flags(latency, LatencyOptions, EngineOptions)
    latency.set_defaults(run=_latency)

    startup = commands.add_parser("startup", help="time to ready and to the first token, by part")
    _add_model(startup)
    add_flags(startup, StartupOptions, EngineOptions)
    startup.set_defaults(run=_startup)

    add_simulation(commands)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="directory, hub id or demo (default: demo)")


def _serve(namespace: argparse.Namespace) -> int:
    from xllm.bench.serve import run

    return run(from_namespace(ServeBenchOptions, namespace), from_namespace(DatasetOptions, namespace))


def _throughput(namespace: argparse.Namespace) -> int:
    from xllm.bench.offline import run_throughput

    return run_throughput(
        from_namespace(EngineOptions, namespace),
        from_namespace(DatasetOptions, namespace),
        from_namespace(ThroughputOptions, namespace),
    )


def _latency(namespace: argparse.Namespace) -> int:
    from xllm.bench.offline import run_latency

    return run_latency(from_namespace(EngineOptions, namespace), from_namespace(LatencyOptions, namespace))


def _startup(namespace: argparse.Namespace) -> int:
    from xllm.bench.startup import run

    return run(from_namespace(EngineOptions, namespace), from_namespace(StartupOptions, namespace))
