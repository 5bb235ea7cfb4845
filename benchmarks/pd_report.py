"""What `benchmarks.pd` prints and writes."""

import statistics
from collections.abc import Sequence
from typing import Any

from xllm.bench.metrics import percentile

TIMES_BETTER, ADDED, OF_TRANSPORT = 2.0, 0.05, 0.7  # wanted on a card
NAMES = {"mixed": "two mixed", "pd": "prefill + decode"}


def page(record: dict[str, Any]) -> str:
    load, machine = record["load"], record["machine"]
    lines = [
        f"# Prefill and decode on different instances, {record['at']}", "",
        f"`python -m benchmarks.pd {' '.join(record['argv'])}`".replace(" `", "`"), "",
        f"{where(record)}, Python {machine['python']}. Two instances at a time, of the model {record['model']}, steps of "
        f"{record['budget']} tokens at most, {record['kv_gib']:g} GiB of KV each. TTFT: time to the first token; ITL: "
        "between two tokens of a stream. Foreign load: cores used by others than the processes of the measurement.", "",
    ]  # fmt: skip
    if runs := record.get("streams"):
        lines += [
            f"## {load['streams']} streams under bursts of {load['burst']} prompts of {load['long_prompt']} tokens", "",
            f"A burst every {load['every_s']:g} s, {load['bursts']} in a run; streams of {load['stream_prompt']} tokens in and "
            f"{load['stream_output']} out, one after the other, all through a router. It decides which prompts the decode instance has computed by the "
            "other: where that one's queue is long it takes more on itself. Medians over the runs, the least and most in brackets.", "",
            *streams_table(runs), *streams_verdict(runs, record["device"]),
        ]  # fmt: skip
    if runs := record.get("ttft"):
        lines += ["## What the transfer adds to the first token of a prompt", "",
                  "Two idle instances, prompts that nobody has seen, sent to the one that answers, without a router: it computes them "
                  "alone, or asks the other one to, which computes prompts of its own as well, alone. Added: to what the other takes for "
                  "those. Fetched: of the prompt's tokens, those that it got from there; it waited so long for them and for the first "
                  "token, the other's computing included.", "",
                  *ttft_table(runs), *ttft_verdict(runs, record["device"])]  # fmt: skip
    if runs := record.get("kv"):
        lines += ["## Bytes per second that an instance fetches", "",
                  "Of prompts that the other has in its cache, asking, checksums on both sides and taking included.", "",
                  *kv_table(runs), "`python -m benchmarks.kv_transport` for the same pieces, without engines:", "",
                  record["kv_transport"]]  # fmt: skip
        if record["device"] == "cuda":
            lines += [f"- Wanted: {OF_TRANSPORT:.0%} of what the transport alone does.", ""]
    for kind in dict.fromkeys(run["kind"] for run in record.get("simulated", ())):
        lines += simulated_part([run for run in record["simulated"] if run["kind"] == kind])
    return "\n".join(lines).rstrip() + "\n"


def where(record: dict[str, Any]) -> str:
    machine = record["machine"]
    if record["device"] == "cuda":
        cards = machine.get("gpus") or ["unknown"]
        return f"{record['cards']} of {len(cards)} cards {cards[0]}"
    return f"{machine['cpu']['usable_cores']} cores of {machine['cpu']['model']}, an instance computes with one thread"


# ---- streams


def run_line(run: dict[str, Any]) -> str:
    return (
        f"{run['setting']:<6} ITL p50 {run['itl_p50_ms']:6.2f} p99 {run['itl_p99_ms']:7.2f} max {run['itl_max_ms']:7.1f} ms, "
        f"TTFT p50 {percentile(run['ttfts_ms'], 50):7.1f} ms, {run['stream_tokens_s']:7.1f} tokens/s, "
        f"{run['prompts_s']:5.2f} prompts/s, failed {run['failed']} {' '.join(run['errors'])}"
    )


