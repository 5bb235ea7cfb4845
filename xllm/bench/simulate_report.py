"""What a simulation found: figures, a page in Markdown, and pictures."""

import dataclasses
import importlib.util
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm.bench.metrics import percentile
from xllm.bench.simulate_options import SimulateOptions
from xllm.core.errors import ConfigError

if TYPE_CHECKING:
    from xllm.bench.simulate import Call, Replay

LATE = 0.1  # a mean step may end so late, as part of its time, before the host counts as too slow
IDLE = 0.02  # and so much of its time a device may wait for steps
SEND_LATE_S = 0.05  # and so late, in seconds of the trace, may the 99th of 100 requests be sent
CURVE = 200  # points of a distribution
PERCENTILES = (50, 90, 99)


def check(options: SimulateOptions) -> None:
    """`ConfigError` where pictures are wanted and cannot be drawn: better before than after."""
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            'the pictures need matplotlib: pip install "pyxllm[bench]", or do without them by --no-plots'
        )


def plain(options: SimulateOptions) -> dict[str, Any]:
    return dataclasses.asdict(options)


def summarise(
    policy: str, replay: "Replay", instances: Sequence[str], lateness: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Seconds of the trace; of a policy's run, what can be compared and what it is to be believed by."""
    scale, calls = replay.scale, replay.calls
    done = [call for call in calls if call.error is None]
    ttfts = [(call.first - call.sent) / scale for call in done if call.first is not None]
    itls = [gap / scale for call in done for gap in call.gaps]
    tpots = [t / scale for call in done if (t := _tpot(call)) is not None]
    seconds = (max((c.end or 0.0 for c in calls), default=0.0) - replay.begin) / scale
    prompts, cached = sum(c.row.input_length for c in done), sum(c.cached for c in done)
    work = Counter(dict.fromkeys(instances, 0))
    for call in done:
        work[call.instance] += call.row.input_length - call.cached - call.fetched + call.output
    return {
        "policy": policy,
        "requests": len(calls),
        "failed": len(calls) - len(done),
        "errors": dict(Counter(call.error for call in calls if call.error is not None).most_common(5)),
        "moved": sum(call.moves > 0 for call in calls),
        "seconds": seconds,
        "requests_per_s": len(done) / seconds,
        "output_tokens_per_s": sum(call.output for call in done) / seconds,
        "hit_rate": cached / prompts if prompts else 0.0,
        "fetched": sum(c.fetched for c in done) / prompts if prompts else 0.0,
        **{f"ttft_p{p}_s": percentile(ttfts, p) for p in PERCENTILES},
        **{f"tpot_p{p}_s": percentile(tpots, p) for p in PERCENTILES},
        **{f"itl_p{p}_s": percentile(itls, p) for p in PERCENTILES},
        "imbalance": _variation(list(work.values())),
        "work": dict(work),
        "queues": [
            {"at": at, "mean": statistics.fmean(n.values()), "max": max(n.values())} for at, n in replay.queues if n
        ],
        "ttft_curve": [percentile(ttfts, p * 100 / CURVE) for p in range(CURVE + 1)],
        "host": _host(replay, lateness),
    }  # fmt: skip


def _tpot(call: "Call") -> float | None:
    if call.first is None or call.end is None or call.output < 2:
        return None
    return (call.end - call.first) / (call.output - 1)


def _variation(values: Sequence[float]) -> float:
    """Coefficient of variation: standard deviation by mean; 0: all had the same."""
    mean = statistics.fmean(values)
    return statistics.pstdev(values) / mean if mean else 0.0


def _host(replay: "Replay", lateness: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether this machine kept up with what it played."""
    steps = sum(one["steps"] for one in lateness)
    busy = sum(one["busy_s"] for one in lateness)
    late = sum(one["late_s"] for one in lateness) / busy if busy else 0.0
    idle = sum(one["bubble_s"] for one in lateness) / busy if busy else 0.0
    sends = [(call.sent - call.due) / replay.scale for call in replay.calls if call.sent]
    send_late = percentile(sends, 99)
    return {
        "steps": steps,
        "step_late": late,
        "worst_late_s": max((one["worst_s"] for one in lateness), default=0.0) / replay.scale,
        "waited_for_steps": idle,
        "send_late_p99_s": send_late,
        "kept_up": late <= LATE and idle <= IDLE and send_late <= SEND_LATE_S,
    }


def line(result: Mapping[str, Any]) -> str:
    host = result["host"]
    slow = "" if host["kept_up"] else "  THE HOST DID NOT KEEP UP: a larger --time-scale is needed"
    return (
        f"{result['policy']:<14} TTFT p50 {result['ttft_p50_s'] * 1e3:7.0f} ms, p99 {result['ttft_p99_s'] * 1e3:7.0f} ms; "
        f"TPOT p50 {result['tpot_p50_s'] * 1e3:5.1f} ms; ITL p99 {result['itl_p99_s'] * 1e3:5.1f} ms; "
        f"hits {result['hit_rate']:6.1%}; "
        f"{result['output_tokens_per_s']:8.0f} tokens/s; failed {result['failed']}{slow}"
    )


# ---- the page

_COLUMNS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("policy", lambda r: r["policy"]),
    *((f"TTFT p{p}, ms", lambda r, p=p: f"{r[f'ttft_p{p}_s'] * 1e3:.0f}") for p in PERCENTILES),
    *((f"TPOT p{p}, ms", lambda r, p=p: f"{r[f'tpot_p{p}_s'] * 1e3:.1f}") for p in PERCENTILES),
    ("ITL p99, ms", lambda r: f"{r['itl_p99_s'] * 1e3:.1f}"),
    ("tokens/s", lambda r: f"{r['output_tokens_per_s']:.0f}"),
    ("hit rate", lambda r: f"{r['hit_rate']:.1%}"),
    ("fetched", lambda r: f"{r['fetched']:.1%}"),
    ("imbalance", lambda r: f"{r['imbalance']:.3f}"),
    ("queue, mean of most", lambda r: f"{statistics.fmean([q['max'] for q in r['queues']] or [0]):.1f}"),
    ("failed", lambda r: str(r["failed"])),
)
_HOST: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("policy", lambda r: r["policy"]),
    ("steps", lambda r: str(r["host"]["steps"])),
    ("late, of a step's time", lambda r: f"{r['host']['step_late']:.1%}"),
    ("most, ms", lambda r: f"{r['host']['worst_late_s'] * 1e3:.0f}"),
    ("waited for steps", lambda r: f"{r['host']['waited_for_steps']:.1%}"),
    ("sent late p99, ms", lambda r: f"{r['host']['send_late_p99_s'] * 1e3:.1f}"),
    ("kept up", lambda r: "yes" if r["host"]["kept_up"] else "**no**"),
)


def write(out: Path, about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Path:
    """-> the page. Pictures as the options say."""
    options = about["options"]
    pictures = _pictures(out, results) if options["plots"] else []
    figures = ", ".join(f"{name} {value}" for name, value in about["figures"].items())
    parts = [
        "# Routing policies, simulated",
        f"`{about['trace']}`: {figures}.",
        f"{options['instances']} instances of {options['num_blocks']} blocks and {options['max_num_seqs']} sequences, "
        f"{options['prefill']} of them for prompts only; a step "
        f"takes {options['base_ms']:g} ms, {options['token_us']:g} us for each token and {options['context_ns']:g} ns for each "
        f"token of KV. A second of the trace took {options['time_scale']:g} s. Times are those of the trace.",
        _table(_COLUMNS, results),
        "ITL: between two tokens of an answer. Fetched: of the prompts' tokens, those whose KV came from another instance. "
        "Imbalance: coefficient of variation of the tokens that instances computed for requests of their own. "
        "Queue: of all instances the most requests that one has, running or waiting.",
        *(f"![{title}]({name})" for title, name in pictures),
        "## Whether the host kept up",
        _table(_HOST, results),
    ]
    if not all(result["host"]["kept_up"] for result in results):
        parts.append("**The host did not keep up: times are too long. A larger `--time-scale` helps.**")
    page = out / "report.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _table(
    columns: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]], results: Sequence[Mapping[str, Any]]
) -> str:
    rows = [[title for title, _ in columns], ["---"] * len(columns)]
    rows += [[cell(result) for _, cell in columns] for result in results]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _pictures(out: Path, results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """-> title and file of each."""
    from matplotlib.figure import Figure

    def save(name: str, title: str, x: str, y: str, draw: Callable[[Any], None]) -> tuple[str, str]:
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(out / name, format="svg", metadata={"Date": None})
        return title, name

    def ttft(axes: Any) -> None:
        for result in results:
            axes.plot(
                [max(t * 1e3, 0.1) for t in result["ttft_curve"]],
                [n / CURVE for n in range(CURVE + 1)],
                label=result["policy"],
            )
        axes.set_xscale("log")

    def queues(axes: Any) -> None:
        for result in results:
            at = [q["at"] for q in result["queues"]]
            (drawn,) = axes.plot(at, [q["mean"] for q in result["queues"]], label=result["policy"])
            axes.plot(at, [q["max"] for q in result["queues"]], color=drawn.get_color(), alpha=0.4, lw=0.8)

    def work(axes: Any) -> None:
        for result in results:
            axes.plot(sorted(result["work"].values(), reverse=True), marker=".", label=result["policy"])

    return [
        save("ttft.svg", "Time to first token", "ms", "share of requests", ttft),
        save("queues.svg", "Requests in an instance: mean, and most (thin)", "s", "requests", queues),
        save("work.svg", "Tokens computed by instance, most first", "instance", "tokens", work),
    ]
