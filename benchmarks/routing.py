"""Routing policies compared on real instances and in the simulator: the same traces, one policy after the other.

    python -m benchmarks.routing [--seconds 30] [--repeats 3] [--no-real] [--no-simulated]

Four `xllm serve demo`, and one `xllm router` for each policy over the same four. Policies take turns, and every run has a
cache salt of its own, so none finds what another left. The traces: `shared`, conversations over shared system prompts,
each turn the one before with its answer and more; `strangers`, requests that have nothing in common. The simulator
(`xllm bench simulate`) replays the same files over instances without a model whose steps take about what the demo's do.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.cluster_rig import Foreign, Rig, ask, healthy, serving
from benchmarks.routing_load import MODEL, OUTPUT, TRACES, play, reusable, strangers
from xllm.bench import simulate
from xllm.bench.collect_env import collect
from xllm.bench.metrics import percentile
from xllm.bench.simulate_options import SimulateOptions
from xllm.bench.trace import TraceRequest

HERE = Path(__file__).resolve().parent
POLICIES = ("prefix_aware", "least_loaded", "round_robin")
INSTANCES, SEQUENCES, BLOCK = 4, 8, 16
KV_BLOCKS = 420  # of an instance: some seven of the longest prompts
BLOCK_BYTES = 98304  # of the demo: 16 tokens, 6 layers, K and V, 2 heads of 64 floats
STEP_MS, TOKEN_US = 4.0, 120.0  # of a step of the demo, while others compute on the same cores
BAR = 2.0
FEW = 1.15  # within runs of a policy the medians differ as much


# ---- real instances


def real(traces: dict[str, list[TraceRequest]], repeats: int, transport: str) -> list[dict[str, Any]]:
    runs = []
    with Rig() as rig:
        flags = ["--threads", "1", "--kv-cache-memory-bytes", str(KV_BLOCKS * BLOCK_BYTES),
                 "--max-num-seqs", str(SEQUENCES), "--block-size", str(BLOCK), "--kv-transport", transport]  # fmt: skip
        urls = {}
        for n in range(INSTANCES):  # one after the other: they start slowly side by side
            name = f"instance-{n}"
            urls[name], _ = rig.instance(name, MODEL, *flags)
            rig.until(lambda name=name: healthy(urls[name]), name)  # type: ignore[misc]
        routers = {policy: rig.router(policy, MODEL, "--routing-policy", policy)[0] for policy in POLICIES}
        for policy, url in routers.items():
            rig.until(lambda url=url: serving(url, INSTANCES), policy)  # type: ignore[misc]
        for url in routers.values():  # what is imported and measured with the first requests
            asyncio.run(play(url, strangers(random.Random(1), 4, 4), f"warm {url}"))
        for repeat in range(repeats):
            for trace, rows in traces.items():
                for policy in POLICIES[repeat % 3 :] + POLICIES[: repeat % 3]:
                    with Foreign() as foreign:
                        run = asyncio.run(play(routers[policy], rows, f"{trace} {policy} {repeat}"))
                    run |= {"trace": trace, "policy": policy, "repeat": repeat, "foreign": foreign.share}
                    runs.append(run)
                    print(
                        f"{trace:<10} {policy:<13} p50 {percentile(came(run), 50):6.1f} ms, hits "
                        f"{run['hit_rate']:.0%}, failed {run['failed']}, foreign {foreign.share:.0%}", flush=True,
                    )  # fmt: skip
        shares = {
            policy: ask(url, "/v1/instances")["counts"]["by_instance"] for policy, url in routers.items()
        }
    print(json.dumps(shares))
    return runs


# ---- the simulator


def simulated(traces: dict[str, list[TraceRequest]], scale: float) -> list[dict[str, Any]]:
    options = SimulateOptions(
        instances=INSTANCES, workers=2, time_scale=scale, base_ms=STEP_MS, token_us=TOKEN_US, context_ns=0.0,
        num_blocks=KV_BLOCKS, block_size=BLOCK, max_num_seqs=SEQUENCES, plots=False,
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    for trace, rows in traces.items():
        for policy in POLICIES:
            found.append(
                {"trace": trace} | simulate.measure(policy, simulate.fitting(rows, options), options)
            )
            print(trace, policy, f"p50 {found[-1]['ttft_p50_s'] * 1000:.1f} ms", flush=True)
    return found


# ---- the report


def came(run: dict[str, Any]) -> list[float]:
    return [ttft for ttft in run["ttfts_ms"] if ttft is not None]


def rows_of(runs: list[dict[str, Any]], trace: str) -> dict[str, dict[str, float]]:
    """Of each policy. p50: of the requests' own medians over the runs, as others on the machine hit whole runs."""
    found = {}
    for policy in POLICIES:
        mine = [run for run in runs if run["trace"] == trace and run["policy"] == policy]
        p50s = [percentile(came(run), 50) for run in mine]
        requests = [
            [t for t in ttfts if t is not None] for ttfts in zip(*(r["ttfts_ms"] for r in mine), strict=True)
        ]
        found[policy] = {
            "hit_rate": statistics.median(run["hit_rate"] for run in mine),
            "p50": percentile([statistics.median(ttfts) for ttfts in requests if ttfts], 50),
            "p99": percentile([statistics.median(ttfts) for ttfts in requests if ttfts], 99),
            "tokens_s": statistics.median(run["tokens_s"] for run in mine),
            "failed": sum(run["failed"] for run in mine),
            "least": min(p50s), "most": max(p50s),
            "foreign": statistics.median(run["foreign"] for run in mine),
        }  # fmt: skip
    return found


