"""From what a client saw of each request to the figures people compare.

TTFT: sent to first token. TPOT: mean time per token after the first. ITL: each gap between two pieces of the stream.
E2EL: sent to last token. Seconds here; milliseconds in results, as their keys say.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


@dataclass(slots=True)
class Record:
    """One request. `arrivals` are the clock readings of each piece of output, `start` that of sending."""

    start: float
    arrivals: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None
    cancelled: bool = False  # hung up on, as was asked for: neither a success nor a failure

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.start

    @property
    def latency(self) -> float:
        return self.arrivals[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """None for a single token: it has no time per further token."""
        if self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def percentile(values: Sequence[float], p: float) -> float:
    """The p-th percentile (0..100) with linear interpolation between neighbours; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * p / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def percentile_key(p: float) -> str:
    return f"p{int(p) if p == int(p) else p}"


def is_good(record: Record, targets_ms: Mapping[str, float]) -> bool:
    seen = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.latency}
    return all(seen[name] * 1000 <= target for name, target in targets_ms.items())


def summarise(
    records: Sequence[Record],
    duration: float,
    *,
    percentiles: Iterable[float] = (99,),
    goodput_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Result keys and units are those of `vllm bench serve`."""
    done = [r for r in records if r.error is None and not r.cancelled]
    cancelled = sum(r.cancelled for r in records)
    tokens_in = sum(r.prompt_tokens for r in done)
    tokens_out = sum(r.output_tokens for r in done)
    good = sum(is_good(r, goodput_ms) for r in done) if goodput_ms else None
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done) - cancelled,
        "cancelled": cancelled,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration,
        "request_goodput": None if good is None else good / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": _peak_tokens(done),
        "max_concurrent_requests": _peak_concurrency(records),
    }
    seconds = {
        "ttft": [r.ttft for r in done],
        "tpot": [r.tpot for r in done if r.tpot is not None],
        "itl": [gap for r in done for gap in r.itls],
        "e2el": [r.latency for r in done],
    }
    wanted = sorted({99.0, *percentiles})
    for name, values in seconds.items():
        result.update(_spread(name, [v * 1000 for v in values], wanted))
    return result


def _spread(name: str, ms: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    spread = {
        f"mean_{name}_ms": statistics.fmean(ms) if ms else 0.0,
        f"median_{name}_ms": statistics.median(ms) if ms else 0.0,
        f"std_{name}_ms": statistics.pstdev(ms) if ms else 0.0,
    }
    for p in percentiles:
        spread[f"{percentile_key(p)}_{name}_ms"] = percentile(ms, p)
    return spread


def _peak_tokens(done: Sequence[Record]) -> float:
    """Most tokens in one second of the run. A piece of stream counts its request's mean tokens per piece."""
    per_second: defaultdict[int, float] = defaultdict(float)
    begin = min((r.start for r in done), default=0.0)
    for r in done:
        for at in r.arrivals:
            per_second[int(at - begin)] += r.output_tokens / len(r.arrivals)
    return max(per_second.values(), default=0.0)


def _peak_concurrency(records: Sequence[Record]) -> int:
    edges = sorted([(r.end, -1) for r in records] + [(r.start, 1) for r in records])
    running = peak = 0
    for _, change in edges:
        running += change
        peak = max(peak, running)
    return peak


WIDTH = 50


def banner(result: Mapping[str, Any], shown: Sequence[str], percentiles: Sequence[float]) -> str:
    """The table that `vllm bench serve` users know. `shown` picks among ttft, tpot, itl, e2el."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]

    def row(label: str, value: float | int | None) -> None:
        if value is not None:
            text = f"{value:<10.2f}" if isinstance(value, float) else f"{value:<10}"
            lines.append(f"{label:<40} {text}".rstrip())

    row("Successful requests:", result["completed"])
    row("Failed requests:", result["failed"])
    row("Cancelled requests:", result.get("cancelled") or None)
    row("Maximum request concurrency:", result.get("max_concurrency"))
    rate = result.get("request_rate")
    row("Request rate configured (RPS):", rate if isinstance(rate, float) else None)
    row("Benchmark duration (s):", result["duration"])
    row("Total input tokens:", result["total_input_tokens"])
    row("Total generated tokens:", result["total_output_tokens"])
    row("Request throughput (req/s):", result["request_throughput"])
    row("Request goodput (req/s):", result["request_goodput"])
    row("Output token throughput (tok/s):", result["output_throughput"])
    row("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    row("Peak concurrent requests:", result["max_concurrent_requests"])
    row("Total token throughput (tok/s):", result["total_token_throughput"])
    for name in shown:
        title, short = TITLES[name]
        lines.append(f"{title:-^{WIDTH}}")
        row(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        row(f"Median {short} (ms):", result[f"median_{name}_ms"])
        for p in percentiles:
            row(f"{percentile_key(p).upper()} {short} (ms):", result[f"{percentile_key(p)}_{name}_ms"])
    lines.append("=" * WIDTH)
    return "\n".join(lines)
