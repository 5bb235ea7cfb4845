"""`xllm bench serve`: load on any OpenAI-style server, and what its users would feel."""

import asyncio
import contextlib
import gc
import itertools
import json
import math
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from xllm.bench import datasets
from xllm.bench.arrivals import arrival_times
from xllm.bench.completion import Ask, complete, request_body
from xllm.bench.http import HttpClient
from xllm.bench.metrics import Record, banner, summarise
from xllm.bench.options import BACKENDS, METRICS, DatasetOptions, ServeBenchOptions
from xllm.bench.vocabulary import load_vocabulary
from xllm.core.errors import ConfigError, XllmError

FREEZE_EVERY = 500  # requests, whose records collections shall not walk


def run(options: ServeBenchOptions, data: DatasetOptions) -> int:
    """Prints the banner; returns 0, or 1 when no request succeeded. Raises `ConfigError` for wrong options."""
    result = asyncio.run(measure(options, data))
    shown, percentiles = _metric_names(options), _percentiles(options)
    for error, count in result.pop("error_counts").items():
        print(f"{count} failed: {error}")
    detailed = {k: result.pop(k) for k in DETAILS}
    print(banner(result, shown, percentiles))
    if options.save_result or options.save_detailed:
        if options.save_detailed:
            result |= detailed
        path = _save(options, result)
        print(f"result written to {path}")
    return 0 if result["completed"] else 1


async def measure(options: ServeBenchOptions, data: DatasetOptions) -> dict[str, Any]:
    """One run against a live server: the result's keys, `error_counts` and the per-request lists in `DETAILS`."""
    goodput = parse_goodput(options.goodput)
    _metric_names(options)  # wrong names are refused before the load, not after it
    percentiles = _percentiles(options)
    if not 0 <= options.cancel_share <= 1:
        raise ConfigError("--cancel-share is a share: between 0 and 1")
    base_url = options.base_url or f"http://{options.host}:{options.port}"
    headers = {}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        client = HttpClient(base_url, headers, options.timeout)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    async with client:
        model, root = await _model(client, options)
        vocabulary = load_vocabulary(options.tokenizer, root, model, as_ids=options.backend == "openai")
        asks = _with_cancels(datasets.load(data, vocabulary, options.seed), options)
        records, duration = await _drive(client, options, model, asks)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": options.backend,
        "model_id": model,
        "tokenizer_id": options.tokenizer,
        "dataset_name": data.dataset_name,
        "num_prompts": len(asks),
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
    result |= summarise(records, duration, percentiles=percentiles, goodput_ms=goodput)
    return result | _details(records) | {"error_counts": _error_counts(records)}


async def _model(client: HttpClient, options: ServeBenchOptions) -> tuple[str, str | None]:
    """(model to ask for, where its files are if the server says so)."""
    try:
        status, body = await client.request("GET", "/v1/models")
    except (ConnectionError, TimeoutError) as e:
        raise XllmError(f"no server: {e}") from e
    served = []
    if status == 200:
        try:
            served = [(m["id"], m.get("root")) for m in msgspec.json.decode(body)["data"]]
        except (msgspec.DecodeError, KeyError, TypeError):
            served = []  # not every server has the list; a model named by hand will do
    if options.model is not None:
        return options.model, dict(served).get(options.model)
    if not served:
        raise ConfigError(f"/v1/models answered {status} and no model: name one with --model")
    return served[0][0], served[0][1]


@asynccontextmanager
async def _profiled(client: HttpClient, wanted: bool) -> AsyncIterator[None]:
    """The server takes a trace of the body. Raises `XllmError` where it takes none."""
    if not wanted:
        yield
        return
    await _ask_for(client, "/start_profile")
    try:
        yield
    finally:
        told = await _ask_for(client, "/stop_profile")
    print(f"trace written by the server to {told.get('trace', 'where it was told to')}")


async def _ask_for(client: HttpClient, path: str) -> dict[str, Any]:
    status, body = await client.request("POST", path, b"{}")
    if status == 404:
        raise XllmError(
            "the server takes no traces; start it with --profiler-dir DIR, or measure without --profile"
        )
    if status != 200:
        raise XllmError(f"{path} answered {status}: {body[:300].decode(errors='replace')}")
    with contextlib.suppress(msgspec.DecodeError):
        told = msgspec.json.decode(body)
        return told if isinstance(told, dict) else {}
    return {}