def simulated_rows(runs: list[dict[str, Any]], trace: str) -> dict[str, dict[str, float]]:
    return {
        run["policy"]: {
            "hit_rate": run["hit_rate"], "p50": run["ttft_p50_s"] * 1000, "p99": run["ttft_p99_s"] * 1000,
            "tokens_s": run["output_tokens_per_s"], "failed": run["failed"],
        }
        for run in runs if run["trace"] == trace
    }  # fmt: skip


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    among = "least" in next(iter(rows.values()))
    more = " | p50 by run, least and most | foreign load" if among else ""
    lines = [
        f"| policy | hit rate | TTFT p50, ms | TTFT p99, ms | tokens/s | failed{more} |",
        "|---" * (6 + 2 * among) + "|",
    ]
    for policy, row in rows.items():
        tail = f" | {row['least']:.1f}, {row['most']:.1f} | {row['foreign']:.0%}" if among else ""
        lines.append(
            f"| {policy} | {row['hit_rate']:.1%} | {row['p50']:.1f} | {row['p99']:.1f} | {row['tokens_s']:.1f} | "
            f"{row['failed']:.0f}{tail} |"
        )
    return [*lines, ""]


def _about(rows: list[TraceRequest]) -> str:
    longest = sorted(row.input_length for row in rows)
    return f"{len(rows)} requests, median prompt {longest[len(rows) // 2]} tokens, {reusable(rows):.0%} of them seen before"


def verdicts(by_trace: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    gain = by_trace["shared"]["round_robin"]["p50"] / by_trace["shared"]["prefix_aware"]["p50"]
    worse = by_trace["strangers"]["prefix_aware"]["p50"] / by_trace["strangers"]["least_loaded"]["p50"]
    return [
        f"- `shared`: TTFT p50 of round_robin over that of prefix_aware: {gain:.2f} x (bar: {BAR:g} x, "
        f"{'kept' if gain >= BAR else '**missed**'}).",
        f"- `strangers`: TTFT p50 of prefix_aware over that of least_loaded: {worse:.2f} x (no worse, up to what runs of one "
        f"policy differ by, {FEW:g} x: {'kept' if worse <= FEW else '**missed**'}).",
        "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of each trace")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--kv-transport",
        default="none",
        help="with one, an instance fetches what another has, whatever the policy",
    )
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--simulated", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--time-scale", type=float, default=1.0, help="of the simulator")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "routing")
    asked = parser.parse_args()
    traces = {name: make(random.Random(name), asked.seconds, asked.rate) for name, make in TRACES.items()}
    machine = collect()
    lines = [
        f"# Routing policies, {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}", "",
        f"`python -m benchmarks.routing {' '.join(sys.argv[1:])}`", "",
        f"{psutil.cpu_count()} cores of {machine['cpu']['model']}, Python {machine['python']}. {INSTANCES} instances of "
        f"{KV_BLOCKS} KV blocks and {SEQUENCES} sequences; {asked.rate:g} requests/s for {asked.seconds:g} s, {OUTPUT} tokens of "
        "answer each. Foreign load: cores used by others than the processes of the measurement.", "",
    ]  # fmt: skip
    record: dict[str, Any] = {
        "machine": machine,
        "traces": {n: msgspec.to_builtins(t) for n, t in traces.items()},
    }
    if asked.real:
        runs = record["real"] = real(traces, asked.repeats, asked.kv_transport)
        by_trace = {trace: rows_of(runs, trace) for trace in traces}
        lines += [
            f"## Real processes, {asked.repeats} runs each", "",
            "Percentiles are over the requests of the trace, of each its median over the runs.", "",
        ]  # fmt: skip
        for trace, rows in by_trace.items():
            lines += [f"### {trace}: {_about(traces[trace])}", "", *table(rows)]
        lines += verdicts(by_trace)
    if asked.simulated:
        found = record["simulated"] = simulated(traces, asked.time_scale)
        by_trace = {trace: simulated_rows(found, trace) for trace in traces}
        lines += [f"## The simulator, steps of {STEP_MS:g} ms and {TOKEN_US:g} us a token", ""]
        for trace, rows in by_trace.items():
            lines += [f"### {trace}", "", *table(rows)]
        slow = [f"{r['policy']} on {r['trace']}" for r in found if not r["host"]["kept_up"]]
        lines += verdicts(by_trace)
        if slow:
            names = ", ".join(slow)
            lines += [
                f"**The host did not keep up ({names}): times are too long, and differ by chance.**",
                "",
            ]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{asked.out}.md").write_text("\n".join(lines), encoding="utf-8")
    Path(f"{asked.out}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