COLUMNS = ("ITL p50, ms", "ITL p90, ms", "ITL p99, ms", "the same while long prompts wait, ms", "ITL most, ms", "streams, tokens/s", "long prompts/s",
           "their TTFT p50, ms", "their TTFT p99, ms")  # fmt: skip


def figures(run: dict[str, Any]) -> list[float]:
    return [
        run["itl_p50_ms"], run["itl_p90_ms"], run["itl_p99_ms"], run["beside_p99_ms"], run["itl_max_ms"], run["stream_tokens_s"], run["prompts_s"],
        percentile(run["ttfts_ms"], 50), percentile(run["ttfts_ms"], 99),
    ]  # fmt: skip


def streams_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    found = {setting: [run for run in runs if run["setting"] == setting] for setting in NAMES}
    lines = [f"| | {' | '.join(NAMES[setting] for setting in found)} |", "|---|---|---|"]
    rows = {setting: list(zip(*map(figures, mine), strict=True)) for setting, mine in found.items()}
    for i, column in enumerate(COLUMNS):
        lines.append(f"| {column} | {' | '.join(spread(rows[setting][i]) for setting in found)} |")
    shares = (spread([100 * share_fetched(run) for run in mine], 0) for mine in found.values())
    lines.append(f"| long prompts that another computed, % | {' | '.join(shares)} |")
    if "foreign" in runs[0]:
        foreign = (f"{statistics.median(run['foreign'] for run in mine):.0%}" for mine in found.values())
        lines.append(f"| foreign load | {' | '.join(foreign)} |")
    failed = (str(sum(run["failed"] for run in mine)) for mine in found.values())
    return [*lines, f"| failed | {' | '.join(failed)} |", ""]


def share_fetched(run: dict[str, Any]) -> float:
    """Of the long prompts, those whose KV came from another instance; prompts of streams are too short for that."""
    return float(run["fetched"] if "fetched" in run else run["fetches"] / max(1, len(run["ttfts_ms"])))


def spread(values: Sequence[float], digits: int = 1) -> str:
    middle = f"{statistics.median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def times_better(runs: Sequence[dict[str, Any]], what: str = "itl_p99_ms") -> float:
    p99 = {s: statistics.median(run[what] for run in runs if run["setting"] == s) for s in NAMES}
    return p99["mixed"] / p99["pd"] if p99["pd"] else 0.0


def in_words(runs: Sequence[dict[str, Any]]) -> str:
    return (
        f"- ITL p99 of two mixed instances over that of prefill + decode: {times_better(runs):.2f} x; of tokens that come while long "
        f"prompts wait: {times_better(runs, 'beside_p99_ms'):.2f} x"
    )


def streams_verdict(runs: Sequence[dict[str, Any]], device: str) -> list[str]:
    wanted = f" (wanted on a card: {TIMES_BETTER:g} x)"
    if device == "cuda":
        wanted += ", met" if times_better(runs) >= TIMES_BETTER else ", **missed**"
    return [f"{in_words(runs)}{wanted}.", ""]


# ---- first tokens

WAYS = {"alone": "alone, ms", "there": "the other one alone, ms", "paired": "by the other for it, ms"}


def ttfts_of(runs: Sequence[dict[str, Any]], tokens: int) -> dict[str, list[float]]:
    return {
        way: [run["ttft_ms"] for run in runs if (run["tokens"], run["way"]) == (tokens, way)] for way in WAYS
    }


def added(runs: Sequence[dict[str, Any]], tokens: int, beside: str = "there") -> float:
    """To what the one that computes takes for an answer of its own: two cards differ by some per cent."""
    found = ttfts_of(runs, tokens)
    return statistics.median(found["paired"]) / statistics.median(found[beside]) - 1


def ttft_line(runs: Sequence[dict[str, Any]], tokens: int) -> str:
    told = ", ".join(
        f"{way} {statistics.median(found):.1f} ms" for way, found in ttfts_of(runs, tokens).items()
    )
    return f"{tokens} tokens: {told}; added {added(runs, tokens):+.1%}, to its own {added(runs, tokens, 'alone'):+.1%}"


