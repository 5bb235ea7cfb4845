"""Every knob of `xllm bench`, once. Imports nothing heavy: `xllm --help` reads it."""

import math
from dataclasses import dataclass

from xllm.config.options import knob

BACKENDS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions:
    """The server, the load and the report."""

    backend: str = knob("openai", "API to speak: completions or chat completions", choices=tuple(BACKENDS))
    base_url: str | None = knob(None, "where the server is (default: http://HOST:PORT)", metavar="URL")
    host: str = knob("127.0.0.1", "server's host")
    port: int = knob(8000, "server's port")
    endpoint: str | None = knob(None, "path of the API (default: the backend's)", metavar="PATH")
    model: str | None = knob(None, "model to ask for (default: the first that /v1/models names)")
    tokenizer: str | None = knob(
        None, "directory, tokenizer.json or hub id, for exact lengths (default: the model's, if on this disk)"
    )
    request_rate: float = knob(math.inf, "requests per second; inf sends all at once")
    burstiness: float = knob(1.0, "1 is a Poisson process, less is burstier, more is more even")
    max_concurrency: int | None = knob(None, "most requests under way at once (default: no limit)")
    num_warmups: int = knob(0, "requests sent before measuring starts")
    profile: bool = knob(False, "have the server (started with --profiler-dir) write a trace of the run")
    cancel_share: float = knob(0.0, "share of requests that hang up somewhere in the middle of their answer")
    temperature: float | None = knob(0.0, "sampling temperature")
    ignore_eos: bool = knob(False, "generate exactly as many tokens as asked for")
    goodput: tuple[str, ...] | None = knob(
        None, "targets a good request keeps, in ms: ttft:MS tpot:MS e2el:MS", metavar="METRIC:MS"
    )
    percentile_metrics: str = knob("ttft,tpot,itl", "metrics to print, of ttft, tpot, itl, e2el")
    metric_percentiles: str = knob("99", "percentiles to compute, e.g. 50,90,99")
    seed: int = knob(0, "seed of prompts and arrivals")
    timeout: float = knob(3600.0, "seconds after which a request counts as failed")
    disable_tqdm: bool = knob(False, "no progress bar")
    save_result: bool = knob(False, "write the result as JSON")
    save_detailed: bool = knob(False, "with every request's own figures and text")
    result_dir: str = knob(".", "directory to write it to", metavar="DIR")
    result_filename: str | None = knob(
        None, "file name (default: made of backend, rate, model, date)", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """What the requests are made of."""

    dataset_name: str = knob(
        "random",
        "where prompts come from",
        choices=("random", "sharegpt", "prefix_repetition", "custom", "timed_trace"),
    )
    dataset_path: str | None = knob(
        None, "file of sharegpt (JSON), custom (JSON lines) or timed_trace (JSON lines)", metavar="FILE"
    )
    num_prompts: int = knob(100, "requests to send; files with fewer lines are not repeated")
    random_input_len: int = knob(1024, "random: prompt tokens")
    random_output_len: int = knob(128, "random: tokens to generate")
    random_range_ratio: float = knob(0.0, "random: lengths are uniform in [L(1-r), L(1+r)]")
    random_prefix_len: int = knob(0, "random: tokens that all prompts share, before the rest")
    prefix_repetition_prefix_len: int = knob(256, "prefix_repetition: tokens of a prefix")
    prefix_repetition_suffix_len: int = knob(256, "prefix_repetition: own tokens after it")
    prefix_repetition_num_prefixes: int = knob(10, "prefix_repetition: different prefixes")
    prefix_repetition_output_len: int = knob(128, "prefix_repetition: tokens to generate")
    sharegpt_output_len: int | None = knob(None, "sharegpt: tokens to generate (default: as in the file)")
    custom_output_len: int = knob(256, "custom: tokens to generate where a line has no output_tokens")


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """The report."""

    profile: bool = knob(False, "write a trace of the measured run, and print what took most of its time")
    profile_dir: str = knob(".", "directory for the trace", metavar="DIR")
    disable_tqdm: bool = knob(False, "no progress bar")
    output_json: str | None = knob(None, "file for the result", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """One batch, over and over."""

    input_len: int = knob(32, "prompt tokens of each request")
    output_len: int = knob(128, "tokens to generate for each request")
    batch_size: int = knob(8, "requests at once")
    num_iters_warmup: int = knob(3, "batches before measuring starts")
    num_iters: int = knob(10, "batches to measure")
    profile: bool = knob(False, "write a trace of the measured run, and print what took most of its time")
    profile_dir: str = knob(".", "directory for the trace", metavar="DIR")
    disable_tqdm: bool = knob(False, "no progress bar")
    output_json: str | None = knob(None, "file for the result", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class StartupOptions:
    """How to measure."""

    rounds: int = knob(3, "fresh starts; the median is reported")
    timeout: float = knob(600.0, "seconds a start may take")
    output_json: str | None = knob(None, "file for the result", metavar="FILE")
