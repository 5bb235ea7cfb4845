"""`xllm bench throughput` and `xllm bench latency`: the engine in this process, without HTTP."""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from xllm.bench import datasets
from xllm.bench.completion import Ask
from xllm.bench.metrics import percentile
from xllm.bench.options import DatasetOptions, LatencyOptions, ThroughputOptions
from xllm.bench.profile import profiled_if
from xllm.bench.vocabulary import IdVocabulary, Vocabulary, load_vocabulary
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError
from xllm.core.output import RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.core.stats import ExecutorStats, SchedulerStats
from xllm.engine.build import check_traceable, decide

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)


class Engine(Protocol):
    """What these two need of `xllm.engine.llm.LLM`."""

    def generate(
        self, prompts: Any, sampling_params: Any = None, use_tqdm: bool = True
    ) -> list[RequestOutput]: ...

    def stats(self) -> SchedulerStats: ...


def run_throughput(engine_options: EngineOptions, data: DatasetOptions, options: ThroughputOptions) -> int:
    if options.profile:
        check_traceable(decide(engine_options), "--profile")
    with _engine(engine_options) as (llm, vocab_size, directory):
        vocabulary: Vocabulary = IdVocabulary(vocab_size)
        if data.dataset_name in ("sharegpt", "custom"):  # they bring text
            vocabulary = load_vocabulary(engine_options.tokenizer, directory, as_ids=True)
        asks = datasets.load(data, vocabulary, engine_options.seed)
        with profiled_if(options.profile, options.profile_dir):
            result, outputs = measure_throughput(llm, asks, progress=not options.disable_tqdm)
        steps = describe_steps(llm.stats().executor)
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, {outputs / result['elapsed_time']:.2f} output tokens/s"
    )
    print(steps)
    _write(options.output_json, result)
    return 0


def measure_throughput(llm: Engine, asks: Sequence[Ask], *, progress: bool) -> tuple[dict[str, Any], int]:
    """All requests at once; (result, output tokens). Each generates exactly as many tokens as it asks for."""
    prompts = [_prompt(ask) for ask in asks]
    params = [SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=a.max_tokens) for a in asks]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=progress)
    elapsed = time.perf_counter() - start
    generated = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    total = generated + sum(len(o.prompt_token_ids) for o in outputs)
    result = {
        "elapsed_time": elapsed,
        "num_requests": len(asks),
        "total_num_tokens": total,
        "requests_per_second": len(asks) / elapsed,
        "tokens_per_second": total / elapsed,
    }
    return result, generated


def run_latency(engine_options: EngineOptions, options: LatencyOptions) -> int:
    if min(options.input_len, options.output_len, options.batch_size, options.num_iters) < 1:
        raise ConfigError("--input-len, --output-len, --batch-size and --num-iters must be at least 1")
    if options.profile:
        check_traceable(decide(engine_options), "--profile")
    with _engine(engine_options) as (llm, vocab_size, _):
        with profiled_if(options.profile, options.profile_dir):
            result = measure_latency(llm, options, vocab_size, engine_options.seed)
        steps = describe_steps(llm.stats().executor)
    print(f"Avg latency: {result['avg_latency']:.4f} seconds")
    for p, seconds in result["percentiles"].items():
        print(f"{p}% percentile latency: {seconds:.4f} seconds")
    print(steps)
    _write(options.output_json, {**result, "options": asdict(options)})
    return 0


def measure_latency(llm: Engine, options: LatencyOptions, vocab_size: int, seed: int) -> dict[str, Any]:
    """Seconds from handing a batch over to its last token. Every batch has fresh prompts: no prefix is cached."""
    data = DatasetOptions(
        num_prompts=options.batch_size * (options.num_iters_warmup + options.num_iters),
        random_input_len=options.input_len,
        random_output_len=options.output_len,
    )
    asks = datasets.load(data, IdVocabulary(vocab_size), seed)
    params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=options.output_len)
    latencies = []
    for i in tqdm(range(0, len(asks), options.batch_size), disable=options.disable_tqdm or None):
        prompts = [_prompt(ask) for ask in asks[i : i + options.batch_size]]
        start = time.perf_counter()
        llm.generate(prompts, [params] * len(prompts), use_tqdm=False)
        latencies.append(time.perf_counter() - start)
    latencies = latencies[options.num_iters_warmup :]
    return {
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(p): percentile(latencies, p) for p in LATENCY_PERCENTILES},
    }


def describe_steps(stats: ExecutorStats) -> str:
    """What the engine's steps were and how long the device waited between them, since its start."""
    each = 1e3 / max(stats.steps, 1)
    told = (
        f"Steps: {stats.steps}, {stats.graph_steps} of them as graphs; on the device {stats.device_s * each:.3f} ms each, "
        f"between two of them {stats.bubble_s * each:.3f} ms"
    )
    if (places := stats.places) is not None:
        told += (
            f"; {places.mapped} KV pages mapped in {1e3 * places.seconds:.1f} ms beside them, {places.waited} steps waited for one, "
            f"{1e3 * places.waited_s:.1f} ms in all, {places.waited_decoding} of them with nobody new"
        )
    return told


def _prompt(ask: Ask) -> dict[str, Any]:
    return {"prompt": ask.prompt} if isinstance(ask.prompt, str) else {"prompt_token_ids": ask.prompt}


@contextmanager
def _engine(options: EngineOptions) -> Iterator[tuple[Engine, int, str]]:
    """(engine, size of its vocabulary, where its files are)."""
    from xllm.engine.llm import LLM  # brings torch: not on the way of --help

    asked = asdict(options)
    with LLM(asked.pop("model"), **asked) as llm:
        yield llm, llm.config.model.vocab_size, llm.config.model.directory


def _write(path: str | None, result: dict[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"result written to {path}")