async def _drive(
    client: HttpClient, options: ServeBenchOptions, model: str, asks: Sequence[Ask]
) -> tuple[list[Record], float]:
    path = options.endpoint or BACKENDS[options.backend]
    requests = [
        client.prepare(
            "POST",
            path,
            request_body(
                ask,
                backend=options.backend,
                model=model,
                temperature=options.temperature,
                ignore_eos=options.ignore_eos,
            ),
        )
        for ask in asks
    ]
    warm = [
        complete(client, requests[i % len(asks)], asks[i % len(asks)]) for i in range(options.num_warmups)
    ]
    await asyncio.gather(*warm)
    gate = asyncio.Semaphore(options.max_concurrency or len(asks))
    bar = tqdm(total=len(asks), disable=options.disable_tqdm or None, unit="req")

    done = itertools.count(1)

    async def one(request: bytes, ask: Ask) -> Record:
        async with gate:
            record = await complete(client, request, ask)
        bar.update()
        if next(done) % FREEZE_EVERY == 0:
            gc.freeze()
        return record

    async with _profiled(client, options.profile), _without_pauses():
        start = time.perf_counter()
        tasks = []
        for request, ask, at in zip(requests, asks, _times(options, asks), strict=False):
            if (wait := start + at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(request, ask)))
        records = await asyncio.gather(*tasks)
        duration = time.perf_counter() - start
    bar.close()
    return records, duration


@asynccontextmanager
async def _without_pauses() -> AsyncIterator[None]:
    """Prompts and records stay to the end. A collection that walked them, millions of numbers, would hold up requests for
    a second, and the server would be blamed."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _with_cancels(asks: Sequence[Ask], options: ServeBenchOptions) -> Sequence[Ask]:
    """Some of them, drawn from the seed, hang up after a part of their answer drawn as well."""
    draw = random.Random(f"cancels {options.seed}")
    return [
        replace(ask, hang_up_after=draw.randint(1, max(1, ask.max_tokens - 1)))
        if draw.random() < options.cancel_share
        else ask
        for ask in asks
    ]


def _times(options: ServeBenchOptions, asks: Sequence[Ask]) -> Sequence[float]:
    """Seconds from the start for each request: the data set's own, else made up."""
    if all(ask.at is not None for ask in asks):
        return [ask.at or 0.0 for ask in asks]
    try:
        arrivals = arrival_times(options.request_rate, options.burstiness, random.Random(options.seed))
        return list(itertools.islice(arrivals, len(asks)))
    except ValueError as e:
        raise ConfigError(str(e)) from e


DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")


def _details(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "input_lens": [r.prompt_tokens for r in records],
        "output_lens": [r.output_tokens for r in records],
        "ttfts": [r.ttft if r.arrivals else None for r in records],
        "itls": [r.itls for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error or "" for r in records],
    }


def _error_counts(records: Sequence[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for r in records:
        if r.error is not None:
            counts[r.error] = counts.get(r.error, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:5])


def parse_goodput(targets: Sequence[str] | None) -> dict[str, float] | None:
    """["ttft:500", "tpot:50"] -> {"ttft": 500.0, "tpot": 50.0}; raises `ConfigError`."""
    if not targets:
        return None
    parsed = {}
    for target in targets:
        name, _, value = target.partition(":")
        try:
            parsed[name] = float(value)
        except ValueError:
            raise ConfigError(f"--goodput {target}: write METRIC:MILLISECONDS") from None
        if name not in ("ttft", "tpot", "e2el") or not parsed[name] >= 0:
            raise ConfigError(
                f"--goodput {target}: the metrics are ttft, tpot and e2el, the value at least 0"
            )
    return parsed


def _metric_names(options: ServeBenchOptions) -> list[str]:
    names = [n.strip() for n in options.percentile_metrics.split(",") if n.strip()]
    if unknown := [n for n in names if n not in METRICS]:
        raise ConfigError(
            f"--percentile-metrics: {', '.join(unknown)} unknown; known are {', '.join(METRICS)}"
        )
    return names


def _percentiles(options: ServeBenchOptions) -> list[float]:
    try:
        values = [float(p) for p in options.metric_percentiles.split(",")]
    except ValueError:
        raise ConfigError(
            f"--metric-percentiles {options.metric_percentiles}: write numbers, as 50,90,99"
        ) from None
    if not all(0 <= p <= 100 for p in values):
        raise ConfigError("--metric-percentiles must lie between 0 and 100")
    return values


def _save(options: ServeBenchOptions, result: dict[str, Any]) -> Path:
    limit = f"-concurrency{options.max_concurrency}" if options.max_concurrency else ""
    model = result["model_id"].rstrip("/").split("/")[-1]
    name = f"{options.backend}-{result['request_rate']}qps{limit}-{model}-{result['date']}.json"
    path = Path(options.result_dir) / (options.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