def ttft_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    titles = ("prompt, tokens", *WAYS.values(), "added", "to its own", "fetched", "waited for it, ms")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for tokens in sorted({run["tokens"] for run in runs}):
        found = ttfts_of(runs, tokens)
        paired = [run for run in runs if (run["tokens"], run["way"]) == (tokens, "paired")]
        more = statistics.median(found["paired"]) - statistics.median(found["there"])
        fetched = statistics.fmean(run["fetched"] for run in paired) / tokens
        lines.append(
            f"| {tokens} | {' | '.join(spread(found[way]) for way in WAYS)} | {more:+.1f} ms, {added(runs, tokens):+.1%} | "
            f"{added(runs, tokens, 'alone'):+.1%} | {fetched:.1%} | {statistics.median(run['fetch_ms'] for run in paired):.1f} |"
        )
    return [*lines, ""]


def ttft_verdict(runs: Sequence[dict[str, Any]], device: str) -> list[str]:
    tokens = 8192 if any(run["tokens"] == 8192 for run in runs) else max(run["tokens"] for run in runs)
    wanted = f" (wanted on a card at 8k tokens of 8B: {ADDED:+.0%} at most)"
    if device == "cuda":
        wanted += ", met" if added(runs, tokens) <= ADDED else ", **missed**"
    return [f"- Added at {tokens} tokens: {added(runs, tokens):+.1%}{wanted}.", ""]


# ---- bytes


def bytes_of(run: dict[str, Any]) -> float:
    return float(run["fetched"] / run["block_size"] * run["block_bytes"])


def speeds_of(runs: Sequence[dict[str, Any]], size: int) -> list[float]:
    """GB/s."""
    return [
        bytes_of(run) / run["fetch_ms"] / 1e6 for run in runs if run["block_size"] == size and run["fetched"]
    ]


def kv_line(runs: Sequence[dict[str, Any]], size: int) -> str:
    speeds = speeds_of(runs, size)
    return (
        f"blocks of {size} tokens: {spread(speeds, 2)} GB/s" if speeds else f"blocks of {size}: none fetched"
    )


def kv_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| block, tokens | block, KiB | blocks | ms | GB/s |", "|---" * 5 + "|"]
    for size in sorted({one["block_size"] for one in runs}):
        mine = [one for one in runs if one["block_size"] == size and one["fetched"]]
        if not mine:
            lines.append(f"| {size} | | none fetched | | |")
            continue
        blocks, each = mine[0]["fetched"] // size, mine[0]["block_bytes"] / 1024
        took = spread([one["fetch_ms"] for one in mine], 2)
        lines.append(f"| {size} | {each:,.0f} | {blocks:.0f} | {took} | {spread(speeds_of(runs, size), 2)} |")
    return [*lines, ""]


# ---- the simulator


def simulated_part(runs: Sequence[dict[str, Any]]) -> list[str]:
    one = runs[0]
    title = {"cpu": "the demo's steps on a core each", "cuda": "8B on an H200 each, over NVLink"}[one["kind"]]
    load = one["load"]
    lines = [
        f"## The simulator: {title}", "",
        f"Steps of {one['base_ms']:g} ms and {one['token_us']:g} us a token, {one['fetch_us']:g} us for a token's KV, as `xllm bench simulate "
        f"--instances 2 --prefill 1` has it beside `--prefill 0`. {load['streams']} streams, {load['bursts']} bursts of {load['burst']} prompts of "
        f"{load['long_prompt']} tokens, one every {load['every_s']:g} s.", "",
        *streams_table(runs),
        f"{in_words(runs)}.", "",
    ]  # fmt: skip
    if not all(run["host"]["kept_up"] for run in runs):
        lines += ["**The host did not keep up: times are too long.**", ""]
    return lines
